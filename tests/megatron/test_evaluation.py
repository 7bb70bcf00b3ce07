"""Evaluation is the plain cross-entropy of transformers, per source, at every layout."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rank_pool import RankPool
from sft_fast.runtime.phases import Phases
from tiny import make_config, make_store, random_samples

NUM_SAMPLES, FIRST_OF_B = 13, 4
PLUGIN = Path(__file__).parents[1] / "metric_plugin.py"
METRICS = ["whole_answer", "first_entropy"]
SEQUENCE = {"tensor": 2, "sequence": True}
# name: world size, parallel section, packing section
LAYOUTS: dict[str, tuple[int, Any, Any]] = {
    "one": (1, {}, {}),
    "dp2": (2, {}, {}),
    "tp2-sequence": (2, SEQUENCE, {"alignment": 2}),
    "cp2": (2, {"context": 2}, {"alignment": 4}),
    "pp2-vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}, {}),
}


def make_samples() -> list[tuple[list[int], list[int]]]:
    """Random samples; the last one of source b is never supervised."""
    samples = random_samples(NUM_SAMPLES, seed=4)
    ids, _ = samples[-1]
    return [*samples[:-1], (ids, [0] * len(ids))]


def evaluation_of(folder: str, parallel_section: Any, packing_section: Any) -> Any:
    """(overall, by source) of a model with a training loss that is not the cross-entropy."""
    from sft_fast.megatron.evaluation import AnswerTally, evaluate
    from sft_fast.megatron.hf import SafetensorsSource
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.megatron.train_step import build_run
    from sft_fast.models.architecture import architecture_from_hf, read_hf_config
    from sft_fast.packing.from_config import make_plan
    from sft_fast.registry import get_metric, load_plugins

    config = make_config(
        model={"path": folder, "shape": None},
        tokenizer={"path": None},
        packing=packing_section,
        parallel=parallel_section,
        loss={"label_smoothing": 0.2, "z_loss": 0.1, "policy": "gradient_in_forward"},
        lora={"rank": 2, "dropout": 0.5},
    )
    load_plugins([str(PLUGIN)])
    parallel = init_parallel(config.parallel, config.train, config.seed)
    architecture = architecture_from_hf(read_hf_config(Path(folder)))
    weights = SafetensorsSource(Path(folder), architecture)
    run = build_run(config, architecture, weights, 1, parallel)
    files = ((0, "a.jsonl"), (2, "empty.jsonl"), (2, "a.jsonl"), (FIRST_OF_B, "b.jsonl"))
    store = replace(make_store(make_samples()), files=files)
    custom = [get_metric(name) for name in METRICS]
    most = config.evaluation.max_samples
    plan = make_plan(store, config.packing, config.train, config.seed, max_samples=most)
    tally = AnswerTally(custom, parallel)
    result = evaluate(run.model, store, plan, run.shape, parallel, tally, Phases.unwatched())
    assert all(chunk.training for chunk in run.model)
    return result


@pytest.fixture(scope="module")
def truth(llama: str) -> dict[str, dict[str, float]]:
    """What transformers says of each sample alone; source -> values."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    sums: dict[str, torch.Tensor] = {}
    for number, (ids, supervised) in enumerate(make_samples()):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        mask, labels = torch.tensor(supervised[1:]).bool(), torch.tensor(ids[1:])
        logprobs = logits.gather(1, labels[:, None])[mask, 0].double()
        correct = (logits.argmax(-1) == labels)[mask]
        row = torch.zeros(7, dtype=torch.float64)
        if mask.any():
            entropy = -(logits.exp() * logits).sum(-1)[mask][0] + labels[mask][0]
            custom = [float(correct.all()), 1, float(entropy - logprobs[-1]), 1]
            row = torch.tensor(
                [-logprobs.sum(), mask.sum(), correct.sum(), *custom], dtype=torch.float64
            )
        for source in ("all", "a.jsonl" if number < FIRST_OF_B else "b.jsonl"):
            sums[source] = sums.get(source, 0) + row
    return {
        source: {
            "loss": float(row[0] / row[1]),
            "perplexity": float((row[0] / row[1]).exp()),
            "num_supervised": int(row[1]),
            "accuracy": float(row[2] / row[1]),
            "whole_answer": float(row[3] / row[4]),
            "first_entropy": float(row[5] / row[6]),
        }
        for source, row in sums.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_is_that_of_transformers(
    rank_pool: RankPool, llama: str, truth: dict[str, dict[str, float]], layout: str
) -> None:
    world_size, *arguments = LAYOUTS[layout]
    for overall, by_source in rank_pool.run(world_size, evaluation_of, llama, *arguments):
        assert overall == pytest.approx(truth["all"], rel=1e-5)
        assert by_source.pop("empty.jsonl")["num_supervised"] == 0
        assert set(by_source) == {"a.jsonl", "b.jsonl"}
        for source, values in by_source.items():
            assert values == pytest.approx(truth[source], rel=1e-5), source


CONFIG = """
output_dir: {output}
plugins: [{plugin}]
model:
  dtype: fp32
  shape: {{hidden_size: 32, num_layers: 1, num_attention_heads: 2, num_key_value_heads: 2,
          ffn_hidden_size: 48, max_position_embeddings: 256}}
tokenizer: {{path: demo}}
data: {{train: {train}, eval: {eval}}}
packing: {{capacity: 64}}
train: {{steps: 40, global_batch_size: 2}}
optim: {{lr: {lr}, warmup_steps: 0, decay: constant}}
evaluation: {{every_steps: 2, patience: 2, metrics: [whole_answer], min_delta: 0.05}}
checkpoint: {{every_steps: 3, keep_best: true}}
export: {{best: true}}
"""


def call_main(arguments: list[str]) -> int:
    from sft_fast.train import main

    return main(arguments)


def records_of(run: Path, *kinds: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in line.items() if key != "time"}
        for line in lines
        if line["kind"] in kinds
    ]


