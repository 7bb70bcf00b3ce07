"""One rank of a node works, the others wait: progress, failures of every kind, a killed worker."""

import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from sft_fast.runtime.processes import process_space, start_of

KEY = "sft_fast/0/the store/0"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """The store of a process group whose rank 0 this process is."""
    shared = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: shared)
    for name in ("LOCAL_RANK", "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.setenv(name, "0")
    return shared


class Waiter(threading.Thread):
    """Another rank of the node."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__(daemon=True)
        self.store, self.error, self.found = store, None, None
        self.start()

    def run(self) -> None:
        from sft_fast.megatron.parallel import wait_for_node

        try:
            self.found = wait_for_node(self.store, KEY, "the store")
        except ValueError as error:
            self.error = str(error)

    def outcome(self) -> str | None:
        """None, or the error."""
        self.join(60)
        assert not self.is_alive()
        return self.error


def work_as_rank_0(work: Callable[[Any], Path], said: list[str]) -> Path:
    from sft_fast.megatron.parallel import once_per_node

    return once_per_node("the store", work, said.append)


@pytest.mark.fault("F26")
def test_waiting_ranks_log_how_far_it_is(
    store: dist.Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    waiters = [Waiter(store) for _ in range(2)]
    said: list[str] = []

    def work(report: Callable[[str], None]) -> Path:
        for text in ("100 of about 300 rows", "200 of about 300 rows"):
            report(text)
            line = f"waiting for the store: {text}"
            while caplog.messages.count(line) < len(waiters):
                assert all(waiter.is_alive() for waiter in waiters)
        return Path("/some where/store")

    assert work_as_rank_0(work, said) == Path("/some where/store")
    assert [waiter.outcome() for waiter in waiters] == [None, None]
    assert [waiter.found for waiter in waiters] == [Path("/some where/store")] * 2
    assert said == ["100 of about 300 rows", "200 of about 300 rows"]
    lines = [text for text in caplog.messages if text.startswith("waiting for ")]
    assert len(lines) == 4, "a line that did not change is logged once"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("row 7 is bad"), "row 7 is bad"),
        (OSError("disk full"), "disk full"),
        (RuntimeError("a process died"), "the store: RuntimeError('a process died')"),
        (KeyboardInterrupt(), "the store: KeyboardInterrupt()"),
        (SystemExit(3), "the store: SystemExit(3)"),
    ],
)
def test_a_failure_of_any_kind_reaches_the_others(
    store: dist.Store, error: BaseException, expected: str
) -> None:
    waiter = Waiter(store)

    def work(report: object) -> Path:
        raise error

    with pytest.raises(type(error)):
        work_as_rank_0(work, [])
    assert waiter.outcome() == expected


@pytest.mark.fault("F26")
def test_a_killed_worker_is_noticed(store: dist.Store) -> None:
    worker = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = start_of(worker.pid)
    store.set(f"{KEY}/worker", f"{worker.pid} {started} {process_space()}")
    waiter = Waiter(store)
    waiter.join(0.2)
    assert waiter.is_alive()
    # It stays a zombie until someone asks how it ended, as a child of torchrun may.
    worker.kill()
    assert f"the store: process {worker.pid}, which prepares it" in str(waiter.outcome())
    worker.wait()
    assert "has ended without a word" in str(Waiter(store).outcome())


def test_a_worker_that_is_out_of_sight_is_not_given_up(store: dist.Store) -> None:
    store.set(f"{KEY}/worker", "1 0.0 another-namespace")
    waiter = Waiter(store)
    waiter.join(0.3)
    assert waiter.is_alive()
    store.set(KEY, "done /store")
    assert waiter.outcome() is None
