"""Processes that die, hang or are told to go, at any moment."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from faults.launcher import Launcher, same_weights, step_losses
from sft_fast.runtime import hang
from sft_fast.runtime.hang import HangDetector
from sft_fast.runtime.launch_files import LaunchFiles
from sft_fast.runtime.watchdog import Watchdog

ROOT = Path(__file__).parents[2]
STEPS = 6
# Long enough to be killed several times.
KILLED_STEPS = 30


@pytest.fixture(scope="module")
def unbroken(launcher: Launcher) -> Path:
    """A run that nothing happened to."""
    return launcher.run("unbroken", steps=STEPS).output


@pytest.fixture(scope="module")
def long_unbroken(launcher: Launcher) -> Path:
    return launcher.run("long-unbroken", steps=KILLED_STEPS).output


def whole_checkpoints(run: Path) -> list[int]:
    from sft_fast.runtime.manifest import find_damage

    folders = sorted((run / "checkpoints").glob("step_*"))
    assert not [damage for folder in folders for damage in find_damage(folder)]
    return [int(folder.name[5:]) for folder in folders]


def kill_until_done(launcher: Launcher, name: str, seed: int, most: int) -> int:
    """Kills a run at random moments, starting it again each time; returns the number of kills."""
    rng, kills, seconds = random.Random(seed), 0, 0.6
    done: list[int] = []
    while True:
        job = launcher.start(name, steps=KILLED_STEPS)
        if kills < most:
            time.sleep(rng.uniform(0.05, seconds))
        else:
            job.wait()
        if not job.ranks[0].is_alive():
            assert job.wait() == [0], job.said()
            assert "is damaged" not in job.said()
            return kills
        job.kill()
        kills += 1
        after = whole_checkpoints(job.output)
        assert len(after) <= 3 and (not done or after[-1] >= done[-1])
        done = after


@pytest.mark.fault("F1")
@pytest.mark.parametrize("least", [50, pytest.param(200, marks=pytest.mark.slow)])
def test_runs_killed_at_random_moments_end_with_the_same_weights(
    launcher: Launcher, long_unbroken: Path, least: int
) -> None:
    kills = seed = 0
    while kills < least:
        name = f"killed-{least}-{seed}"
        kills += kill_until_done(launcher, name, seed, most=min(25, least - kills))
        assert same_weights(long_unbroken, launcher.folder / name)
        losses = step_losses(launcher.folder / name)
        assert step_losses(long_unbroken).items() <= losses.items()
        seed += 1
    print(f"{kills} kills, {seed} runs")


def slow_but(fast: set[str], *values: str) -> list[Any]:
    """Parameters, of which CI runs only some."""
    return [v if v in fast else pytest.param(v, marks=pytest.mark.slow) for v in values]


POINTS = ("directory", "shards", "fsync", "manifest", "rename", "sync", "prune", "delete")


@pytest.mark.fault("F2")
@pytest.mark.parametrize("point", slow_but({"shards", "rename", "delete"}, *POINTS))
def test_a_kill_inside_a_save_leaves_whole_checkpoints(
    launcher: Launcher, unbroken: Path, point: str
) -> None:
    job = launcher.start(f"at-{point}", hook=f"kill_at:{point}")
    assert job.wait() == [-signal.SIGKILL], job.said()
    found = whole_checkpoints(job.output)
    assert found in ([1], [1, 2]) or (point == "delete" and found == [2, 3])
    again = launcher.run(f"at-{point}")
    assert f"at step {found[-1]} of {STEPS}" in again.said()
    assert same_weights(unbroken, again.output)
    assert not list((again.output / "checkpoints").glob(".*")), "leftovers are removed"


@pytest.mark.fault("F6")
@pytest.mark.parametrize(
    ("hook", "codes", "cause"),
    [
        ("fail_in_step:3", (1, 1), "the device gave up"),
        ("die_in_step:3", (1, -signal.SIGKILL), "process {pid} of rank 1 is gone"),
    ],
)
def test_all_ranks_follow_the_first_failure(
    launcher: Launcher, hook: str, codes: tuple[int, int], cause: str
) -> None:
    name = hook.partition(":")[0]
    job = launcher.start(name, ranks=2, hook=["", hook])
    job.ranks[1].join(60)
    failed = time.monotonic()
    assert tuple(job.wait(30)) == codes, job.said()
    assert time.monotonic() - failed < 5
    error = job.json("error.json")
    # The phase of a killed rank is what it last said, at most two seconds ago.
    assert (error["rank"], error["step"]) == (1, 2) and error["phase"] in ("train", "save")
    assert cause.format(pid=job.ranks[1].pid) in error["cause"]
    status = job.json("status.json")
    assert (status["state"], status["cause"]) == ("failed", error["cause"])
    assert whole_checkpoints(job.output) == [1, 2], "nobody tries to save"


@pytest.mark.fault("F6")
@pytest.mark.parametrize("is_first", [True, False])
def test_nothing_says_running_after_a_failure(tmp_path: Path, is_first: bool) -> None:
    watchdog = Watchdog(tmp_path, 60.0)
    watchdog.files.open()
    if not is_first:
        announced = {"rank": 1, "cause": "the device gave up"}
        watchdog.files.announce("failed", announced)
        watchdog.files.write_status("failed", cause="the device gave up")
        watchdog.publish()
    watchdog.fail("the device gave up")
    watchdog.next_publish = 0.0
    watchdog.publish()
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["cause"]) == ("failed", "the device gave up")


@pytest.mark.fault("F9")
def test_what_breaks_because_a_rank_leaves_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watchdog = Watchdog(tmp_path, 60.0)
    watchdog.files.open()

    def end_children() -> None:
        watchdog.fail_with(ValueError("a process that prepares the data was killed"))

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("sft_fast.runtime.watchdog.end_children", end_children)
    monkeypatch.setattr(os, "_exit", leave)
    watchdog.request_stop("SIGTERM")
    with pytest.raises(SystemExit) as caught:
        watchdog.handle_signals()
    assert caught.value.code == 0
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "preempted"
    assert not (tmp_path / "error.json").exists()


@pytest.mark.fault("F28")
def test_out_of_memory_says_where_and_what_to_change(launcher: Launcher) -> None:
    job = launcher.start("no-memory", hook="no_memory:2")
    assert job.wait() == [1]
    error = job.json("error.json")
    assert error["phase"] == "train" and error["step"] == 1
    for part in ("OutOfMemoryError", "20.00 MiB", "train.micro_batch_size", "model.recompute"):
        assert part in error["cause"]


@pytest.mark.fault("F7")
@pytest.mark.parametrize(
    ("hook", "suspects"),
    [
        ("hang_in_step:3", "all ranks wait after step 2"),
        pytest.param(
            "stop_in_step:3",
            "ranks that are stopped by a signal: [1]",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_hang_is_found_and_every_rank_shows_its_stack(
    launcher: Launcher, hook: str, suspects: str
) -> None:
    name = hook.partition(":")[0]
    # Without saves rank 0 is in the next step at once, however slow the disk is.
    options = ("parallel.hang_timeout_s=1.5", "checkpoint.every_steps=null")
    job = launcher.start(name, *options, ranks=2, hook=["", hook])
    job.wait_until("step 2/6")
    job.ranks[0].join(30)
    assert job.ranks[0].exitcode == 75, job.said()
    job.signal(signal.SIGKILL, rank=1)
    error = job.json("error.json")
    assert "no step ended for" in error["cause"] and suspects in error["cause"]
    stacks = {path.stem: path.read_text() for path in (job.output / "stacks").iterdir()}
    assert "train_step" in stacks["rank_00000"]
    if hook.startswith("hang"):
        assert "hooks.py" in stacks["rank_00001"]
    launcher.run(name, ranks=2)


@pytest.mark.fault("F7")
@pytest.mark.parametrize("phase", ["loading", "exporting"])
def test_a_hang_while_weights_are_read_or_written_is_found(launcher: Launcher, phase: str) -> None:
    job = launcher.start(f"hang-{phase}", hook=f"hang_while:{phase}")
    job.ranks[0].join(30)
    assert job.ranks[0].exitcode == 75, job.said()
    error = job.json("error.json")
    assert "no tensor was read or written for" in error["cause"]
    assert error["phase"] == {"loading": "model", "exporting": "write weights"}[phase]
    assert "hooks.py" in (job.output / "stacks/rank_00000.txt").read_text()
    assert not (job.output / "export").exists()


def test_a_rank_that_waits_for_one_that_still_loads_is_not_hung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    files, clock = [], [0.0]
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        files.append(LaunchFiles(tmp_path))
        files[rank].open()
    monkeypatch.setattr(hang.time, "monotonic", lambda: clock[0])
    mine, other = (HangDetector(one, hang_timeout_s=10.0) for one in files)
    for detector in (mine, other):
        detector.begin_phase(is_loading=True)
        detector.tensor_done()
    for _ in range(9):  # 720 s, of which this rank does nothing
        clock[0] += 80
        other.tensor_done()
        files[1].publish("running")
        assert mine.find_hang() is None
    files[0].publish("running")
    assert other.find_hang() is None
    found = []
    for _ in range(9):
        clock[0] += 80
        found.append((mine.find_hang(), other.find_hang()))
    for detector, texts in zip((mine, other), zip(*found, strict=True), strict=True):
        assert "no tensor was read or written for" in next(text for text in texts if text)
        assert detector.suspects() == "ranks that are behind: [0]"
    mine.begin_phase()
    clock[0] += 1e6
    assert mine.find_hang() is None, "other phases have no limit"


@pytest.mark.fault("F37")
@pytest.mark.parametrize("is_loading", [False, True])
def test_suspended_time_is_no_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_loading: bool
) -> None:
    clock = [0.0]
    monkeypatch.setattr(hang.time, "monotonic", lambda: clock[0])
    detector = HangDetector(LaunchFiles(tmp_path), hang_timeout_s=10.0)

    def run(seconds: int) -> str | None:
        for _ in range(seconds):
            clock[0] += 1
            detector.tick()
            if (found := detector.find_hang()) is not None:
                return found
        return None

    detector.begin_phase(is_loading)
    for _ in range(2):
        detector.tensor_done()
        detector.heartbeat()
        assert run(5) is None
    for _ in range(3):
        clock[0] += 1e5
        detector.tick()
        assert detector.find_hang() is None
    clock[0] += 1e5
    detector.heartbeat()  # the main thread may be the first to wake up
    detector.tensor_done()
    assert detector.slowest_s <= 15
    assert run(5) is None and "for " in (run(300) or "")


def restart(launcher: Launcher, name: str, times: int) -> None:
    """Kills a rank and starts all again with the same store, as torchrun does, and again."""
    rng = random.Random(5)
    for attempt in range(times):
        rank = rng.randrange(2)
        hook = ["", ""]
        hook[rank] = f"die_in_step:{rng.randrange(1, 3)}"
        job = launcher.start(
            name, "train.steps=1000", ranks=2, hook=hook, attempt=attempt, job="elastic"
        )
        codes = job.wait()
        assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1, (attempt, job.said())
        assert job.json("error.json")["rank"] == rank
    job = launcher.start(name, ranks=2, attempt=times, job="elastic", steps=1000)
    job.wait_until("resumed from")
    job.signal(signal.SIGTERM)
    assert job.wait() == [0, 0]


@pytest.mark.fault("F8")
def test_restarted_ranks_find_each_other(launcher: Launcher) -> None:
    restart(launcher, "elastic", 2)


@pytest.mark.slow
@pytest.mark.fault("F37")
def test_a_suspended_job_goes_on(launcher: Launcher, unbroken: Path) -> None:
    # Longer than the slow step takes awake, shorter than it takes suspended.
    job = launcher.start("suspended", "parallel.hang_timeout_s=6", steps=STEPS, hook="slow:step")
    job.wait_until("slow step")
    job.signal(signal.SIGSTOP)
    time.sleep(10)
    job.signal(signal.SIGCONT)
    assert job.wait() == [0], job.said()
    assert same_weights(unbroken, job.output)


@pytest.mark.slow
@pytest.mark.fault("F8")
def test_fifty_restarts(launcher: Launcher) -> None:
    restart(launcher, "elastic50", 50)


PHASES = ("start", "data", "model", "first step", "step", "evaluate", "save", "export")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def leave_in(launcher: Launcher, unbroken: Path, phase: str, number: int, name: str) -> None:
    name = f"{name}-{phase}-{number}".replace(" ", "-")
    options = ("data.eval_overlap=allow", f"data.eval={launcher.rows}", "evaluation.max_samples=8")
    job = launcher.start(name, *options, hook=f"slow:{phase}")
    job.wait_until(f"slow {phase}")
    asked = time.monotonic()
    job.signal(number)
    assert job.wait(25) == [0], job.said()
    assert time.monotonic() - asked < 25
    assert job.json("status.json")["state"] == "preempted"
    assert not (job.output / "error.json").exists()
    done = whole_checkpoints(job.output)
    assert (done[-1] if done else 0) >= {"step": 3, "save": 2, "export": STEPS}.get(phase, 0)
    again = launcher.run(name, *options)
    assert again.json("status.json")["state"] == "finished"
    assert same_weights(unbroken, again.output)


@pytest.mark.fault("F9")
@pytest.mark.parametrize("phase", slow_but({"data", "step", "export"}, *PHASES))
def test_a_signal_saves_and_leaves(launcher: Launcher, unbroken: Path, phase: str) -> None:
    leave_in(launcher, unbroken, phase, SIGNALS[PHASES.index(phase) % 3], "left")


@pytest.mark.slow
@pytest.mark.fault("F9")
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_in_every_phase(
    launcher: Launcher, unbroken: Path, phase: str, number: int
) -> None:
    leave_in(launcher, unbroken, phase, number, "each")


@pytest.mark.fault("F9")
def test_a_signal_to_one_rank_stops_all_and_a_second_interrupt_leaves_at_once(
    launcher: Launcher,
) -> None:
    job = launcher.start("one-rank", "train.steps=1000", ranks=2)
    job.wait_until("step 2/")
    job.signal(signal.SIGTERM, rank=1)
    assert job.wait(25) == [0, 0], job.said()
    assert job.json("status.json")["state"] == "preempted"

    job = launcher.start("impatient", hook="slow:step")
    job.wait_until("slow step")
    job.signal(signal.SIGINT)
    time.sleep(0.8)
    job.signal(signal.SIGINT)
    assert job.wait(2) == [130], job.said()


@pytest.mark.fault("F9")
def test_trigger_files_save_and_stop(launcher: Launcher) -> None:
    job = launcher.start("triggers", "train.steps=5000", "checkpoint.every_steps=5000")
    job.wait_until("step 2/")
    (job.output / "SAVE").touch()
    deadline = time.monotonic() + 30
    while not list((job.output / "checkpoints").glob("step_*")):
        assert time.monotonic() < deadline, job.said()
        time.sleep(0.02)
    assert job.ranks[0].is_alive()
    (job.output / "STOP").touch()
    assert job.wait(30) == [0], job.said()
    assert len(whole_checkpoints(job.output)) == 2
    assert not (job.output / "SAVE").exists() and not (job.output / "STOP").exists()


@pytest.mark.fault("F10")
def test_a_signal_waits_for_a_save_in_the_background(launcher: Launcher, unbroken: Path) -> None:
    options = ("checkpoint.asynchronous=true", "checkpoint.every_steps=2")
    job = launcher.start("background", *options, hook="slow:save")
    job.wait_until("slow save")
    job.signal(signal.SIGTERM)
    assert job.wait(25) == [0], job.said()
    assert whole_checkpoints(job.output)
    assert same_weights(unbroken, launcher.run("background", *options).output)


ORPHAN = """
import os, signal, sys, time
from pathlib import Path
from sft_fast.runtime.watchdog import watching
from sft_fast.runtime.processes import die_with_parent
child = os.fork()
if child:
    print(child, flush=True)
    time.sleep(60)
