"""Many saves, and faults without end."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from faults.launcher import Launcher


@pytest.mark.slow
@pytest.mark.fault("F29")
def test_five_hundred_saves_leave_nothing_behind(launcher: Launcher) -> None:
    job = launcher.start("soak", "metrics.log_every_steps=50", "export.enabled=false", steps=500)
    process = psutil.Process(job.ranks[0].pid)
    memory, files = {}, {}
    for step in (100, 200, 300, 400):
        job.wait_until(f"step {step}/500", timeout_s=300)
        memory[step], files[step] = process.memory_info().rss, process.num_fds()
    assert job.wait(300) == [0], job.said()
    assert memory[400] < 1.02 * memory[200], memory
    assert files[400] <= files[100] + 2, files
    assert len(list((job.output / "checkpoints").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.fault("F29")
def test_a_punished_run_gets_on(launcher: Launcher) -> None:
    output = launcher.folder / "punished"
    config = launcher.config("punished", steps=100000)
    script = Path(__file__).parent / "punisher.py"
    result = subprocess.run(
        [sys.executable, str(script), str(output), "--config", str(config), "--minutes", "3",
         "--every", "25", "parallel.hang_timeout_s=10", "checkpoint.every_steps=20"],
        stdout=subprocess.PIPE, text=True, timeout=600,
    )  # fmt: skip
    print(result.stdout)
    found = json.loads(result.stdout)
    assert result.returncode == 0
    assert found["steps"] > 50 and found["goodput"] > 0.5
