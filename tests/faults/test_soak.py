"""Many saves, and faults without end."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from faults import soak
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
def test_a_run_that_is_broken_all_the_time_gets_on(launcher: Launcher) -> None:
    output = launcher.folder / "broken"
    config = launcher.config("broken", steps=100000)
    script = Path(__file__).parent / "soak.py"
    faults = "kill,raise,nan,tracker,full disk,damage and kill,lock,metrics,SIGTERM,store"
    result = subprocess.run(
        [sys.executable, str(script), str(output), "--config", str(config), "--minutes", "0.8",
         "--first", "1", "--every", "4", "--faults", faults, "--seed", "3",
         "checkpoint.every_steps=20"],
        stdout=subprocess.PIPE, text=True, timeout=600,
    )  # fmt: skip
    print(result.stdout)
    found = json.loads(result.stdout)
    assert result.returncode == 0
    assert found["goodput"] > 0 and len(found["faults"]) > 1


def test_steps_that_are_made_again_are_no_goodput(tmp_path: Path) -> None:
    def line(step: int, time: float) -> str:
        return json.dumps({"kind": "step", "step": step, "time": time, "elapsed_s": 1.0}) + "\n"

    path = tmp_path / "metrics.jsonl"
    lines = [line(1, 11.0), line(2, 12.0), line(3, 13.0), "half a li\n", line(2, 22.0)]
    path.write_text("".join(lines))
    kept, again = soak.steps_of(path)
    assert kept == [(10.0, 11.0), (21.0, 22.0)]
    assert again == [(11.0, 12.0), (12.0, 13.0)]
    # Of 20 s, two were kept before the fault at 14 and after; 3 s before the first fault passed
    # without a step, and two steps before it were undone by it.
    found = soak.lost([(14.0, "kill")], kept, again, 8.0, 28.0)
    assert found == {"start": 3.0, "kill": 14.0 - 1.0 + 2.0}
