"""Checkpoints that are damaged, do not fit on the disk, or belong to something else."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from faults.launcher import Launcher, same_weights, step_losses
from lone_rank import LoneRank
from sft_fast.metrics.writer import MetricsWriter
from sft_fast.runtime.launch_files import LaunchFiles
from sft_fast.runtime.manifest import (
    agree,
    find_damage,
    hash_file,
    manifest_text,
    read_manifest,
    staged_directory,
)
from sft_fast.runtime.run_directory import RUN_MARKER
from sft_fast.runtime.run_files import checkpoint_step, list_checkpoints

STEPS = 6


@pytest.fixture(scope="module")
def unbroken(launcher: Launcher) -> Path:
    """A run that nothing happened to, with all its checkpoints."""
    return launcher.run("unbroken-6", "checkpoint.keep_last=6", steps=STEPS).output


def copy_checkpoints(source: Path, target: Path, *steps: int) -> None:
    for step in steps:
        name = f"checkpoints/step_{step:08d}"
        shutil.copytree(source / name, target / name)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.fault("F3")
@pytest.mark.parametrize("harm", [truncate, Path.unlink, flip])
def test_every_damaged_file_is_named(unbroken: Path, tmp_path: Path, harm: object) -> None:
    source = unbroken / "checkpoints/step_00000004"
    names = sorted(path.name for path in source.iterdir())
    assert names == ["common.json", "manifest.json", "rank_00000.safetensors", "train_state.json"]
    for name in names:
        copy = tmp_path / name
        shutil.copytree(source, copy)
        assert find_damage(copy) == []
        harm(copy / name)  # type: ignore[operator]
        damages = find_damage(copy)
        assert [damage.file for damage in damages] == [copy / name]
        assert damages[0].expected and damages[0].found


@pytest.mark.fault("F3")
def test_every_bit_of_a_manifest_counts(unbroken: Path, tmp_path: Path) -> None:
    text = (unbroken / "checkpoints/step_00000004/manifest.json").read_bytes()
    folder = tmp_path / "copy"
    shutil.copytree(unbroken / "checkpoints/step_00000004", folder)
    for place in range(0, len(text), 7):
        harmed = bytearray(text)
        harmed[place] ^= 1 << place % 7
        (folder / "manifest.json").write_bytes(harmed)
        assert [damage.file.name for damage in find_damage(folder)] == ["manifest.json"], place


@pytest.mark.fault("F3")
def test_a_run_falls_back_to_the_newest_whole_checkpoint(
    launcher: Launcher, unbroken: Path
) -> None:
    target = launcher.folder / "fallback"
    copy_checkpoints(unbroken, target, 2, 3, 4, 5)
    flip(target / "checkpoints/step_00000005/rank_00000.safetensors")
    (target / "checkpoints/step_00000004/manifest.json").unlink()
    job = launcher.run("fallback")
    assert "rank_00000.safetensors: expected" in job.said()
    assert "step_00000004/manifest.json" in job.said()
    assert f"at step 3 of {STEPS}" in job.said()
    assert same_weights(unbroken, target)


@pytest.mark.fault("F3")
def test_a_run_does_not_begin_anew_when_all_checkpoints_are_damaged(
    launcher: Launcher, unbroken: Path
) -> None:
    target = launcher.folder / "all-damaged"
    copy_checkpoints(unbroken, target, 2)
    truncate(target / "checkpoints/step_00000002/common.json")
    job = launcher.start("all-damaged")
    assert job.wait() == [4]
    assert "no checkpoint is whole" in job.said() and "common.json" in job.said()


@pytest.mark.fault("F3")
def test_a_damaged_checkpoint_is_not_exported(launcher: Launcher, unbroken: Path) -> None:
    target = launcher.folder / "damaged-export"
    copy_checkpoints(unbroken, target, 2)
    folder = target / "checkpoints/step_00000002"
    flip(folder / "rank_00000.safetensors")
    job = launcher.start("damaged-export", "--export", f"checkpoint.resume={folder}")
    assert job.wait() == [4]
    assert "step_00000002 is damaged; --step names another one" in job.said()
    assert not (target / "export").exists()


def test_a_checkpoint_of_an_earlier_version_is_exported_with_the_data(
    launcher: Launcher, unbroken: Path
) -> None:
    target = launcher.folder / "earlier-version"
    copy_checkpoints(unbroken, target, STEPS)
    folder = target / f"checkpoints/step_{STEPS:08d}"
    state = json.loads((folder / "train_state.json").read_text())
    assert state.pop("data")["end_ids"]
    records = read_manifest(folder)
    (folder / "train_state.json").write_text(json.dumps(state))
    records["train_state.json"] = hash_file(folder / "train_state.json", "train_state.json")
    (folder / "manifest.json").write_text(manifest_text(records))
    arguments = ("--export", f"checkpoint.resume={folder}")
    launcher.run("earlier-version", *arguments)
    for name in ("model.safetensors", "generation_config.json"):
        files = [run / "export" / name for run in (unbroken, target)]
        assert files[0].read_bytes() == files[1].read_bytes()
    gone = launcher.start("earlier-version", *arguments, "data.train=/nowhere.jsonl")
    assert gone.wait() == [2]
    assert "/nowhere.jsonl" in gone.said() and "data" in gone.said()


def test_an_export_that_computes_something_else_is_not_kept(launcher: Launcher) -> None:
    job = launcher.start("wrong", "train.steps=2", ranks=2, hook=["wrong_export:1.05", ""])
    assert job.wait() == [2, 2], "the rank that follows ends with the code of the first"
    assert "logits of the exported model are off by 0.0" in job.said()
    assert not [*job.output.glob("*export*"), *job.output.glob(".*export*")]
    assert sorted(path.name for path in (job.output / "checkpoints").iterdir()) == [
        "step_00000001",
        "step_00000002",
    ]
    assert launcher.run("wrong", "train.steps=2", ranks=2).said().count("exported to") == 1


def test_an_export_wants_weights_of_the_first_model_only_with_lora(
    launcher: Launcher, unbroken: Path
) -> None:
    model = launcher.folder / "first-model"
    shutil.copytree(unbroken / "export", model)
    begin = ("model.shape=null", f"model.path={model}", "tokenizer.path=null", "lora.rank=2")
    run = launcher.run("lora-trained", *begin, steps=2).output
    export = (*begin, "--export", f"checkpoint.resume={run / 'checkpoints/step_00000002'}")
    assert same_weights(run, launcher.run("lora-exported", *export).output)
    job = launcher.start("lora-other", *export, "model.random_init=true")
    assert job.wait() == [2] and "adapter: was lora rank 2" in job.said()
    (model / "model.safetensors").unlink()
    whole = f"checkpoint.resume={unbroken / f'checkpoints/step_{STEPS:08d}'}"
    exported = launcher.run("all-weights", *begin[:3], "--export", whole).output
    assert same_weights(unbroken, exported)
    job = launcher.start("lora-exported", *export)
    assert job.wait() == [2] and "holds no *.safetensors" in job.said()


@pytest.mark.fault("F4")
def test_training_goes_on_when_the_disk_is_full_for_a_while(
    launcher: Launcher, unbroken: Path
) -> None:
    job = launcher.run("full", "checkpoint.keep_last=6", hook="full_disk:2,3")
    assert job.said().count("No space left on device") == 2 and "bytes free" in job.said()
    saved = sorted(path.name[-1] for path in (job.output / "checkpoints").iterdir())
    assert saved == ["1", "4", "5", "6"]
    assert same_weights(unbroken, job.output)


@pytest.mark.fault("F4")
def test_a_disk_that_stays_full_ends_the_run_and_keeps_what_there_is(launcher: Launcher) -> None:
    options = ("checkpoint.max_failures=2",)
    job = launcher.start("stays-full", *options, hook="full_disk:2,3,4,5,6")
    assert job.wait() == [2]
    assert job.json("error.json")["cause"].count("No space left") == 1
    assert [path.name for path in (job.output / "checkpoints").iterdir()] == ["step_00000001"]


@pytest.mark.fault("F4")
def test_a_log_on_a_full_disk_does_not_end_the_run(launcher: Launcher, unbroken: Path) -> None:
    output = launcher.folder / "full-log"
    output.mkdir()
    (output / RUN_MARKER).touch()
    (output / "metrics.jsonl").symlink_to("/dev/full")
    (output / "skipped").symlink_to("/proc/nowhere")
    job = launcher.run("full-log", hook="spoil:loss nan 3")
    assert job.said().count("metrics.jsonl is not written: No space left on device") == 1
    assert "the samples of step 3 could not be written" in job.said()
    assert (output / "export/model.safetensors").exists()


@pytest.mark.fault("F4")
def test_a_failure_on_a_full_disk_keeps_its_cause(launcher: Launcher) -> None:
    job = launcher.start("full-error", hook="full_for_json:2")
    assert job.wait() == [1]
    assert "the device gave up" in job.said()


@pytest.mark.fault("F4")
def test_a_real_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=1m tmpfs {disk} 2>/dev/null"):
        pytest.skip("needs the right to mount")
    try:
        with staged_directory(disk / "good", LoneRank()) as stage:
            stage.write_text("a", "a" * 400_000)
        with (
            pytest.raises(OSError, match=r"No space left on device: .*/c \(.*bytes free"),
            staged_directory(disk / "bad", LoneRank()) as stage,
        ):
            (stage.path / "b").write_bytes(b"b" * 400_000)
            agree(LoneRank(), "files", lambda: stage.write_text("c", "c" * 400_000))
        with (
            pytest.raises(OSError, match=r"800,000 bytes needed"),
            staged_directory(disk / "large", LoneRank(), needed_bytes=800_000),
        ):
            raise AssertionError("there is no room")
        assert [path.name for path in disk.iterdir()] == ["good"]
        assert find_damage(disk / "good") == []
    finally:
        os.system(f"umount {disk}")


@pytest.mark.fault("F5")
@pytest.mark.parametrize("folder", ["/proc/nowhere/run", "{file}/run"])
def test_an_output_directory_that_cannot_be_written_is_refused(
    launcher: Launcher, tmp_path: Path, folder: str
) -> None:
    (tmp_path / "file").touch()
    folder = folder.format(file=tmp_path / "file")
    job = launcher.start("refused", f"output_dir={folder}")
    assert job.wait(20) == [2]
    assert "output_dir" in job.said() and "ranks: tensor" not in job.said()


@pytest.mark.fault("F5")
@pytest.mark.parametrize("folder", ["/proc/nowhere/run", "{file}/run"])
def test_check_refuses_an_output_directory_that_cannot_be_written(
    launcher: Launcher, tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from sft_fast import cli

    (tmp_path / "file").touch()
    folder = folder.format(file=tmp_path / "file")
    assert cli.main(["check", str(launcher.config("checked")), f"output_dir={folder}"]) == 1
    said = "".join(capsys.readouterr())
    assert "output_dir" in said and "a directory that can be written" in " ".join(said.split())


@pytest.mark.fault("F12")
def test_training_goes_on_beside_a_writer_that_breaks_for_a_while(
    launcher: Launcher, unbroken: Path
) -> None:
    """On one rank of two: the other would wait for it."""
    options = ("checkpoint.asynchronous=true", "checkpoint.keep_last=6")
    job = launcher.start("broken", *options, ranks=2, hook=["", "broken_writer:2,4,5"])
    assert job.wait(30) == [0, 0]
    for step, number in ((2, 1), (4, 1), (5, 2)):
        warning = f"step_0000000{step} could not be saved ({number} of 3 such"
        assert job.said().count(warning) == 1, (step, job.said())
    assert job.said().count("rank 1: RuntimeError: the writer broke") == 3
    saved = sorted(path.name[-1] for path in (job.output / "checkpoints").iterdir())
    assert saved == ["1", "3", "6"]
    assert job.json("status.json")["failed_saves"] == 0
    expected = step_losses(unbroken)
    assert step_losses(job.output) == pytest.approx(expected, rel=1e-6)


@pytest.mark.fault("F12")
@pytest.mark.parametrize(("numbers", "left"), [("6", "5"), ("1,2,3,4,5,6", None)])
def test_a_last_save_that_fails_fails_the_run(
    launcher: Launcher, numbers: str, left: str | None
) -> None:
    options = ("checkpoint.asynchronous=true", "checkpoint.max_failures=9")
    job = launcher.start(f"broken-{numbers}", *options, hook=f"broken_writer:{numbers}")
    assert job.wait(30) == [2]
    newest = "there is no checkpoint yet" if left is None else f"to resume from step_0000000{left}"
    cause = job.json("error.json")["cause"]
    assert "step_00000006 could not be saved" in cause and newest in cause
    assert "RuntimeError: the writer broke" in cause
    said = job.said()
    early = [f"step_0000000{step} could" for step in range(1, 6) if str(step) in numbers]
    # Told as soon as it is known, not only when the next save begins.
    places = [(said.index(text), said.index(f"step {int(text[12]) + 1}/6")) for text in early]
    assert not early or any(warning < next_step for warning, next_step in places)
    assert job.json("status.json")["state"] == "failed"
    assert job.json("status.json")["failed_saves"] == len(numbers.split(","))
    assert not (job.output / "export").exists()


@pytest.mark.fault("F12")
def test_a_writer_that_hangs_ends_the_run_with_the_phase(launcher: Launcher) -> None:
    job = launcher.start("hung", "checkpoint.timeout_minutes=0.01", hook="hung_writer:2")
    assert job.wait(30) == [75]
    assert "step_00000002 has not ended" in job.json("error.json")["cause"]
    assert job.json("error.json")["phase"] == "save"


@pytest.mark.fault("F20")
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_resumed_run_is_bit_identical(
    launcher: Launcher, unbroken: Path, asynchronous: str
) -> None:
    name = f"resumed-{asynchronous}"
    copy_checkpoints(unbroken, launcher.folder / name, 3)
    job = launcher.run(name, f"checkpoint.asynchronous={asynchronous}")
    expected = step_losses(unbroken)
    assert step_losses(job.output) == {step: expected[step] for step in (4, 5, 6)}
    assert same_weights(unbroken, job.output)


@pytest.mark.fault("F20")
def test_training_goes_on_beside_a_save_which_holds_what_was_there_when_it_began(
    launcher: Launcher, unbroken: Path
) -> None:
    options = ("checkpoint.asynchronous=true", "checkpoint.every_steps=2", "checkpoint.keep_last=6")
    job = launcher.run("beside-training", *options, hook="save_waits_for_step:6")
    name = "checkpoints/step_00000004"
    saved, expected = read_manifest(job.output / name), read_manifest(unbroken / name)
    assert saved["rank_00000.safetensors"] == expected["rank_00000.safetensors"]
    assert saved["common.json"] == expected["common.json"]
    assert same_weights(unbroken, job.output)


def test_a_host_without_room_for_a_copy_saves_before_it_trains_on(
    launcher: Launcher, unbroken: Path
) -> None:
    """On one rank of two, and in two saves of five."""
    options = ("checkpoint.asynchronous=true", "checkpoint.keep_last=6")
    job = launcher.start("no-room", *options, ranks=2, hook=["", "no_room:2,4"])
    assert job.wait() == [0, 0]
    assert job.said().count("rank 1 has no memory for checkpoint.asynchronous") == 1
    saved = sorted((job.output / "checkpoints").iterdir())
    assert [path.name[-1] for path in saved] == list("123456") and not any(map(find_damage, saved))
    assert step_losses(job.output) == pytest.approx(step_losses(unbroken), rel=1e-6)


LAYOUTS = {
    "data 2": (2, ()),
    "micro-batch 2": (1, ("train.micro_batch_size=2",)),
    "tensor 2": (2, ("parallel.tensor=2",)),
    "pipeline 2": (2, ("parallel.pipeline=2",)),
    "data 4": (4, ()),
}


@pytest.mark.fault("F21")
@pytest.mark.parametrize(
    "layout",
    [
        name if name in ("data 2", "micro-batch 2") else pytest.param(name, marks=pytest.mark.slow)
        for name in LAYOUTS
    ],
)
def test_a_run_resumes_in_another_layout(launcher: Launcher, unbroken: Path, layout: str) -> None:
    ranks, options = LAYOUTS[layout]
    # A key-value head for each tensor-parallel rank.
    options = (*options, "model.shape.num_key_value_heads=2")
    name = f"layout-{layout.replace(' ', '-')}"
    first = launcher.run(f"{name}-one", options[-1], "checkpoint.keep_last=6")
    copy_checkpoints(first.output, launcher.folder / name, 2)
    job = launcher.run(name, *options, ranks=ranks)
    expected = step_losses(first.output)
    found = step_losses(job.output)
    assert found == pytest.approx({step: expected[step] for step in (3, 4, 5, 6)}, rel=1e-6)
    # And back, from what several ranks wrote.
    again = launcher.folder / f"{name}-back"
    copy_checkpoints(job.output, again, 5)
    back = step_losses(launcher.run(f"{name}-back", options[-1]).output)
    assert back == pytest.approx({6: expected[6]}, rel=1e-6)


@pytest.mark.fault("F20")
def test_a_run_begun_at_a_named_checkpoint_goes_on_from_its_own(
    launcher: Launcher, unbroken: Path
) -> None:
    origin = f"checkpoint.resume={unbroken / 'checkpoints/step_00000002'}"
    job = launcher.start("branch", origin, hook="die_in_step:3")
    job.wait()
    # What lies in the directory decides, not a name that is older; nor how its path is spelled.
    link = launcher.folder / "link"
    link.symlink_to(unbroken / "checkpoints")
    again = launcher.run("branch", f"checkpoint.resume={link}/../checkpoints/step_00000002/")
    assert "step_00000004 at step 4 of 6" in again.said()
    assert same_weights(unbroken, again.output)

    copy_checkpoints(unbroken, launcher.folder / "rewound", 2, 3)
    own = f"checkpoint.resume={launcher.folder / 'rewound/checkpoints/step_00000002'}"
    refused = launcher.start("rewound", own)
    assert refused.wait() == [2]
    assert "later checkpoints of another run, step_00000003; move" in refused.said()


def test_what_is_no_checkpoint_is_not_called_damaged(
    launcher: Launcher, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sft_fast import cli

    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    first = unbroken / "checkpoints/step_00000001"
    cases = {
        tmp_path / "nowhere": "does not exist; expected",
        tmp_path / "file": "is a file; expected",
        tmp_path / "folder": "has no manifest.json; another program",
        unbroken: f"is not a checkpoint, but contains {first}, ",
        first.parent: f"is not a checkpoint, but contains {first}",
    }
    config = str(launcher.config("no-checkpoint"))
    for path, words in cases.items():
        assert cli.main(["train", config, f"checkpoint.resume={path}"]) == 2
        assert words in capsys.readouterr().err, path
    assert cli.main(["check", config, f"checkpoint.resume={path}"]) == 1
    assert "checkpoint.resume" in capsys.readouterr().err
    job = launcher.start("no-checkpoint", f"checkpoint.resume={tmp_path / 'nowhere'}")
    assert job.wait() == [2] and "nowhere does not exist" in job.said()
    copy_checkpoints(unbroken, launcher.folder / "another-run", 2)
    job = launcher.start("another-run", f"checkpoint.resume={tmp_path / 'nowhere'}")
    assert job.wait() == [2] and "nowhere does not exist" in job.said()
    # Where the run has saved itself, that counts; what it began at may be gone.
    origin = tmp_path / "origin/step_00000002"
    shutil.copytree(unbroken / "checkpoints/step_00000002", origin)
    resume = f"checkpoint.resume={origin}"
    launcher.start("began-elsewhere", resume, hook="die_in_step:3").wait()
    shutil.rmtree(origin)
    launcher.run("began-elsewhere", resume)


@pytest.mark.fault("F3")
def test_what_is_saved_beside_a_later_damaged_checkpoint_stays(
    launcher: Launcher, unbroken: Path
) -> None:
    target = launcher.folder / "beside"
    copy_checkpoints(unbroken, target, 2, 5, 6)
    for step in (5, 6):
        flip(target / f"checkpoints/step_{step:08d}/common.json")
    job = launcher.start("beside", hook="die_in_step:2")
    job.wait()
    assert "at step 3 of 6" in launcher.run("beside").said()
    assert same_weights(unbroken, target)


@pytest.mark.fault("F22")
def test_epoch_ends_last_steps_and_finished_runs(launcher: Launcher, unbroken: Path) -> None:
    constant = ("optim.decay=constant",)
    twelve = launcher.run("twelve", *constant, "train.steps=12")
    assert "6 steps an epoch" in twelve.said()
    launcher.run("epochs", *constant, "train.steps=6")
    second = launcher.run("epochs", *constant, "train.steps=null", "train.epochs=2")
    assert "at step 6 of 12" in second.said()
    assert same_weights(twelve.output, second.output)

    job = launcher.start("last-step", hook="die_in_step:6")
    job.wait()
    again = launcher.run("last-step")
    assert "at step 5 of 6" in again.said()
    assert same_weights(unbroken, again.output)
    before = (again.output / "export/manifest.json").stat().st_mtime_ns
    finished = launcher.run("last-step")
    assert "nothing to do" in finished.said()
    assert (again.output / "export/manifest.json").stat().st_mtime_ns == before


@pytest.mark.fault("F23")
@pytest.mark.fault("F25")
def test_what_changed_is_listed_and_may_be_allowed(launcher: Launcher, unbroken: Path) -> None:
    rows = launcher.folder / "other.jsonl"
    rows.write_text("".join(launcher.rows.read_text().splitlines(keepends=True)[:48]))
    changes = {
        "data": f"data.train={rows}",
        "seed": "seed=8",
        "packing": "packing.strategy=bfd",
        "batch": "train.global_batch_size=2",
        "template": "tokenizer.chat_template=zephyr",
        "tokenizer": "tokenizer.add_tokens=[<new>]",
        "model": "model.dtype=bf16",
    }
    copy_checkpoints(unbroken, launcher.folder / "changed", 2)
    job = launcher.start("changed", *changes.values())
    assert job.wait() == [2]
    for name in changes:
        assert f"{name}: was" in job.said(), name
    assert f"--allow-change {','.join(sorted(changes))}" in job.said()

    fields = ("--allow-change", "data,seed", changes["data"], changes["seed"])
    allowed = launcher.run("changed", *fields, "train.steps=null", "train.epochs=1")
    assert "changed: data, seed; the data begins anew" in allowed.said()
    newest = [max((run / "checkpoints").iterdir()) for run in (unbroken, allowed.output)]
    before, state = (json.loads((path / "train_state.json").read_text()) for path in newest)
    assert state["first_data_step"] == 2 and state["step"] > 2
    assert state["data"]["fingerprint"] != before["data"]["fingerprint"]


@pytest.mark.fault("F25")
def test_an_old_run_is_not_overwritten(launcher: Launcher, unbroken: Path) -> None:
    copy_checkpoints(unbroken, launcher.folder / "old", 2)
    job = launcher.start("old", "checkpoint.resume=never")
    assert job.wait() == [2]
    assert "choose another output_dir" in job.said()


@pytest.mark.fault("F25")
def test_a_refused_run_leaves_the_records_of_the_finished_one(launcher: Launcher) -> None:
    output = launcher.run("done", "train.steps=2").output
    records = {name: (output / name).read_bytes() for name in ("status.json", "metrics.jsonl")}
    assert json.loads(records["status.json"])["state"] == "finished"
    for change in (
        "checkpoint.resume=never",
        "seed=8",
        "train.steps=1",
        "data.train=nowhere.jsonl",
    ):
        assert launcher.start("done", "train.steps=2", change, ranks=2).wait() == [2, 2]
        assert {name: (output / name).read_bytes() for name in records} == records, change
        assert not (output / "error.json").exists()


def test_a_directory_is_not_seen_before_it_is_whole(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged_directory(tmp_path / "a", LoneRank()) as stage:
        stage.write_text("b", "c")
        1 / 0  # noqa: B018
    assert not (tmp_path / "a").exists()
    with staged_directory(tmp_path / "a", LoneRank()) as stage:
        stage.write_text("b", "d")
        (stage.path / "folder").mkdir()
        (stage.path / "folder" / "e").write_text("f")
    assert sorted(read_manifest(tmp_path / "a")) == ["b", "folder/e"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.fault("F36")
def test_a_copy_of_a_run_that_was_killed_before_its_export_exports(
    launcher: Launcher,
) -> None:
    launcher.run("killed-late", steps=3)
    job = launcher.start("killed-late", steps=STEPS, hook="die_before_export:")
    assert job.wait() == [-signal.SIGKILL]
    # Files of a copy are as old as the copy: the export may look newer than the checkpoint.
    target = launcher.folder / "copied"
    shutil.copytree(job.output, target, copy_function=shutil.copyfile)
    os.utime(target / "export/manifest.json")
    again = launcher.run("copied", steps=STEPS)
    assert "nothing to do" not in again.said()
    launcher.run("killed-late", steps=STEPS)
    assert same_weights(job.output, target)
    assert "nothing to do" in launcher.run("copied", steps=STEPS).said()


def test_the_newest_checkpoint_is_that_of_the_highest_number(tmp_path: Path) -> None:
    for name in ("step_100000000", "step_99999999", "step_7", "step_00000008", "step_x", "step_"):
        (tmp_path / name).mkdir()
    numbers = [checkpoint_step(path) for path in list_checkpoints(tmp_path)]
    assert numbers == [7, 8, 99999999, 100000000]


@pytest.mark.fault("F3")
def test_a_renamed_checkpoint_is_refused(launcher: Launcher, unbroken: Path) -> None:
    # As the newest by its name it would be resumed from for ever, whatever is saved since.
    target = launcher.folder / "renamed"
    copy_checkpoints(unbroken, target, 2)
    folder = target / "checkpoints"
    (folder / "step_00000002").rename(folder / "step_00000009")
    job = launcher.start("renamed")
    assert job.wait() == [2]
    assert "step_00000009 holds step 2; expected it to be named step_00000002" in job.said()
    shutil.rmtree(folder)
    folder.write_text("")
    job = launcher.start("renamed")
    assert job.wait() == [2] and "checkpoints is no directory" in job.said()


def test_what_lies_in_the_way_of_a_save_is_removed_and_no_more(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").touch()
    (tmp_path / ".incomplete_a").write_text("")
    (tmp_path / ".replaced_a").symlink_to(other)
    (tmp_path / "a").symlink_to(other)
    with staged_directory(tmp_path / "a", LoneRank()) as stage:
        stage.write_text("b", "c")
    assert not (tmp_path / "a").is_symlink() and find_damage(tmp_path / "a") == []
    assert (other / "precious").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "other"]


@pytest.mark.fault("F38")
def test_a_pipe_in_place_of_a_log_and_a_rank_that_is_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics.jsonl is a pipe"):
        MetricsWriter(tmp_path, is_main=True)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match=r"RANK=first, expected a whole number"):
        LaunchFiles(tmp_path)
