"""One short run, and every command that reads what it left."""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from sft_fast.cli import main
from sft_fast.runtime.run_files import read_run


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be spoilt."""
    return Path(shutil.copytree(finished_run, tmp_path / "short"))


def test_status_says_where_a_run_stands(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(finished_run)]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["state"] == "finished" and told["step"] == "4 of 4"
    assert told["checkpoints"] == "step_00000002, step_00000004"
    assert re.fullmatch(r"[\d.]+ at 0, [\d.]+ at 2, [\d.]+ at 4", told["eval"])
    assert told["export"] == str(finished_run / "export")


def test_a_silent_run_is_lost_and_a_failed_one_says_why(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = json.loads((run / "status.json").read_text())
    running = status | {"state": "running", "phase": "train", "eta_s": 61.0}
    for heartbeat, words in ((time.time(), "running (train)"), (time.time() - 999, "lost: silent")):
        (run / "status.json").write_text(json.dumps(running | {"heartbeat": heartbeat}))
        assert main(["status", str(run)]) == 0
        text = capsys.readouterr().out
        assert words in text and ("0:01:01" in text) == words.startswith("running")
    (run / "status.json").write_text(json.dumps(running | {"failed_saves": 2}))
    assert main(["status", str(run)]) == 0
    assert "saves that failed in a row: 2" in capsys.readouterr().out
    failed = status | {"state": "failed", "cause": "no space"}
    (run / "status.json").write_text(json.dumps(failed))
    (run / "error.json").write_text(json.dumps({"rank": 3, "phase": "save"}))
    assert main(["status", str(run)]) == 0
    text = capsys.readouterr().out
    assert "no space" in text and "rank 3 in phase save" in text


def test_what_is_no_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("status", "plot", "verify", "export"):
        assert main([command, str(tmp_path)]) == 2
        assert "is no run directory" in capsys.readouterr().err
    assert main(["chat", str(tmp_path), "--ask", "a"]) == 2
    assert "holds no exported model" in capsys.readouterr().err


def test_records_of_a_resumed_run_are_told_once_and_a_torn_line_is_skipped(tmp_path: Path) -> None:
    lines = [{"kind": "step", "step": step, "loss": loss} for step, loss in ((1, 5.0), (2, 4.0))]
    lines += [{"kind": "step", "step": 2, "loss": 3.0}, {"kind": "data", "tokens": 1}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"kind": "st'
    (tmp_path / "metrics.jsonl").write_text(text)
    found = read_run(tmp_path)
    assert [record["loss"] for record in found.of_kind("step")] == [5.0, 3.0]
    assert len(found.of_kind("data")) == 1


def test_verify_finds_a_flipped_bit(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    text = capsys.readouterr().out
    assert text.count(": whole") == 3 and "starts at step_00000004, step 4" in text
    weights = run / "checkpoints" / "step_00000004" / "rank_00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert main(["verify", str(run)]) == 4
    text = capsys.readouterr().out
    assert "step_00000004: DAMAGED" in text and weights.name in text
    assert "starts at step_00000002, step 2" in text
    for name, code in (("checkpoints/step_00000004", 4), ("checkpoints/step_00000002", 0)):
        assert main(["verify", str(run / name)]) == code
    assert main(["verify", str(run / "checkpoints")]) == 2
    assert f"the run is {run}" in capsys.readouterr().err
    (run / "status.json").unlink()
    (run / "metrics.jsonl").unlink()
    assert main(["verify", str(run)]) == 4, "a copy without its log"


def test_verify_looks_at_every_export(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run / "export", run / "export_4")
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": whole") == 4
    (run / "export_4/config.json").unlink()
    (run / "checkpoints/step_00000005").touch()
    assert main(["verify", str(run)]) == 4
    text = capsys.readouterr().out
    assert "export_4: DAMAGED" in text and "step_00000005: DAMAGED" in text
    assert "export: whole" in text
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "export_4")
    assert main(["verify", str(run / "export")]) == main(["verify", str(run)]) == 0
    monkeypatch.chdir(run / "export")
    assert main(["verify", "."]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("export: whole")
    (run / "export/manifest.json").unlink()
    assert main(["verify", "."]) == 4
    assert "export has no manifest.json: it was lost" in capsys.readouterr().err


def test_a_checkpoint_that_the_run_deletes_meanwhile_is_not_damaged(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft_fast.runtime import manifest

    find = manifest.find_damage

    def find_damage(folder: Path) -> list[manifest.Damage]:
        if folder.name == "step_00000002":
            shutil.rmtree(folder)
        return find(folder)

    monkeypatch.setattr(manifest, "find_damage", find_damage)
    assert main(["verify", str(run)]) == 0
    assert "step_00000002: deleted meanwhile" in capsys.readouterr().out


def test_chat_answers_and_remembers(
    finished_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--max-new-tokens", "4", "--device", "cpu"]
    assert main(["chat", str(finished_run), "--ask", "upper bad", *asked]) == 0
    first = capsys.readouterr().out
    assert main(["chat", str(finished_run / "export"), "--ask", "upper bad", *asked]) == 0
    assert capsys.readouterr().out == first

    lines = iter(["upper bad", "", "/new", "upper bad"])

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    assert main(["chat", str(finished_run), *asked]) == 0
    assert capsys.readouterr().out.count(first.strip()) >= 2


def test_chat_names_the_file_that_is_cut_off(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(run / "export/model.safetensors", 1000)
    assert main(["chat", str(run), "--ask", "a"]) == 4
    assert "model.safetensors: expected" in capsys.readouterr().err
    (run / "export/manifest.json").unlink()  # a model from elsewhere has none
    assert main(["chat", str(run), "--ask", "a", "--device", "cpu"]) == 4
    assert "safetensors file is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "nonsense"], "device: nonsense cannot be used here (Expected one of cpu"),
        (["--device", "meta"], "device: meta cannot be used here ("),
        (["--temperature", "nan"], "temperature nan; expected"),
        (["--temperature", "-1"], "temperature -1.0; expected"),
    ],
)
def test_chat_says_what_is_wrong_with_its_arguments(
    finished_run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["chat", str(finished_run), "--ask", "a", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_chat_says_what_is_missing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "export/manifest.json").unlink()
    for path, words in (
        (run / "nowhere", "nowhere is no directory; expected"),
        (run / "config.yaml", "config.yaml is no directory; expected"),
        (run / "export", "export: its tokenizer cannot be loaded"),
    ):
        if path.name == "export":
            (path / "tokenizer.json").unlink()
            (path / "tokenizer_config.json").unlink()
        assert main(["chat", str(path), "--ask", "a"]) == 2
        assert words in capsys.readouterr().err


def test_chat_finds_what_was_exported_later(run: Path) -> None:
    from sft_fast.runtime.run_files import model_folder

    (run / "export").rename(run / "export_4")
    shutil.copytree(run / "export_4", run / "export_10")
    assert model_folder(run) == run / "export_10"


def test_chat_keeps_the_turns_it_was_told(finished_run: Path) -> None:
    from sft_fast.evaluation.chat import Chat

    chat = Chat(finished_run / "export", device="cpu", system="s", max_new_tokens=3)
    answer = chat.answer("a")
    chat.answer("b")
    roles = [turn["role"] for turn in chat._turns]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert chat._turns[2]["content"] == answer
    chat.forget()
    assert [turn["role"] for turn in chat._turns] == ["system"]
    with pytest.raises(ValueError, match="temperature"):
        Chat(finished_run / "export", temperature=-1.0)


def test_plot_draws_the_run_and_its_samples(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(json.loads((run / "samples.json").read_text())["samples"]) == 3
    (run / "curves.png").unlink()
    assert main(["plot", str(run), "--samples", "2", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{run}/curves.png", f"{run}/report.html"]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    samples = json.loads((run / "samples.json").read_text())
    assert samples["before"] == "random weights" and len(samples["samples"]) == 2
    text = (run / "report.html").read_text(encoding="utf-8")
    assert samples["samples"][0]["question"] in text
    for heading in ("Curves", "Samples", "Data", "Packing", "Configuration"):
        assert f"<h2>{heading}</h2>" in text
    assert "measured peak" in text and "histogram of sample lengths" in text
    assert "finished, 4 steps, 1 CPU rank, last step 20" in text
    assert re.search(r"evaluation loss</span><b>[\d.]+</b><span>from [\d.]+</span>", text)


def test_the_report_needs_nothing_from_elsewhere_and_escapes(run: Path) -> None:
    from sft_fast.metrics.report import write_report

    evil = {"question": "<script>x</script>", "expected": "", "before": "", "after": ""}
    (run / "samples.json").write_text(json.dumps({"before": "m", "samples": [evil]}))
    write_report(run)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert not re.search(r'(src|href)="(?!data:image/png;base64,)', text)
    assert not re.search(r"@import|url\(", text)


def test_the_smoothed_loss_starts_at_the_first_value_and_forgets() -> None:
    from sft_fast.metrics.curves import smoothed

    assert smoothed([3.0]) == [3.0]
    values = smoothed([5.0] * 100 + [1.0] * 100)
    assert values[99] == pytest.approx(5.0) and values[-1] == pytest.approx(1.0, abs=1e-3)
    assert 1.0 < values[103] < 5.0


def test_the_export_is_a_directory_that_transformers_and_vllm_read(finished_run: Path) -> None:
    folder = finished_run / "export"
    names = {path.name for path in folder.iterdir()}
    expected = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert expected <= names and "README.md" in names and "curves.png" in names
    assert any(re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", name) for name in names)
    assert not [name for name in names if name.endswith((".bin", ".pt", ".py", ".pkl"))]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"]
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_the_model_card_tells_how_the_model_was_made(finished_run: Path) -> None:
    import yaml

    card = (finished_run / "export" / "README.md").read_text(encoding="utf-8")
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "transformers"
    (store,) = (p for p in (finished_run / "data").iterdir() if fingerprint_of(p) in body)
    assert store.is_dir()
    for words in ("optimizer steps | 4", "evaluation loss", "megatron-core", "curves.png"):
        assert words in body
    settings = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", body, re.S)[0])
    assert settings["train"]["steps"] == 4


def fingerprint_of(store: Path) -> str:
    text = (store / "meta.json").read_text() if (store / "meta.json").is_file() else "{}"
    fingerprint: str = json.loads(text).get("fingerprint", "no store")
    return fingerprint


@pytest.mark.parametrize(
    ("name", "expected"),
    [("org/data", True), ("org/data:main@abc", True), ("data.jsonl", False), ("./a/b", False)],
)
def test_only_hub_names_are_linked_in_a_card(name: str, expected: bool) -> None:
    from sft_fast.metrics.model_card import is_hub_id

    assert is_hub_id(name) is expected


def test_an_export_without_the_data_is_the_run_s_own(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = run / "again"
    for rest, words in (
        (["--step", "3"], "no checkpoint of step 3; there are: 2, 4"),
        (["--to", "/proc/nowhere"], "/proc/nowhere cannot be written"),
        (["model.dtypo=bf16"], "did you mean model.dtype?"),
        (["output_dir=x"], "output_dir: an export sets it itself; there are --to DIR"),
    ):
        assert main(["export", str(run), *rest]) == 2
        assert words in capsys.readouterr().err
    # As on a machine that the directory was copied to.
    shutil.rmtree(run / "data")
    text = (run / "config.yaml").read_text()
    elsewhere = text.replace("train: demo", "train: /nowhere/rows.jsonl").replace(
        "plugins: []", "plugins: [/nowhere/formats.py]"
    )
    assert elsewhere.count("/nowhere/") == 2
    (run / "config.yaml").write_text(elsewhere)
    assert main(["export", str(run), "--to", str(target)]) == 0
    weights = [load(folder / "model.safetensors") for folder in (run / "export", target)]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    for name in ("generation_config.json", "config.json", "tokenizer.json", "README.md"):
        first, second = ((folder / name).read_text() for folder in (run / "export", target))
        for word in ("/nowhere/rows.jsonl", "/nowhere/formats.py"):
            assert (word in second) == (name == "README.md")
        second = second.replace("/nowhere/rows.jsonl", "demo")
        assert second.replace("\n- /nowhere/formats.py", " []") == first
    assert main(["export", str(run), "--to", str(target)]) == 2


def test_an_export_that_is_killed_says_so(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.CompletedProcess([], -9, stdout="what it said\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    assert main(["export", str(run), "--to", str(run / "killed")]) == 1
    out, err = capsys.readouterr()
    assert "SIGKILL ended the export; the system" in err and "what it said" in out
    assert not [*run.glob("*killed*"), *run.glob(".export_*")]


def test_the_card_of_an_earlier_checkpoint_tells_of_that_step(run: Path, tmp_path: Path) -> None:
    from sft_fast.commands.export import write_story
    from sft_fast.config.schema import load_config
    from sft_fast.metrics.model_card import model_card

    story = tmp_path / "story"
    story.mkdir()
    write_story(read_run(run), 2, story)
    card = model_card(load_config(story / "config.yaml", []), read_run(story), "f", 1)
    losses = {record["step"]: record["loss"] for record in read_run(run).of_kind("step")}
    assert "optimizer steps | 2 |" in card and f"training loss | {losses[2]:.4f} |" in card


def load(path: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(path)


def test_every_length_is_in_the_histogram_once() -> None:
    import numpy as np

    from sft_fast.metrics.report import LENGTH_BINS, length_histogram

    for lengths in ([7], [27, 28, 31, 31], [1, 41], [3, 8192, 8192], list(range(5, 4000, 7))):
        found = length_histogram(np.array(lengths, dtype=np.int32))
        edges, counts = found["edges"], found["counts"]
        assert sum(counts) == len(lengths) and len(counts) <= LENGTH_BINS
        assert len({round(b - a) for a, b in zip(edges, edges[1:], strict=False)}) == 1
        assert counts[0] >= lengths.count(min(lengths)) > 0 and counts[-1] > 0


def test_untrained_answers_are_made_readable() -> None:
    from sft_fast.metrics.report import readable

    assert readable("a\n\n \n\x1b[31mb\x00") == "a\n\ufffd[31mb\ufffd"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_the_report(finished_run: Path, tmp_path: Path) -> None:
    import numpy as np
    from matplotlib.image import imread

    picture = tmp_path / "report.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [
        "--window-size=1200,2600",
        f"--screenshot={picture}",
        f"file://{finished_run}/report.html",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert picture.is_file(), result.stderr
    pixels = imread(picture)[:, :, :3]
    assert pixels.shape[:2] == (2600, 1200)
    # The curves: coloured lines in the upper half, on a page that is mostly background.
    colourful = np.ptp(pixels, axis=2) > 0.3
    assert colourful[:1300].mean() > 0.002
    background = (np.abs(pixels - pixels[5, 5]) < 0.02).all(axis=2).mean()
    assert 0.7 < background < 0.99
