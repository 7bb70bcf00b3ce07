"""Package list and a build step that calls CMake; metadata lives in pyproject.toml.

Compiler flags live in CMakeLists.txt. Options reach CMake through the environment:
    CMAKE_ARGS="-DSFT_FAST_GPU=OFF" pip install -e .
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# find_packages skips a namespace package behind a link, so it is named.
PACKAGES = [*find_packages(include=["sft_fast", "sft_fast.*"]), "sft_fast.kernels"]


def find_cmake() -> str:
    """Returns the cmake of the running Python's packages, else the one on PATH."""
    try:
        from cmake import CMAKE_BIN_DIR
    except ImportError:
        on_path = shutil.which("cmake")
        if on_path is None:
            raise SystemExit("cmake not found: pip install cmake, or put it on PATH") from None
        return on_path
    return str(Path(CMAKE_BIN_DIR) / "cmake")


class CMakeBuild(build_ext):
    """Builds all extensions with one CMake project."""

    def build_extensions(self) -> None:
        """Configures and builds into the folder where setuptools expects the extensions."""
        output = Path(self.get_ext_fullpath("sft_fast._C")).parent.resolve()
        build = Path(self.build_temp).resolve()
        cmake = find_cmake()
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build)),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel"], check=True)


setup(
    packages=PACKAGES,
    package_data={
        "sft_fast": ["py.typed", "*.pyi", "recipes/*.yaml"],
        "sft_fast.kernels": ["README.md"],
        "sft_fast.megatron": ["README.md"],
    },
    ext_modules=[
        Extension("sft_fast._C", sources=[]),
        # Optional: present only where CMake found a GPU toolkit.
        Extension("sft_fast._gpu", sources=[], optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
