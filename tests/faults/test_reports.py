"""What only reports breaks: the run goes on, and what is finished stays finished."""

import json
import shutil
import signal

import pytest

from faults.launcher import Launcher
from sft_fast.runtime.manifest import LaterVersionError, find_damage


@pytest.mark.fault("F32")
def test_a_run_is_finished_without_its_evaluation_file(launcher: Launcher) -> None:
    rows = launcher.folder / "eval-rows.jsonl"
    shutil.copy(launcher.rows, rows)
    options = ("data.eval_overlap=allow", f"data.eval={rows}", "evaluation.max_samples=8")
    job = launcher.run(
        "no-eval-file",
        *options,
        "evaluation.exact_match_samples=2",
        hook=f"delete_before_export:{rows}",
    )
    assert "warning: no exact match: " in job.said() and rows.name in job.said()
    assert job.json("status.json")["state"] == "finished"


@pytest.mark.fault("F32")
def test_no_rank_waits_for_pictures(launcher: Launcher) -> None:
    job = launcher.start("pictures", ranks=2, hook="draw_forever:", steps=2)
    job.wait_until("drawing")
    job.ranks[1].join(20)
    assert job.ranks[1].exitcode == 0 and job.ranks[0].is_alive(), job.said()
    job.signal(signal.SIGTERM)
    assert job.wait(25) == [0, 0]
    assert (job.output / "export/config.json").is_file()
    assert "nothing to do" in launcher.run("pictures", ranks=2, steps=2).said()


@pytest.mark.fault("F32")
def test_a_checkpoint_of_a_later_version_is_not_called_damaged(launcher: Launcher) -> None:
    job = launcher.run("later-version", steps=2)
    newest = job.output / "checkpoints/step_00000002"
    manifest = json.loads((newest / "manifest.json").read_text())
    text = json.dumps(manifest | {"version": 2, "parts": []})
    (newest / "manifest.json").write_text(text)
    with pytest.raises(LaterVersionError, match="has format version 2, this sft_fast reads 1"):
        find_damage(newest)
    again = launcher.start("later-version", steps=4)
    assert again.wait() == [2]
    assert "format version 2" in again.said() and "delete" not in again.said()
    assert (newest / "manifest.json").read_text() == text
