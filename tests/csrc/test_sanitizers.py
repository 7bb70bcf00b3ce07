"""The packing code under address and undefined-behaviour sanitizers, with hostile input.

pytest -m slow tests/csrc/test_sanitizers.py
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NUM_ROUNDS = int(os.environ.get("SFT_FAST_FUZZ_ROUNDS", 200_000))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder with fuzz_packing and an instrumented _C."""
    folder = tmp_path_factory.mktemp("sanitize")
    source = folder / "main.cpp"
    source.write_text("int main() {}\n")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"
    sanitize = [compiler, "-fsanitize=address,undefined", str(source), "-o", str(folder / "main")]
    if subprocess.run(sanitize, capture_output=True).returncode != 0:
        pytest.skip(f"{compiler} cannot link sanitizers")
    cmake = pytest.importorskip("cmake")
    command = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    configure = [
        *(command, "-S", str(ROOT), "-B", str(folder / "build")),
        f"-DCMAKE_CXX_COMPILER={compiler}",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DSFT_FAST_GPU=OFF",
        "-DSFT_FAST_SANITIZE=ON",
    ]
    subprocess.run(configure, check=True)
    subprocess.run([command, "--build", str(folder / "build"), "--parallel"], check=True)
    return folder / "build"


def test_fuzzing_finds_nothing(build: Path) -> None:
    # A seed of its own in every run; a failure prints it.
    seed = str(int.from_bytes(os.urandom(7), "little"))
    command = [str(build / "fuzz_packing"), str(NUM_ROUNDS), seed]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"fuzz_packing {NUM_ROUNDS} {seed}\n{done.stderr}"
    assert done.stdout == f"{NUM_ROUNDS} rounds\n"


# Loads the instrumented module under the name of the ordinary one, then runs pytest.
RUN_INSTRUMENTED = """
import importlib.util, sys
import pytest, sft_fast
spec = importlib.util.spec_from_file_location("sft_fast._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["sft_fast._C"] = sft_fast._C = module
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def test_bindings_under_sanitizers(build: Path) -> None:
    (module,) = build.glob("_C*.so")
    compiler = os.environ.get("CXX") or "g++"
    runtime = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip(f"{compiler} has no shared sanitizer runtime to load into Python")
    # Python itself leaks on exit; linking libstdc++ first lets the runtime intercept exceptions.
    environment = os.environ | {
        "LD_PRELOAD": f"{runtime} {libstdcxx(compiler)}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "OPENBLAS_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN_INSTRUMENTED, str(module), "tests/csrc/test_bindings.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert " passed" in done.stdout


def libstdcxx(compiler: str) -> str:
    found = subprocess.run(
        [compiler, "-print-file-name=libstdc++.so"], capture_output=True, text=True
    )
    return found.stdout.strip()
