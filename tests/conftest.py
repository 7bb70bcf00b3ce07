import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rank_pool import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


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
