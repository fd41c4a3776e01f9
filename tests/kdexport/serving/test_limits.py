"""Processors and memory of the control group, the bound on memory, and the limits as the documentation states them."""

import re
from pathlib import Path
from typing import Any

import pytest

from kdexport.serving.limits import MIB, Limits, memory_bound, memory_limit, usable_processors


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000"}, 1),
        ({"proc/self/cgroup": "0::/gone\n", "sys/fs/cgroup/cpu.max": "100000 100000"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 99),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/x\n7:memory:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "100000",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            },
            1,
        ),
        ({"proc/self/cgroup": "4:cpu:/x\n", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1"}, 99),
        ({}, 99),
    ],
)
def test_processors_are_those_of_the_control_group(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(99)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_processors(tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("memory.max", "1073741824", 2**30),
        ("memory.max", "max", None),
        ("memory.limit_in_bytes", str(2**63 - 4096), None),
    ],
)
def test_memory_is_that_of_the_control_group(name: str, text: str, expected: int | None, tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup" / name).write_text(text)
    assert memory_limit(tmp_path) == expected


def test_the_memory_bound_grows_with_every_limit_that_affects_memory() -> None:
    def total(**change: Any) -> int:
        limits = Limits(**change)
        bound = memory_bound(limits, base=MIB, instances=2, decoders=2, image_bytes=600_000, max_elements=10**6)
        assert f"at most {bound.total / MIB:.0f} MiB" in bound.describe()
        return bound.total

    usual = total()
    for change in ({"bodies": 256 * MIB}, {"pixels": 50_000_000}, {"connections": 1024}, {"queue": 64}):
        assert total(**change) > usual
    assert 500 * MIB < usual < 2000 * MIB


def test_the_documented_limits_are_the_defaults() -> None:
    text = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    limits = Limits()
    for words in (
        f"at most {limits.body // MIB} MiB", f"{limits.bodies // MIB} MiB |", f"{limits.connections} |",
        f"2 x instances + {limits.queue}", f"{limits.queue_seconds:g} s, or the request's", f"{limits.chunks:,}",
        f"{limits.pixels // 10**6} million pixels, short side {limits.min_side}, aspect {limits.aspect}",
        f"{limits.header // 1024} KiB, {limits.header_seconds:g} s", f"{limits.json_slack:,}; {limits.json_depth}",
        f"({limits.drain_seconds + limits.grace_seconds:g} s by default)",
    ):  # fmt: skip
        assert words in text, words


def test_idle_connections_outlast_those_of_common_load_balancers() -> None:
    assert Limits().keep_alive_seconds > 60


def test_the_container_of_kserve_fits_a_student_for_224_pixels() -> None:
    text = (Path(__file__).parents[3] / "deploy" / "kserve" / "runtime.yaml").read_text()
    gibibytes = {int(value) for value in re.findall(r"memory: (\d+)Gi", text)}
    body = int(re.findall(r"--max-body=(\d+)", text)[0])
    # In float32 with some room for its header, at most this many images fit into a body.
    images = body // (4 * 3 * 224 * 224)
    bound = memory_bound(
        Limits(body=body), base=300 * MIB, instances=2, decoders=2, image_bytes=4 * 3 * 224 * 224,
        max_elements=images * 3 * 224 * 224,
    )  # fmt: skip
    assert bound.total < min(gibibytes) * 1024 * MIB


@pytest.mark.parametrize("processes", [1, 2, 3, 64])
def test_processes_share_what_is_for_all_requests_and_not_what_is_for_one(processes: int) -> None:
    limits = Limits(queue=32, connections=512, bodies=128 * MIB, body=16 * MIB)
    share = limits.share(processes)
    assert processes * share.queue >= 32 > processes * (share.queue - 1)
    assert processes * share.connections >= 512 > processes * (share.connections - 1)
    # The largest body is one that a process must be able to take alone.
    assert share.bodies == max(16 * MIB, 128 * MIB // processes)
    assert (share.body, share.pixels, share.keep_alive_seconds) == (limits.body, limits.pixels, 75.0)
    assert limits.share(1) == limits
    arguments = {"base": 100 * MIB, "instances": 1, "decoders": 1, "image_bytes": 12288, "max_elements": 30_000}
    one, all_of_them = memory_bound(share, **arguments), memory_bound(share, **arguments, processes=processes)
    assert all_of_them.total == processes * one.total
    words = f"at most {processes * one.total / MIB:.0f} MiB ("
    assert all_of_them.describe().startswith(f"{words}in each of {processes} processes: " if processes > 1 else words)
