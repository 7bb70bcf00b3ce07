"""Module _gpu built for the CPU: the native kernels' own source, with fibers as GPU threads."""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "csrc"


def missing() -> str | None:
    """What the build needs and this machine lacks."""
    if shutil.which("g++") is None:
        return "g++"
    return None if importlib.util.find_spec("pybind11") else "pybind11"


def build(folder: Path) -> Path:
    """Compiles the module into `folder` and returns its path."""
    import pybind11

    module = folder / f"_gpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-x", "c++"]
    flags += ["-DSFT_FAST_HOST_EMULATION", f"-I{SOURCES}", f"-I{pybind11.get_include()}"]
    flags += [f"-I{sysconfig.get_path('include')}"]
    compilers, objects = [], []
    for name in ("masked_ce.cu", "bindings.cpp"):
        objects.append(str(folder / f"{name}.o"))
        command = ["g++", *flags, "-c", str(SOURCES / "masked_ce" / name), "-o", objects[-1]]
        compilers.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for compiler in compilers:
        _, errors = compiler.communicate()
        assert compiler.returncode == 0, errors
    subprocess.run(["g++", "-shared", *objects, "-o", str(module)], check=True)
    return module


def install(module: Path) -> None:
    """Makes `sft_fast._gpu` of this process the module at that path."""
    if "sft_fast._gpu" in sys.modules:
        return
    import sft_fast

    spec = importlib.util.spec_from_file_location("sft_fast._gpu", module)
    assert spec is not None and spec.loader is not None
    emulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulated)
    sys.modules["sft_fast._gpu"] = emulated
    sft_fast._gpu = emulated  # type: ignore[attr-defined]
