"""The native loss kernels under NVIDIA's memory and race checkers."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SOURCES = Path(__file__).parents[2] / "csrc"
NVCC = shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")
SANITIZER = shutil.which("compute-sanitizer", path="/usr/local/cuda/bin") or shutil.which(
    "compute-sanitizer"
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(NVCC is None or SANITIZER is None, reason="needs nvcc, compute-sanitizer"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("exercise") / "exercise"
    sources = [SOURCES / "masked_ce" / name for name in ("exercise.cu", "masked_ce.cu")]
    flags = ["-std=c++20", "-O1", "-lineinfo", "-arch=sm_90", f"-I{SOURCES}"]
    subprocess.run([str(NVCC), *flags, *sources, "-o", built], check=True)
    return built


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_checker_finds_nothing(program: Path, tool: str) -> None:
    command = [str(SANITIZER), "--tool", tool, "--error-exitcode", "9", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "done" in done.stdout, done.stdout + done.stderr
