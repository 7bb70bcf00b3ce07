"""Two jobs and one output directory."""

import errno
import json
import os
import signal
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from faults.launcher import Launcher
from sft_fast import cli
from sft_fast.runtime import launch_files
from sft_fast.runtime.launch_files import LaunchFiles, launch_name
from sft_fast.runtime.manifest import find_damage, staged_directory
from sft_fast.runtime.processes import is_gone, process_space, start_of
from sft_fast.runtime.run_directory import RUN_MARKER, check_inputs, check_output_dir
from sft_fast.runtime.run_lock import STALE_S, RunLock
from sft_fast.runtime.watchdog import watching


def foreign(folder: Path, **holder: object) -> Path:
    """The lock of another job."""
    path = folder / ".lock"
    holder = {"host": "elsewhere", "pid": 7, "process_started": 1.0, "started": "then"} | holder
    path.write_text(json.dumps({"job": "another", **holder}))
    return path


@pytest.mark.fault("F24")
def test_the_second_job_is_refused_and_the_first_goes_on(launcher: Launcher) -> None:
    first = launcher.start("shared", "train.steps=1000")
    first.wait_until("step 1/")
    second = launcher.start("shared")
    assert second.wait() == [2]
    assert f"in use by process {first.ranks[0].pid} on {socket.gethostname()}" in second.said()
    assert not (first.output / "error.json").exists()
    (first.output / "STOP").touch()
    assert first.wait() == [0]
    assert not (first.output / ".lock").exists()


@pytest.mark.fault("F24")
def test_a_lock_of_another_machine_counts_until_it_is_silent(tmp_path: Path) -> None:
    path = foreign(tmp_path)
    with pytest.raises(ValueError, match="process 7 on elsewhere since then"):
        RunLock(tmp_path, "mine")
    silent = time.time() - STALE_S - 1
    os.utime(path, (silent, silent))
    lock = RunLock(tmp_path, "mine")
    assert lock.renew()
    assert json.loads(path.read_text())["pid"] == os.getpid()
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("F24")
@pytest.mark.parametrize(
    "holder",
    [
        {"space": process_space(), "pid": 2**22 - 1},
        # The number belongs to another process now.
        {"space": process_space(), "pid": os.getpid()},
        {"job": "mine"},
    ],
)
def test_a_lock_of_a_dead_process_or_of_the_same_job_is_taken_over(
    tmp_path: Path, holder: dict[str, object]
) -> None:
    foreign(tmp_path, **holder)
    assert RunLock(tmp_path, "mine").renew()


@pytest.mark.fault("F26")
@pytest.mark.parametrize("shift_s", [-90000.0, 1.0, 90000.0])
def test_a_lock_holds_when_the_clock_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift_s: float
) -> None:
    now, booted = time.time, psutil.boot_time()
    monkeypatch.setattr(time, "time", lambda: now() + shift_s)
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: booted + shift_s)
    parent = os.getppid()
    for holder in ({}, {"space": process_space(), "pid": parent}):
        foreign(tmp_path, process_started=start_of(parent), **holder)
        with pytest.raises(ValueError, match="is in use"):
            RunLock(tmp_path, "mine")


@pytest.mark.fault("F26")
def test_a_process_is_not_taken_for_gone_when_the_clock_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pid, started = os.getpid(), start_of(os.getpid())
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: 0.0)
    assert not is_gone(pid, started, process_space())
    assert is_gone(pid, 1.0, process_space())
    assert not is_gone(pid, 1.0, "another kernel")


@pytest.mark.fault("F24")
def test_a_lock_that_was_lost_is_noticed_and_not_given_back(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, "mine")
    path = foreign(tmp_path)
    assert not lock.renew()
    lock.release()
    assert path.exists()


@pytest.mark.parametrize("text", ["", "not json", "[]"])
def test_a_damaged_lock_is_not_taken_for_free(tmp_path: Path, text: str) -> None:
    (tmp_path / ".lock").write_text(text)
    with pytest.raises(ValueError, match="is in use"):
        RunLock(tmp_path, "mine")


