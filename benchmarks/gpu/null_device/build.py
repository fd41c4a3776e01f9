"""Build a CUDA device that runs no kernel, for the CUDA build of torch that this Python has.

    python benchmarks/gpu/null_device/build.py build/null-device
    build/null-device/run python -m training train ...

Memory is that of the host and every call succeeds, so the code for CUDA runs to its end on a machine without a GPU: it
shows tensors on the wrong device, waiting for the device, captures of graphs, and how many operations a step has.
Results are whatever the memory held. The libraries stand in for those of torch's wheels, which bring the headers and
the names of the functions. Needs g++ and nm. The CUDA provider of onnxruntime runs on it too.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
SITE = Path(torch.__file__).parents[1]
#: Source, and the library that it stands in for, by the folder below ``nvidia`` that has it.
LIBRARIES = {
    "runtime.cpp": ("cu{major}/lib", "libcudart.so.{major}"),
    "driver.cpp": ("", "libcuda.so.1"),
    "cublas.cpp": ("cu{major}/lib", "libcublas.so.{major}"),
    "cublaslt.cpp": ("cu{major}/lib", "libcublasLt.so.{major}"),
    "cudnn.cpp": ("cudnn/lib", "libcudnn.so.9"),
}
#: A library that the CUDA provider of onnxruntime is linked with and calls nothing of; torch's wheels may lack it.
RANDOM = "libcurand.so.10"
RUN = """#!/bin/sh
# Run a command on the null device.
here=$(cd "$(dirname "$0")" && pwd)
export LD_PRELOAD="{preloaded}" LD_LIBRARY_PATH="$here:$LD_LIBRARY_PATH" TRITON_LIBCUDA_PATH="$here"
exec "$@"
"""


def version() -> tuple[int, int]:
    """The version of CUDA of this torch; ends the program if it has none or its wheels are of another kind."""
    if torch.version.cuda is None:
        sys.exit("This torch is built without CUDA, so it cannot use the null device. Install a CUDA build of torch.")
    major, minor = (int(part) for part in torch.version.cuda.split("."))
    if not (SITE / "nvidia" / f"cu{major}").is_dir():
        sys.exit(f"The wheels of torch {torch.__version__} have no nvidia/cu{major}. Install torch for CUDA 13.")
    return major, minor


def headers(major: int) -> list[Path]:
    """The folders of CUDA's headers: Triton's wheel has those that the compiler driver needs, torch's the others."""
    return [SITE / "triton/backends/nvidia/include", SITE / "nvidia" / f"cu{major}" / "include"]


def functions(library: Path) -> set[str]:
    """The names that a shared library exports."""
    listed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return {row[2].partition("@")[0] for row in rows if len(row) == 3 and row[1] in "TtWi"}


def driver_functions(major: int) -> set[str]:
    """The names of the driver, which no wheel has, from its header; many exist in a second version too."""
    text = next(folder / "cuda.h" for folder in headers(major) if (folder / "cuda.h").is_file()).read_text("latin-1")
    names = set(re.findall(r"CUDAAPI\s+(cu[A-Z]\w+)\s*\(", text))
    return names | {f"{name}_v2" for name in names}


def compiled(out: Path, source: str, name: str, wanted: set[str], defines: list[str], includes: list[Path]) -> None:
    """Build ``name`` from ``source``, with a stub that succeeds for each other name of ``wanted``."""
    own, stubs = out / f"{source}.o", out / f"{source}.stubs.c"
    flags: list[str | Path] = [
        "-c",
        "-fPIC",
        "-O2",
        "-w",
        "-fvisibility=hidden",
        *defines,
        *(f"-I{folder}" for folder in includes),
    ]
    subprocess.run(["g++", *flags, HERE / source, "-o", own], check=True)
    listed = subprocess.run(["nm", "--defined-only", own], capture_output=True, text=True, check=True).stdout
    written = {line.split()[-1] for line in listed.splitlines()}
    missing = sorted(other for other in wanted - written if re.fullmatch(r"[A-Za-z_]\w*", other))
    stubs.write_text(
        "".join(f'__attribute__((visibility("default"))) long {other}() {{ return 0; }}\n' for other in missing)
    )
    # torch asks for functions of a version that is named like the library.
    versions = out / f"{source}.map"
    versions.write_text(f"{'' if name == 'libcuda.so.1' else name} {{ global: *; }};\n")
    subprocess.run(["gcc", "-c", "-fPIC", "-w", stubs, "-o", f"{stubs}.o"], check=True)
    link: list[str | Path] = [
        "g++",
        "-shared",
        "-o",
        out / name,
        own,
        f"{stubs}.o",
        f"-Wl,-soname,{name}",
        "-ldl",
        f"-L{out}",
    ]
    link += [f"-Wl,--version-script={versions}", "-Wl,-rpath,$ORIGIN"]
    runtime = next(path for path in ("libcudart.so.13", "libcudart.so.12") if path == name or (out / path).is_file())
    subprocess.run([*link, *([] if name == runtime else [f"-l:{runtime}"])], check=True)
    for path in (own, stubs, Path(f"{stubs}.o"), versions):
        path.unlink()
    print(f"{name}: {len(wanted & written)} functions, {len(missing)} stubs")


def build(out: Path) -> None:
    """Write the libraries and the script ``run`` into ``out``."""
    tools = [tool for tool in ("g++", "gcc", "nm") if shutil.which(tool) is None]
    if tools:
        sys.exit(f"{', '.join(tools)} not found. On Debian: apt-get install g++ binutils")
    major, minor = version()
    out.mkdir(parents=True, exist_ok=True)
    defines = [f"-DNULL_CUDA_VERSION={major * 1000 + minor * 10}"]
    names = []
    for source, (folder, template) in LIBRARIES.items():
        name = template.format(major=major)
        wanted = functions(SITE / "nvidia" / folder.format(major=major) / name) if folder else driver_functions(major)
        compiled(out, source, name, wanted, defines, headers(major))
        names.append(f"$here/{name}")
    if not (SITE / "nvidia" / f"cu{major}" / "lib" / RANDOM).is_file():
        link: list[str | Path] = ["-shared", "-x", "c", "/dev/null", "-o", out / RANDOM, f"-Wl,-soname,{RANDOM}"]
        subprocess.run(["gcc", *link], check=True)
    run = out / "run"
    run.write_text(RUN.format(preloaded=":".join(names)))
    run.chmod(0o755)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    build(parser.parse_args().out)
