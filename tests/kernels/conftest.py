from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel_pool import KernelPool
from rank_pool import RankPool


@pytest.fixture(scope="session")
def kernel_rank() -> Iterator[RankPool]:
    """A process in which Triton's kernels run; see kernel_pool.py."""
    ranks = KernelPool()
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