def test_early_stopping_resumes_exactly_and_exports_the_best(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    files = {}
    for name, numbers in (("train", range(20)), ("eval", range(30, 36))):
        files[name] = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": f"next of {number}", "completion": "no"} for number in numbers]
        # What is learnt in training is wrong in the evaluation, after a while.
        rows = rows if name == "train" else [row | {"completion": "now"} for row in rows]
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(name: str, *overrides: str) -> None:
        path = tmp_path / f"{name}.yaml"
        path.write_text(CONFIG.format(output=tmp_path / name, plugin=PLUGIN, lr=0.01, **files))
        (code,) = rank_pool.run(1, call_main, ["--config", str(path), *overrides])
        assert code == 0

    train("whole")
    whole = tmp_path / "whole"
    evaluations = records_of(whole, "eval")
    (best,) = records_of(whole, "best")
    losses = {record["step"]: record["loss"] for record in evaluations}
    stopped_at = max(losses)
    assert best["step"] == stopped_at - 4 > 2, "two evaluations without an improvement"
    assert best["value"] == losses[best["step"]]
    kept = Path(best.pop("checkpoint"))
    assert kept.is_dir() and kept.name == f"step_{best['step']:08d}"
    assert stopped_at == records_of(whole, "step")[-1]["step"] < 40
    assert "whole_answer" in evaluations[0]
    saved = sorted(path.name for path in (whole / "checkpoints").iterdir())
    newest = {(stopped_at - 1) // 3 * 3, stopped_at}
    assert saved == [f"step_{step:08d}" for step in sorted({best["step"], *newest})]

    # Killed between the best evaluation and the stop: the same end.
    middle = f"checkpoints/step_{(stopped_at - 1) // 3 * 3:08d}"
    for copied in (middle, f"checkpoints/step_{best['step']:08d}"):
        shutil.copytree(whole / copied, tmp_path / "broken" / copied, dirs_exist_ok=True)
    train("broken")
    resumed = records_of(tmp_path / "broken", "eval", "best")
    assert Path(resumed[-1].pop("checkpoint")).parents[1] == tmp_path / "broken"
    assert resumed == [*evaluations[1 - len(resumed) :], best]
    train("broken")
    assert len(records_of(tmp_path / "broken", "eval", "best")) == len(resumed), "nothing to do"

    # The best weights are those of a run that ends there.
    train("short", f"train.steps={best['step']}", "evaluation.patience=null")
    exports = [
        load_file(tmp_path / name / "export/model.safetensors") for name in ("broken", "short")
    ]
    for name, tensor in exports[0].items():
        assert torch.equal(tensor, exports[1][name]), name


def test_questions_come_from_rows_of_any_format(rank_pool: RankPool, tmp_path: Path) -> None:
    """The model learns to say no; rows that ask for nothing it could say are passed over."""

    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def asked(number: int, answer: str) -> dict[str, str]:
        return {"prompt": f"next of {number}", "completion": answer}

    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    user = {"role": "user", "content": "next of 39"}
    chats = [
        {"messages": [user, {"role": "assistant", "content": "", "tool_calls": [call]}]},
        {"messages": [user, {"role": "assistant", "content": "no"}, user]},
    ]
    train = write("train.jsonl", [asked(number, "no") for number in range(20)])
    first = write("a.jsonl", [asked(30, "no"), asked(31, "now"), {"prompt": 3}, asked(32, "no")])
    second = write("b.jsonl", [{"q": "next of 33", "a": "no"}])
    third = write("c.jsonl", chats)
    path = tmp_path / "run.yaml"
    path.write_text(
        CONFIG.format(output=tmp_path / "run", plugin=PLUGIN, lr=0.01, train=train, eval=first)
    )
    sources = f"[{first}, {{path: {second}, fields: {{question: q, answer: a}}}}, {third}]"
    overrides = [f"data.eval={sources}", "data.on_bad_row=skip", "data.max_rejected=1.0"]
    overrides += ["evaluation.patience=null", "checkpoint.keep_best=false", "export.best=false"]
    overrides += ["evaluation.exact_match_samples=9", "evaluation.max_new_tokens=4"]
    overrides += ["packing.capacity=128", "evaluation.every_steps=null"]
    (code,) = rank_pool.run(1, call_main, ["--config", str(path), *overrides])
    assert code == 0
    (record,) = records_of(tmp_path / "run", "exact_match")
    assert record == {"kind": "exact_match", "exact_match": 0.8, "num_questions": 5}
