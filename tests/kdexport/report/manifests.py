"""A manifest as a build writes it, short, and variants of it."""

from typing import Any

from kdexport.verify.check import Check

HOSTILE = '<b>bold</b> & "quoted" | piped\nsecond line <script>alert(1)</script>'


def check(rung: str, subject: str, name: str, measured: float, allowed: float, **changes: Any) -> dict[str, Any]:
    holds = changes.pop("holds", measured <= allowed)
    made = Check(
        rung=rung, subject=subject, name=name, holds=holds, measured=measured, allowed=allowed, unit="x", **changes
    )
    return made.to_json()


def manifest(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = {
        "student": {
            "student": "mobilenetv2",
            "classes": ["ant", "bee", "cat"],
            "branches": {"placement": "R1", "num_branches": 3},
            "preprocessing": {"image_size": 32, "resize": 36, "mean": [0.5] * 3, "std": [0.2] * 3, "fit": "crop"},
        },
        "provenance": {
            "metrics": {"top1": 0.7123, "teacher_top1": 0.745},
            "seed": 7,
            "dataset_sha256": "ab" * 32,
            "folder": "kept out",
        },
        "operators": {"unfused": {"Conv": 56, "Concat": 1}, "fused": {"Conv": 53}},
        "certificate": {
            "unfused_parameters": 1234567,
            "fused_parameters": 765432,
            "whole_relative_error": 3e-15,
            "limit": 1e-9,
            "blocks": [
                {"name": "small", "kind": "conv + batch norm", "relative_error": 1e-16},
                {"name": "large", "kind": "parallel branches", "relative_error": 9e-15},
            ],
        },
        "parity": [
            check("A", "student", "whole", 1e-15, 1e-9),
            check("B", "model.onnx", "rms error", 1.0, 2.0),
            check("B", "model.onnx", "max error", 3.5, 4.0, detail="worst input all 0"),
            check("C", "half.onnx", "rms error", 2.9, 3.0),
            check("C", "half.onnx", "largest activation", 12.0, 8188.0),
            check("audit", "model.onnx", "weights", 0.0, 0.0),
            check("run", "model.onnx", "same input twice", 0.0, 0.0),
        ],
        "parity_images": 64,
        "golden": ["golden/000.png", "golden/001.png"],
        "targets": {
            "onnx-fp32": {"precision": "fp32", "status": "verified"},
            "trt-rtx-fp16": {"precision": "fp16", "status": "verified", "kernels": 58, "version": "1.7"},
        },
        "latency": {
            "clock": "host: onnxruntime session.run on the CPU",
            "batch": 1,
            "threads": 1,
            "sessions": 6,
            "ratio": 0.913,
            "low": 0.9,
            "high": 0.926,
            "reference_ms": 2.0,
            "candidate_ms": 1.83,
            "max_slowdown": 0.02,
            "mde": 0.015,
            "verdict": "not slower",
        },
        "build_key": "f" * 64,
        "versions": {"torch": "2.15.0"},
    }
    return {**data, **changes}


def with_check(*checks: dict[str, Any]) -> dict[str, Any]:
    data = manifest()
    return {**data, "parity": [*data["parity"], *checks]}


def with_latency(verdict: str | None) -> dict[str, Any]:
    data = manifest()
    return {**data, "latency": None if verdict is None else {**data["latency"], "verdict": verdict}}
