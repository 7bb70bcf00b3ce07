"""Other users, full disks, closed streams, killed helpers: what is said, and what is left."""

import errno
import json
import os
import re
import resource
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sft_fast.data.store import DataReport, StoreWriter
from sft_fast.runtime import manifest
from sft_fast.runtime.manifest import explain
from sft_fast.runtime.processes import raise_file_limit
from sft_fast.runtime.watchdog import Watchdog
from sft_fast.runtime.workplaces import make_workplace, own_space

ROOT = Path(__file__).parents[2]


@pytest.mark.fault("F39")
def test_a_prepared_store_can_be_read_by_others(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with StoreWriter(tmp_path / "store") as writer:
            writer.add(np.arange(3, dtype=np.uint32), np.ones(3, bool), "a", 1)
            store = writer.commit("f", {}, DataReport(samples=1))
    finally:
        os.umask(before)
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in store.path.iterdir()} == {0o640}


@pytest.mark.fault("F39")
def test_a_full_disk_is_named_with_a_path_and_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, store = open("/dev/full", "wb", buffering=0), StoreWriter(tmp_path / "store")  # noqa: SIM115
    with full, pytest.raises(OSError, match="No space left") as caught, store as writer:
        writer._token_file = full  # type: ignore[assignment]
        writer.add(np.arange(3, dtype=np.uint32), np.ones(3, bool), "a", 1)
        writer.commit("f", {}, DataReport(samples=1))
    assert str(tmp_path) in str(caught.value.filename)
    assert not list(tmp_path.iterdir())
    text = explain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "x")))
    assert re.search(rf"No space left on device: {tmp_path}/x \([\d,]+ bytes free\)", text)
    none_left = os.statvfs_result((4096, 4096, 9, 9, 9, 100, 0, 0, 0, 255))
    monkeypatch.setattr(manifest.os, "statvfs", lambda _: none_left)
    assert manifest.room_in(tmp_path) == "36,864 bytes free, but no more files"


@pytest.mark.fault("F39")
def test_a_silent_machine_is_blamed_and_not_who_notices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    watchdog = Watchdog(tmp_path, 60.0)
    watchdog.files.publish_every_s = 0.3
    watchdog.start()
    try:
        for rank, age_s in ((1, 0), (2, 9), (3, 9)):
            path = watchdog.files.path_of(rank)
            peer = {"rank": rank, "host": "node2", "phase": "train", "state": "running"}
            path.write_text(json.dumps(peer))
            then = time.time() - age_s + 60 * (age_s == 0)
            os.utime(path, (then, then))
        watchdog.fail_with(RuntimeError("[gloo] Connection closed by peer [10.0.0.2]:1234"))
        error = json.loads((tmp_path / "error.json").read_text())
        assert (error["rank"], error["host"], error["reported_by"]) == (2, "node2", 0)
        assert error["cause"].startswith("ranks [2, 3] on node2 give no sign of life; rank 0 lost")
    finally:
        watchdog.close("failed")


@pytest.mark.fault("F42")
def test_a_machine_that_is_lost_in_a_save_ends_the_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    watchdog = Watchdog(tmp_path, 60.0)
    watchdog.files.open()
    left: list[tuple[object, ...]] = []
    monkeypatch.setattr(watchdog, "leave", lambda *how: left.append(how))
    clock, peer = [0.0], watchdog.files.path_of(1)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)

    def look(age_s: float) -> bool:
        clock[0] += 2.0
        watchdog.files.publish("running")
        peer.write_text(json.dumps({"rank": 1, "host": "node2", "state": "running"}))
        os.utime(peer, (time.time() - age_s,) * 2)
        watchdog.look_for_lost_machine()
        return bool(left)

    watchdog.files.phase = "train"
    assert not any(look(age_s) for age_s in range(0, 80, 2)), "a collective would tell"
    watchdog.files.phase = "save"
    assert not any(look(1) for _ in range(50)), "it lives, and the save is slow"
    assert not look(900) and not look(1), "all were suspended; this one woke up first"
    ages = [age_s for age_s in range(0, 80, 2) if not look(age_s)]
    assert 20 <= ages[-1] <= 24
    error = json.loads((tmp_path / "error.json").read_text())
    assert (error["rank"], error["host"], error["reported_by"]) == (1, "node2", 0)
    assert error["cause"].startswith("ranks [1] on node2 give no sign of life; a save waited")
    assert "resume from step_00000004" in error["cause"] and left[0][:2] == ("failed", 1)


@pytest.mark.fault("F39")
def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    dead = tmp_path / f".export-{own_space()}-{2**22 - 1}-abc"
    other = tmp_path / ".export-elsewhere-1-abc"
    for path in (dead, other):
        path.mkdir()
    mine = make_workplace(tmp_path, "export")
    assert not dead.exists() and other.exists() and mine.exists()
    make_workplace(tmp_path, "export")
    assert mine.exists(), "its process lives"
    os.utime(other, (0, 0))
    make_workplace(tmp_path, "export")
    assert not other.exists()


@pytest.mark.fault("F39")
@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_command_with_a_closed_stream_works(tmp_path: Path, closed: str) -> None:
    """The next file that is opened would get the number of the stream."""
    code = (
        "import os, sys\n"
        f"os.close({1 if closed == 'stdout' else 2})\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'sft_fast', 'ls'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert ("demo" in result.stdout) == (closed == "stderr") and not result.stderr


@pytest.mark.fault("F39")
def test_the_command_of_a_rank_works_without_docstrings(tmp_path: Path) -> None:
    command = [sys.executable, "-OO", str(ROOT / "sft_fast/train.py"), "seed=x"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "seed" in result.stderr, result.stderr


def test_as_many_files_as_allowed_can_be_opened() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
