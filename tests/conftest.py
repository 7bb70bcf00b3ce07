import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import warm_start
from rank_pool import RankPool

# Workers and their ranks share the cores: OpenMP threads that spin would starve each other. Set
# before any of them imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def imports_ahead(request: pytest.FixtureRequest) -> None:
    """Starts the server that ranks are forked from, where a test will need it.

    A process has one such server; preparing data would start it with fewer imports.
    """
    if any({"rank_pool", "launcher"} & set(item.fixturenames) for item in request.session.items):
        warm_start.ensure_running()


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture
def registries_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    from sft_fast.data import format_registry  # noqa: F401 - it has one
    from sft_fast.registry import Registry

    for registry in Registry.every:
        monkeypatch.setattr(registry, "entries", dict(registry.entries))
        monkeypatch.setattr(registry, "files", dict(registry.files))
    plugins = {name for name in sys.modules if name.startswith("sft_fast_plugin:")}
    yield
    for name in [name for name in sys.modules if name.startswith("sft_fast_plugin:")]:
        if name not in plugins:
            del sys.modules[name]


ROOT = Path(__file__).parents[1]
SMALL_RUN = [
    *("train.steps=4", "train.global_batch_size=4", "train.micro_batch_size=4"),
    *("optim.warmup_steps=1", "evaluation.every_steps=2", "evaluation.max_samples=50"),
    *("evaluation.exact_match_samples=0", "metrics.log_every_steps=1", "checkpoint.every_steps=2"),
]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sft_fast train` of the demo, four steps."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    command = [
        sys.executable,
        "-m",
        "sft_fast",
        "train",
        "demo",
        f"output_dir={folder}",
        *SMALL_RUN,
    ]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "step 4/4  loss" in result.stdout and "pictures: " in result.stdout
    return folder