die_with_parent(signal.SIGTERM)
with watching(Path(sys.argv[1]), 60.0) as phases:
    phases.enter("train")  # in a collective that never ends
    print("ready", flush=True)
    while True:
        time.sleep(60)
"""


@pytest.mark.fault("F11")
def test_a_rank_whose_launcher_was_killed_is_gone(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert parent.stdout.readline() == b"ready\n"
    parent.kill()
    parent.wait()
    child.wait(5)
    assert json.loads((tmp_path / "error.json").read_text())["phase"] == "train"


def torchrun(launcher: Launcher, name: str, *options: str) -> "subprocess.Popen[str]":
    path = launcher.config(name, steps=100000)
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         *options, str(ROOT / "sft_fast/train.py"), "--config", str(path),
         "metrics.log_every_steps=1000"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def status_of(run: Path, timeout_s: float = 120.0) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        path = run / "status.json"
        if path.exists() and json.loads(path.read_text()).get("step", 0) > 1:
            return json.loads(path.read_text())
        time.sleep(0.2)
    raise TimeoutError(run)


@pytest.mark.slow
@pytest.mark.fault("F11")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_torchrun_leaves_no_orphans(launcher: Launcher, number: int) -> None:
    name = f"torchrun{number}"
    shutil.rmtree(launcher.folder / name, ignore_errors=True)
    agent = torchrun(launcher, name)
    status_of(launcher.folder / name)
    processes = psutil.Process(agent.pid).children(recursive=True)
    agent.send_signal(number)
    agent.wait(40)
    gone, alive = psutil.wait_procs(processes, 5)
    assert not alive
    assert json.loads((launcher.folder / name / "status.json").read_text())["state"] in (
        "preempted",
        "failed",
    )
    whole_checkpoints(launcher.folder / name)


@pytest.mark.slow
@pytest.mark.fault("F8")
def test_torchrun_restarts_a_killed_rank(launcher: Launcher) -> None:
    agent = torchrun(launcher, "restarted", "--max-restarts", "3")
    for _ in range(3):
        status = status_of(launcher.folder / "restarted")
        ranks = psutil.Process(agent.pid).children()
        ranks[-1].kill()
        killed = time.monotonic()
        while True:
            now = json.loads((launcher.folder / "restarted/status.json").read_text())
            if now["launch"] != status["launch"] and now.get("step", 0) > status["step"]:
                break
            assert time.monotonic() - killed < 120
            time.sleep(0.2)
        print(f"back after {time.monotonic() - killed:.1f} s")
    agent.terminate()
    agent.wait(60)
