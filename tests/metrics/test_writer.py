import gzip
import io
import json
import math
import re
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sft_fast.metrics.format import duration
from sft_fast.metrics.writer import MetricsWriter, StepMeter, StepOutcome, StepReason, Timed, Window
from sft_fast.packing.steps import StepCounts
from tiny import make_config

COUNTS = StepCounts(
    num_samples=3,
    num_tokens=60,
    num_supervised=20,
    loss_weight=20.0,
    capacity_tokens=80,
    sum_squared_lengths=1300,
)
OUTCOME = StepOutcome(loss=1.5, grad_norm=0.5, lr=1e-3)


def read(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def run_meter(folder: Path, steps: range, is_main: bool = True, **options: Any) -> None:
    writer = MetricsWriter(folder, is_main)
    every = options.pop("every_steps", 1)
    meter = StepMeter(writer, steps.stop - 1, every, lambda counts: 1e12, **options)
    for step in steps:
        meter.step(step, OUTCOME, COUNTS, elapsed_s=2.0, data_wait_s=0.5)
    writer.close()


def test_speeds_are_totals_over_the_window() -> None:
    window = Window()
    window.add(COUNTS, elapsed_s=1.0, data_wait_s=0.5, flops=3e12)
    window.add(COUNTS, elapsed_s=3.0, data_wait_s=0.0, flops=1e12)
    speeds = window.speeds(peak_flops=10e12)
    assert speeds == {
        "elapsed_s": 2.0,
        "tokens_per_s": 30.0,
        "supervised_tokens_per_s": 10.0,
        "capacity_tokens_per_s": 40.0,
        "padding": 0.25,
        "data_wait": 0.125,
        "tflops": 1.0,
        "mfu": 0.1,
    }
    assert window.speeds(None)["mfu"] is None


def test_a_line_and_a_record_come_every_few_steps_and_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_meter(tmp_path, range(1, 8), every_steps=3, peak_flops=1e12)
    records = read(tmp_path)
    assert [record["step"] for record in records] == [3, 6, 7]
    assert [record["eta_s"] for record in records] == [8.0, 2.0, 0.0]
    assert all(record["elapsed_s"] == 2.0 and record["mfu"] == 0.5 for record in records)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "\x1b" not in lines[0]
    for words in (
        *("step 3/7", "loss 1.5000", "lr 1.00e-03", "grad_norm 0.500", "tokens/s 30"),
        *(
            "(trained 10, computed 40)",
            "padding 25.0%",
            "mfu 50.0%",
            "GiB",
            "wait 25.0%",
            "0:00:08",
        ),
    ):
        assert words in lines[0]


def test_other_ranks_write_and_print_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_meter(tmp_path / "run", range(1, 3), is_main=False)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_an_unknown_peak_shows_no_mfu_and_nan_is_null(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = MetricsWriter(tmp_path, True)
    meter = StepMeter(writer, 1, 1, lambda counts: 0.0)
    result = StepOutcome(math.nan, math.inf, 0.0, StepReason.OVERFLOW, "fp16 overflow")
    meter.step(1, result, COUNTS, elapsed_s=1.0, data_wait_s=0.0)
    (record,) = read(tmp_path)
    assert record["loss"] is None and record["grad_norm"] is None and record["mfu"] is None
    text = capsys.readouterr().out
    assert "mfu" not in text and "SKIPPED" in text


def test_a_terminal_gets_one_line_drawn_anew_and_messages_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    import sft_fast.metrics.progress as progress

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    console = Console(file=terminal, force_terminal=True, width=200, highlight=False)
    monkeypatch.setattr(progress, "Console", lambda **options: console)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_DRAWS", 0.0)
    writer = MetricsWriter(tmp_path, True)
    meter = StepMeter(writer, 5, 2, lambda counts: 0.0)
    for step in (1, 2, 3):
        meter.step(step, OUTCOME, COUNTS, elapsed_s=1.0, data_wait_s=0.0)
    writer.log("eval at step 3")
    skipped = replace(OUTCOME, reason=StepReason.OVERFLOW, warning="overflow")
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_DRAWS", 1e9)
    meter.step(4, OUTCOME, COUNTS, elapsed_s=1.0, data_wait_s=0.0)
    meter.step(5, skipped, COUNTS, elapsed_s=1.0, data_wait_s=0.0)
    writer.end_progress()
    drawn = terminal.getvalue()
    monkeypatch.setattr("builtins.print", lambda text, flush: terminal.write(f"{text}\n"))
    writer.log("exported")
    assert terminal.getvalue() == f"{drawn}exported\n", "the line is not drawn again"
    writer.close()
    text = terminal.getvalue()
    for step in (1, 2, 3, 5):
        assert f"step {step}/5" in text
    assert "step 4/5" not in text, "drawing costs as much as a fast step"
    assert text.index("eval at step 3") < text.index("step 5/5")
    assert "\x1b[?25h" in text, "the cursor is shown again"
    assert "SKIPPED: overflow" in text and "loss" in text and "eta 0:00:0" in text
    assert [record["step"] for record in read(tmp_path)] == [2, 4, 5]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_line_shows_every_figure_at_any_width(width: int) -> None:
    from rich.console import Console

    from sft_fast.metrics.progress import ProgressLine

    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    figures = Window(2, 2.0, 0.5, 1e12, 1_234_567, 345_678, 1_300_000).speeds(1e12)
    figures |= {"loss": 1.5, "lr": 1e-5, "grad_norm": 0.25, "memory_gib": 96.2, "eta_s": 3725.0}
    shown = ProgressLine(1000, console)
    shown.update(420, {**figures, "was_skipped": False, "warning": ""})
    shown.close()
    assert isinstance(console.file, io.StringIO)
    text = re.sub(r"\x1b\[[?\d;]*\w", "", console.file.getvalue())
    words = " ".join(text.split())
    for part in ("step 420/1000", "42%", "eta 1:02:05", "loss 1.5000", "lr 1.00e-05"):
        assert part in words
    for part in ("grad norm 0.250", "memory 96.2 GiB", "data wait 25.0%", "tokens/s 617,284"):
        assert part in words
    for part in ("trained 172,839", "computed 650,000", "padding 5.0%", "mfu 50.0%"):
        assert part in words
    assert max(map(len, text.splitlines())) <= width


def test_a_warm_up_longer_than_the_run_is_warned_of(tmp_path: Path) -> None:
    from sft_fast.packing.from_config import warm_up_warning

    config = make_config(
        str(tmp_path), train={"steps": None, "epochs": 1}, optim={"warmup_steps": 20}
    )
    assert "optim.warmup_steps=2" in warm_up_warning(config.optim, 20)
    assert warm_up_warning(config.optim, 21) == ""


def test_waiting_for_data_is_measured_once() -> None:
    class Slow:
        def __iter__(self) -> "Slow":
            return self

        def __next__(self) -> int:
            return 1

    timed = Timed(iter(Slow()))
    assert next(timed) == 1
    assert timed.take_waited_s() > 0
    assert timed.take_waited_s() == 0


def test_durations_are_read_as_a_clock() -> None:
    assert (duration(3725.2), duration(0.4)) == ("1:02:05", "0:00:00")


class FakeTracker(types.ModuleType):
    """Stands in for wandb, trackio and mlflow: remembers every call."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> "FakeTracker":
            self.calls.append((name, arguments, options))
            return self

        return call


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_tracker_gets_the_figures_and_the_configuration(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft_fast.metrics.trackers import check_trackers, open_trackers

    fake = FakeTracker(name)
    monkeypatch.setitem(sys.modules, name, fake)
    metrics = {"trackers": [name], "project": "p", "run_name": "r"}
    config = make_config(tmp_path, metrics=metrics)
    check_trackers(config.metrics)
    writer = MetricsWriter(tmp_path, True, open_trackers(config, print))
    writer.write("eval", step=7, loss=2.0, perplexity=math.nan, name="text")
    writer.write("packing", capacity=3)
    writer.close()
    logged = [call for call in fake.calls if call[0] in ("log", "log_metrics")]
    assert logged == [(logged[0][0], ({"eval/loss": 2.0},), {"step": 7})]
    told = str(fake.calls)
    assert "'optim.lr': 0.001" in told and "'p'" in told and "'r'" in told
    assert fake.calls[-1][0] in ("finish", "end_run")


def test_tensorboard_files_hold_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from sft_fast.metrics.trackers import open_trackers

    config = make_config(tmp_path, metrics={"trackers": ["tensorboard"]})
    writer = MetricsWriter(tmp_path, True, open_trackers(config, print))
    for step in (1, 2):
        writer.write("step", step=step, loss=2.0 / step)
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("step/loss")] == [(1, 2), (2, 1)]


def test_a_missing_tracker_is_an_error_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft_fast.metrics.trackers import check_trackers

    monkeypatch.setitem(sys.modules, "trackio", None)
    config = make_config(tmp_path, metrics={"trackers": ["trackio"]})
    with pytest.raises(ValueError, match=r"pip install 'sft-fast\[trackio\]'"):
        check_trackers(config.metrics)


def test_the_profile_holds_its_steps_only(tmp_path: Path) -> None:
    import torch

    from sft_fast.metrics.profiling import ProfilerWindow

    config = make_config(tmp_path, metrics={"profile_steps": [2, 3]})
    window = ProfilerWindow(config.metrics, config.output_dir, is_main=True)
    written = []
    for step in range(1, 5):
        window.before(step)
        torch.ones(2) @ torch.ones(2)
        written.append(window.after(step))
    assert written == [None, None, tmp_path / "profile.json.gz", None]
    with gzip.open(tmp_path / "profile.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("name") == "aten::dot" for event in events) == 2


def test_only_the_main_rank_profiles(tmp_path: Path) -> None:
    from sft_fast.metrics.profiling import ProfilerWindow

    config = make_config(tmp_path, metrics={"profile_steps": [1, 1]})
    window = ProfilerWindow(config.metrics, config.output_dir, is_main=False)
    window.before(1)
    assert window.after(1) is None and not list(tmp_path.iterdir())


class Failing:
    """A tracker that raises what no file system does."""

    def __init__(self, fails_at: set[int]) -> None:
        self.fails_at, self.steps = fails_at, []

    def log(self, values: Any, step: int) -> None:
        self.steps.append(step)
        if step in self.fails_at:
            raise RuntimeError("the service is away")

    def close(self) -> None:
        raise RuntimeError("still away")


@pytest.mark.fault("F32")
def test_a_tracker_that_fails_is_told_of_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shaky, dead = Failing({1, 3, 4}), Failing(set(range(9)))
    writer = MetricsWriter(tmp_path, True, [shaky, dead])
    for step in range(6):
        writer.write("step", step=step, loss=1.0)
    writer.close()
    assert shaky.steps == list(range(6)) and dead.steps == [0, 1, 2]
    said = capsys.readouterr().out
    assert said.count("warning: Failing took no figures: the service is away") == 4
    assert said.count("left out from now on") == 1 and "did not end: still away" in said
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


@pytest.mark.fault("F32")
def test_a_tracker_that_does_not_start_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sft_fast.metrics.trackers import open_trackers

    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    config = make_config(tmp_path, metrics={"trackers": ["wandb"]})
    assert open_trackers(config, print) == []
    assert "metrics.trackers: wandb did not start" in capsys.readouterr().out


@pytest.mark.fault("F32")
def test_damaged_lines_of_the_metrics_cost_these_lines_only(tmp_path: Path) -> None:
    from sft_fast.runtime.run_files import read_run

    path = tmp_path / "metrics.jsonl"
    deep = b'{"kind": "step", "step": 3, "x": ' + b"[" * 100_000 + b"\n"
    path.write_bytes(b'{"kind": "step", "step": 1}\n{"kind": "\xff", "step": 2}\n' + deep)
    with path.open("ab") as file:
        file.write(b'{"kind": "step", "st')
    writer = MetricsWriter(tmp_path, True)
    writer.write("step", step=4)
    writer.close()
    assert [record["step"] for record in read_run(tmp_path).of_kind("step")] == [1, 4]
