"""Signals to `sft_fast train` itself, as schedulers and terminals send them."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.launcher import CONFIG, write_rows
from sft_fast.runtime.manifest import find_damage
from sft_fast.runtime.signals import SIGNALS, SignalPipe

ROOT = Path(__file__).parents[2]
# The second save lasts; its rank says so.
SLOW_SAVE = """
import time
from sft_fast.megatron.checkpoint import save
write, calls = save.write_snapshot, []
def write_snapshot(*args):
    calls.append(1)
    if len(calls) == 2:
        print("slow save", flush=True)
        time.sleep(4)
    write(*args)
save.write_snapshot = write_snapshot
"""


class Command:
    """`sft_fast train` in a session of its own."""

    def __init__(self, folder: Path, *arguments: str, **options: Any) -> None:
        write_rows(folder / "rows.jsonl")
        self.output, self.log = folder / "run", folder / "log"
        values = {"output": self.output, "rows": folder / "rows.jsonl", "cache": folder / "cache"}
        config = folder / "run.yaml"
        config.write_text(CONFIG.format(steps=100000, **values))
        command = [sys.executable, "-m", "sft_fast", "train", str(config), *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        file = self.log.open("w")
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, start_new_session=True, **streams | options
        )

    def wait_until(self, is_so: Callable[[], bool], timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < deadline and self.process.poll() is None, self.said()
            time.sleep(0.1)

    def step(self) -> int:
        path = self.output / "status.json"
        return json.loads(path.read_text()).get("step", 0) if path.exists() else 0

    def said(self) -> str:
        return self.log.read_text()

    def check_left(self, number: signal.Signals) -> None:
        """It saved, and says that it was told to leave."""
        assert self.process.wait(40) == 128 + number, self.said()
        status = json.loads((self.output / "status.json").read_text())
        assert status["state"] == "preempted", self.said()
        assert not (self.output / "error.json").exists()
        newest = sorted((self.output / "checkpoints").glob("step_*"))[-1]
        assert not find_damage(newest)
        assert int(newest.name[5:]) == status["step"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    commands: list[Command] = []

    def start(*arguments: str, **options: Any) -> Command:
        commands.append(Command(tmp_path, *arguments, **options))
        return commands[-1]

    yield start
    for command in commands:
        command.process.kill()
        command.process.wait()


def hear_hangups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.fault("F30")
def test_sigusr1_to_the_group_of_the_launcher_waits_for_a_slow_save(
    start: Callable[..., Command], tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(SLOW_SAVE)
    command = start("plugins=[slow.py]", "checkpoint.keep_last=9", "--nproc-per-node", "2")
    command.wait_until(lambda: "slow save" in command.said())
    for _ in range(4):
        os.killpg(command.process.pid, signal.SIGUSR1)
        time.sleep(0.3)
    command.check_left(signal.SIGUSR1)
    assert command.step() >= 2


@pytest.mark.fault("F30")
def test_a_terminal_that_is_closed_saves_and_leaves(start: Callable[..., Command]) -> None:
    # In a session of its own, the first terminal that is opened becomes its terminal.
    ours, theirs = pty.openpty()
    name = os.ttyname(theirs)

    def take_terminal() -> None:
        hear_hangups()
        terminal = os.open(name, os.O_RDWR)
        for stream in range(3):
            os.dup2(terminal, stream)

    streams = {"stdin": None, "stdout": None, "stderr": None}
    command = start(preexec_fn=take_terminal, **streams)
    os.close(theirs)
    said = b""

    def reaches_step_two() -> bool:
        nonlocal said
        # Whoever does not read would make it wait.
        while select.select([ours], [], [], 0)[0]:
            said += os.read(ours, 4096)
        return command.step() > 1

    command.wait_until(reaches_step_two)
    os.close(ours)
    command.check_left(signal.SIGHUP)


@pytest.mark.slow
@pytest.mark.fault("F30")
def test_nohup_goes_on_when_the_terminal_is_closed(start: Callable[..., Command]) -> None:
    command = start(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    command.wait_until(lambda: command.step() > 1)
    os.killpg(command.process.pid, signal.SIGHUP)
    step = command.step()
    command.wait_until(lambda: command.step() > step + 5)
    (command.output / "STOP").touch()
    assert command.process.wait(40) == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_reaches_the_watchdog(number: signal.Signals) -> None:
    pipe = SignalPipe()
    try:
        os.kill(os.getpid(), number)
        assert pipe.wait(5.0) == bytes([number])
    finally:
        pipe.close()


def test_a_hangup_that_nohup_ignores_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    pipe = SignalPipe()
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        assert pipe.wait(0.1) == b""
    finally:
        pipe.close()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGHUP, before)