def test_what_kills_left_half_written_is_removed(tmp_path: Path) -> None:
    names = (".status.json.1-2", ".error.json.1-2", ".config.yaml.7", ".lock-abc")
    others = ("metrics.jsonl", ".hidden", "config.yaml", ".lock-of-now")
    long_ago = time.time() - 3600
    for name in names + others:
        (tmp_path / name).touch()
        if name != ".lock-of-now":
            os.utime(tmp_path / name, (long_ago, long_ago))
    (tmp_path / RUN_MARKER).touch()
    (tmp_path / ".launch/old").mkdir(parents=True)
    os.utime(tmp_path / ".launch/old", (long_ago, long_ago))
    with watching(tmp_path, 60.0):
        assert not [name for name in names if (tmp_path / name).exists()]
        assert all((tmp_path / name).exists() for name in others)
        assert not (tmp_path / ".launch/old").exists()


def test_an_output_directory_is_checked_without_being_made(tmp_path: Path) -> None:
    check_output_dir(tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_marker_that_another_rank_makes_meanwhile_is_no_file_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = Path.iterdir

    def late(folder: Path) -> Iterator[Path]:
        (tmp_path / RUN_MARKER).touch()
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", late)
    check_output_dir(tmp_path)


@pytest.mark.fault("F31")
@pytest.mark.parametrize(
    "name", ["config.yaml", "stacks/mine.txt", "thesis.tex", "data/rows.jsonl"]
)
def test_a_directory_of_the_user_is_left_alone(
    launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    mine = tmp_path / "mine" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    config = launcher.config("theirs")
    arguments = [str(config), f"output_dir={tmp_path / 'mine'}"]
    assert cli.main(["check", *arguments]) == 1
    assert name.split("/")[0] in capsys.readouterr().err
    assert cli.main(["train", *arguments]) == 2
    with (
        pytest.raises(ValueError, match="holds files that no run made"),
        watching(tmp_path / "mine", 60.0),
    ):
        pass
    assert [path for path in (tmp_path / "mine").rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "years of work"


@pytest.mark.fault("F31")
def test_the_root_of_the_file_system_is_no_output_directory() -> None:
    with pytest.raises(ValueError, match="output_dir: "):
        check_output_dir(Path("/"))


@pytest.mark.fault("F31")
def test_a_run_begins_beside_its_log_and_prepared_data_and_comes_back(tmp_path: Path) -> None:
    (tmp_path / "train.log").touch()
    (tmp_path / "data" / f"{1:032x}-4").mkdir(parents=True)
    for _ in range(2):
        with watching(tmp_path, 60.0):
            (tmp_path / "export").mkdir(exist_ok=True)
    assert (tmp_path / RUN_MARKER).exists()


@pytest.mark.fault("F31")
def test_a_run_does_not_replace_the_model_that_it_reads(tmp_path: Path) -> None:
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run" / "export")
    for path in (tmp_path / "run/export", tmp_path / "run/../run/export", tmp_path / "link"):
        with pytest.raises(ValueError, match="model.path: .* replaces it"):
            check_inputs(tmp_path / "run", {"model.path": str(path)})
    check_inputs(tmp_path / "other", {"model.path": str(tmp_path / "link"), "tokenizer.path": None})


@pytest.mark.fault("F33")
def test_a_container_with_our_host_name_holds_its_lock(tmp_path: Path) -> None:
    path = foreign(tmp_path, host=socket.gethostname(), space="a kernel/pid:[2]", pid=1)
    with pytest.raises(ValueError, match="is in use by process 1"):
        RunLock(tmp_path, "mine")
    assert json.loads(path.read_text())["job"] == "another"


@pytest.mark.fault("F33")
def test_every_start_of_an_unnamed_job_is_another_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(address: str, launcher: int, run: str = "none") -> tuple[str, str]:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run)
        monkeypatch.setenv("MASTER_ADDR", address)
        monkeypatch.setenv("MASTER_PORT", "29500")
        monkeypatch.setattr(os, "getppid", lambda: launcher)
        return launch_name()

    ours, grandparent = os.getpid(), os.getppid()
    first = names("node1", ours)
    assert first == names("node1", ours), "a restart by the same launcher"
    assert names("node1", grandparent)[1] != first[1]
    assert names("node2", ours)[0] != first[0], "ranks of two jobs do not share their files"
    assert names("node1", ours, "given")[1] == names("node1", grandparent, "given")[1]


def test_processes_of_two_containers_are_two_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    first = launch_name()
    monkeypatch.setattr(launch_files, "process_space", lambda: "another kernel")
    assert launch_name() != first


@pytest.mark.fault("F33")
def test_a_lock_that_is_deleted_or_spoiled_ends_no_run(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, "mine")
    text = lock.path.read_bytes()
    for place in range(0, len(text), 5):
        spoiled = bytearray(text)
        spoiled[place] ^= 0x80
        lock.path.write_bytes(spoiled)
        assert lock.renew() and lock.path.read_bytes() == text, place
    for content in (b"", b"\xff\xfe", text[:9]):
        lock.path.write_bytes(content)
        assert lock.renew() and lock.path.read_bytes() == text
    lock.path.unlink()
    assert lock.renew() and lock.path.read_bytes() == text
    lock.path.unlink()
    other = RunLock(tmp_path, "other")
    assert not lock.renew() and other.renew()
    lock.release()
    assert other.path.exists()


@pytest.mark.fault("F33")
def test_the_watchdog_survives_files_that_others_spoiled(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with watching(tmp_path, 60.0) as phases:
        phases.files.path_of(1).write_text(json.dumps({"launcher": phases.files.launcher}))
        deadline = time.monotonic() + 20
        while "the watchdog met KeyError" not in (said := capfd.readouterr().err):
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        phases.enter("train")
        while not phases.stop_requested:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.fault("F33")
def test_a_file_system_without_links_and_folder_sync_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync_file = os.fsync

    def link(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync_file(descriptor)

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os, "fsync", fsync)
    lock = RunLock(tmp_path, "mine")
    with pytest.raises(ValueError, match="is in use"):
        RunLock(tmp_path, "another")
    assert lock.renew()
    files = LaunchFiles(tmp_path)
    files.open()
    assert files.announce("failed", {"rank": 1}) and not files.announce("failed", {"rank": 2})
    with staged_directory(tmp_path / "step_1", Alone()) as stage:
        stage.write_text("a.json", "{}")
    assert not find_damage(tmp_path / "step_1")


class Alone:
    """An exchange of one rank."""

    rank, world_size = 0, 1

    def all_gather(self, name: str, value: Any) -> list[Any]:
        return [value]


@pytest.mark.fault("F26")
@pytest.mark.parametrize("shift_s", [-300.0, 300.0])
def test_an_announcement_counts_by_the_clock_of_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift_s: float
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "given")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + shift_s)
    old = LaunchFiles(tmp_path)
    old.open()
    old.announce("failed", {"rank": 1, "time": now() - shift_s})
    path = old.folder / "failed"
    fresh = LaunchFiles(tmp_path)
    fresh.open()
    assert fresh.announced("failed"), "it came after the launcher"
    before = path.stat().st_mtime - fresh.launched_ago_s - 60
    os.utime(path, (before, before))
    later = LaunchFiles(tmp_path)
    later.open()
    assert later.announced("failed") is None


@pytest.mark.fault("F35")
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("optim.weight_decay=0.7", "optim.weight_decay: 0.1 on rank 0"),
        ("seed=8", "seed: 7 on rank 0"),
    ],
)
def test_machines_that_disagree_do_not_begin(launcher: Launcher, setting: str, said: str) -> None:
    hooks = ["", f"other_setting:{setting}"]
    job = launcher.start(f"disagree-{setting.split('=')[0]}", ranks=2, hook=hooks)
    assert job.wait() == [2, 2], job.said()
    assert said in job.said() and job.said().count("error: ") == 1
    assert not list(job.output.glob("checkpoints/*"))
