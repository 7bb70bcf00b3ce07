"""Lost ranks that are replaced at once: `parallel.warm_restarts`."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from faults.launcher import Job, Launcher, same_weights
from sft_fast.exit_codes import FAILED, HANG, USER_ERROR
from sft_fast.runtime.processes import is_alive
from sft_fast.runtime.warm_restart import Keeper, Outcome, open_store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def unbroken(launcher: Launcher) -> Path:
    """A run of two ranks that nothing happened to."""
    return launcher.run("two-unbroken", ranks=2).output


def launches(job: Job) -> int:
    lines = map(json.loads, (job.output / "metrics.jsonl").read_text().splitlines())
    return sum(line["kind"] == "launch" for line in lines)


@pytest.mark.fault("F41")
@pytest.mark.parametrize(
    ("hook", "how"),
    [
        ("die_in_step:3", "was ended by SIGKILL"),
        pytest.param("fail_in_step:3", "ended with exit code 1", marks=pytest.mark.slow),
        pytest.param("hang_in_step:3", "ended with exit code 75", marks=pytest.mark.slow),
        pytest.param("stop_in_step:3", "ended with exit code 75", marks=pytest.mark.slow),
    ],
)
def test_lost_ranks_are_replaced_and_the_weights_are_those_of_an_unbroken_run(
    launcher: Launcher, unbroken: Path, hook: str, how: str
) -> None:
    # Each start makes two steps, so that the third reaches the last one.
    options = ("parallel.warm_restarts=2", "parallel.hang_timeout_s=2")
    job = launcher.run(f"warm-{hook[:4]}", *options, ranks=2, hook=["", hook])
    assert same_weights(unbroken, job.output)
    said = job.said()
    for restart, step in ((1, 2), (2, 4)):
        assert f"{how}: all ranks start again" in said and f"(warm restart {restart} of 2)" in said
        assert f"at step {step} of 6" in said
    assert launches(job) == 3
    assert job.json("status.json")["state"] == "finished"
    assert not (job.output / "error.json").exists()


@pytest.mark.fault("F41")
def test_one_failure_too_many_ends_the_run_as_without_warm_restarts(launcher: Launcher) -> None:
    job = launcher.start(
        "warm-often", "parallel.warm_restarts=1", ranks=2, hook=["", "die_in_step:2"]
    )
    assert job.wait() == [1, -signal.SIGKILL], job.said()
    error = job.json("error.json")
    assert error["rank"] == 1 and "is gone: killed, or crashed" in error["cause"]
    assert job.json("status.json")["state"] == "failed"
    assert launches(job) == 2


@pytest.mark.fault("F41")
def test_a_signal_reaches_the_rank_and_a_lost_keeper_takes_it_along(launcher: Launcher) -> None:
    options = ("train.steps=5000", "parallel.warm_restarts=3", "metrics.log_every_steps=1")
    job = launcher.start("warm-told", *options)
    job.wait_until("step 2/")
    job.signal(signal.SIGTERM)
    assert job.wait(25) == [0], job.said()
    assert job.json("status.json")["state"] == "preempted" and launches(job) == 1

    job = launcher.start("warm-told", *options)
    job.wait_until("resumed from")
    (rank,) = psutil.Process(job.ranks[0].pid).children()
    job.kill()
    rank.wait(5)


KEEPER = """
import os, signal, sys, time
from sft_fast.runtime import warm_restart
from sft_fast.runtime.signals import SignalPipe

class Store(dict):
    def check(self, keys): return all(key in self for key in keys)
    def compare_set(self, key, _, value): self.setdefault(key, value)
    def add(self, key, n): self[key] = (self[key] if key in self else 0) + n; return self[key]
    def multi_get(self, keys): return [self[key] for key in keys]
    set, get = dict.__setitem__, dict.__getitem__

class Impatient(warm_restart.Keeper):
    def report(self, restart):
        os.kill(os.getpid(), signal.SIGUSR1)

if (code := Impatient(Store(), 5).run()) is not None:
    sys.exit(code)
name = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
print(name, os.environ["SFT_FAST_LAUNCHER_PID"], flush=True)
if name == "0":
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
    time.sleep(0.2)
    os._exit(1)
print(SignalPipe().wait(5.0)[0], flush=True)
"""


@pytest.mark.fault("F41")
def test_a_signal_between_two_ranks_reaches_the_next_and_orphans_are_ended() -> None:
    done = subprocess.run(
        [sys.executable, "-c", KEEPER],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    first, orphan, second, heard = done.stdout.splitlines()
    us = os.getpid()
    assert (first, second) == (f"0 {us}", f"0.1 {us}"), "both belong to one launcher"
    assert int(heard) == signal.SIGUSR1
    assert not is_alive(int(orphan))


def outcomes(*codes: int, told: bool = False) -> list[Outcome]:
    return [Outcome(rank, code, told and rank == 0) for rank, code in enumerate(codes)]


@pytest.mark.parametrize(
    ("ended", "restarts"),
    [
        (outcomes(0, 0), False),
        (outcomes(0, -9), True),
        (outcomes(FAILED, -9), True),
        (outcomes(HANG, FAILED), True),
        (outcomes(USER_ERROR, -9), False),
        (outcomes(0, -9, told=True), False),
        (outcomes(-9), False),
    ],
)
def test_what_another_start_may_mend(
    monkeypatch: pytest.MonkeyPatch, ended: list[Outcome], restarts: bool
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Keeper(None, 3).may_restart(ended) == restarts  # type: ignore[arg-type]


def test_keepers_need_a_store_that_outlives_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(ValueError, match="parallel.warm_restarts needs the store of torchrun"):
        open_store()
