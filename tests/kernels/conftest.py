from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel_pool import KernelPool, build_native
from rank_pool import RankPool


@pytest.fixture(scope="session")
def kernel_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Processes in which the kernels of every backend run; see kernel_pool.py."""
    ranks = KernelPool(build_native(tmp_path_factory.mktemp("emulated")))
    yield ranks
    ranks.close()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's compiler with a cache of its own."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: there is no compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
