"""Files that become shorter, or that a disk no longer gives, while ranks have them mapped."""

import signal
from pathlib import Path

import pytest

from faults.launcher import Launcher
from sft_fast.files import write_json
from sft_fast.runtime import mapped_files
from sft_fast.runtime.launcher import explain_bus_errors
from sft_fast.runtime.mapped_files import after_bus_error, list_mapped, shortened
from sft_fast.runtime.remembered import recall, remember, signature


@pytest.mark.fault("F40")
def test_a_store_that_is_cut_off_is_named_and_built_anew(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    cache = launcher.folder / "cut-off-cache"
    options = (f"data.cache_dir={cache}", "export.enabled=false")
    job = launcher.start("cut-off", *options, steps=100, hook=f"cut_off_in_step:{cache}")
    assert job.wait() == [-signal.SIGBUS]
    (store,) = cache.glob("*/tokens.bin")
    monkeypatch.setattr(ProcessFailure, "__post_init__", ProcessFailure.__post_init__)
    explain_bus_errors(job.output)
    ProcessFailure(0, 1, -signal.SIGBUS, "no file")
    said = capsys.readouterr().err
    assert f"local rank 0: {store} has 0 bytes, expected " in said and "rerun" in said
    again = launcher.run("cut-off", *options, steps=4)
    assert "is built anew" in again.said()


@pytest.mark.fault("F40")
def test_what_a_disk_does_not_give_is_named_and_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    launch, store = tmp_path / "launch", tmp_path / "store"
    for folder in (launch, store):
        folder.mkdir()
    file = store / "tokens.bin"
    file.write_bytes(b"1234")
    files = signature([file])
    remember(store, files, "whole")
    list_mapped(launch, 3, [file])
    assert shortened([launch]) == "" and recall(store, files) == "whole"
    assert f"the disk did not answer for a file that it reads from memory, in {store}" in (
        after_bus_error([launch])
    )
    assert recall(store, files) is None
    monkeypatch.setattr(mapped_files.os, "pread", fail)
    assert f"{file} cannot be read: Input/output error; " in after_bus_error([launch])
    # Whoever maps a file that is deleted, or replaced by another one, still has it.
    file.unlink()
    assert shortened([launch]) == ""
    file.write_bytes(b"123")
    assert f"{file} has 3 bytes, expected 4: " in shortened([launch])


def fail(*args: object) -> bytes:
    raise OSError(5, "Input/output error")


def test_files_of_other_machines_are_not_looked_at(tmp_path: Path) -> None:
    file = tmp_path / "tokens.bin"
    file.write_bytes(b"")
    write_json(tmp_path / "mapped_00000.json", {"space": "elsewhere", "bytes": {str(file): 4}})
    assert shortened([tmp_path]) == ""
    assert "data.cache_dir" in after_bus_error([tmp_path])
