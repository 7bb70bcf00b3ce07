"""Stages of your own: groups, heads, losses and sections, with the reward model of examples/."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rank_pool import RankPool
from sft_fast.cli import main
from sft_fast.config.schema import load_config
from sft_fast.errors import ConfigError
from sft_fast.packing.bins import PackingOptions
from sft_fast.packing.steps import StepPlan
from trainer_calls import call_main

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "examples/reward/reward.py"
SMALL = """
stage: reward
plugins: [{plugin}]
output_dir: {output}
reward: {{margin: 0.1, centre: 0.05}}
model:
  dtype: fp32
  shape: {{hidden_size: 32, num_layers: 4, num_attention_heads: 4, num_key_value_heads: 2,
          ffn_hidden_size: 48, max_position_embeddings: 256, initializer_range: 0.1}}
tokenizer: {{path: demo}}
data: {{train: {train}, eval: {train}, eval_overlap: allow, format: comparison}}
packing: {{capacity: 128}}
train: {{steps: 4, global_batch_size: 8}}
optim: {{lr: 2e-3, warmup_steps: 1}}
checkpoint: {{every_steps: 2, keep_last: 3}}
evaluation: {{every_steps: 4, best_by: accuracy}}
"""
SAME_LOSSES = '''
"""A stage whose loss is that of supervised fine-tuning, written by itself."""
from sft_fast.registry import register_stage
from sft_fast.stages import Stage


@register_stage("nll")
class Nll(Stage):
    measures = {"confidence": True}

    def loss(self, outputs, tokens):
        assert outputs.shape == tokens.labels.shape == tokens.sample_index.shape
        return -outputs

    def measure(self, outputs, tokens):
        return {"confidence": outputs.exp()}
'''


PREFERENCE = '''
"""SimPO: mean log probabilities of two answers, compared."""
from torch.nn.functional import softplus

from sft_fast.config.sections import Section
from sft_fast.registry import register_stage
from sft_fast.stages import Stage


class SimpoConfig(Section):
    beta: float
    gamma: float


@register_stage("simpo")
class Simpo(Stage):
    section = SimpoConfig
    group_size = 2
    measures = {"accuracy": True}

    def targets(self, sample):
        return sample.with_shared_weight()

    def margins(self, outputs, tokens):
        counts = tokens.sum_by_sample(outputs.new_ones(outputs.shape))
        chosen, rejected = (tokens.sum_by_sample(outputs) / counts).view(-1, 2).unbind(1)
        return chosen - rejected

    def loss(self, outputs, tokens):
        losses = softplus(self.options.gamma - self.options.beta * self.margins(outputs, tokens))
        return losses.repeat_interleave(2)[tokens.sample_index]

    def measure(self, outputs, tokens):
        better = (self.margins(outputs, tokens) > 0).float()
        return {"accuracy": better.repeat_interleave(2)[tokens.sample_index]}
'''


def comparisons(folder: Path, count: int = 24) -> Path:
    """Questions whose better answer is in capitals, of different lengths."""
    path = folder / "pairs.jsonl"
    with path.open("w") as file:
        for number in range(count):
            word = "ab" * (1 + number % 5) + "cdefgh"[number % 6]
            record = {"prompt": f"upper {word}", "chosen": word.upper(), "rejected": word[::-1]}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comparisons(tmp_path_factory.mktemp("pairs"))


def write_config(folder: Path, pairs: Path, name: str = "run", text: str = SMALL) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text.format(output=folder / name, train=pairs, plugin=PLUGIN))
    return path


def train(pool: RankPool, world_size: int, *arguments: str) -> str:
    results = pool.run(world_size, call_main, list(arguments))
    assert all(code == 0 for code, _, _ in results), [error for _, _, error in results]
    out: str = results[0][1]
    return out


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


@pytest.fixture(scope="module")
def rewarded(rank_pool: RankPool, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on two data-parallel ranks."""
    folder = tmp_path_factory.mktemp("rewarded")
    train(rank_pool, 2, "--config", str(write_config(folder, pairs)))
    return folder / "run"


def hf_scores(folder: Path, pairs: Path) -> Any:
    """[pairs, 2]: rewards by transformers alone, as the exported README.md says to ask."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    scores = []
    for line in pairs.read_text().splitlines():
        record = json.loads(line)
        for name in ("chosen", "rejected"):
            chat = [
                {"role": "user", "content": record["prompt"]},
                {"role": "assistant", "content": record[name]},
            ]
            inputs = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")
            scores.append(model(**inputs).logits[0, 0])
    return torch.stack(scores).view(-1, 2)


def test_loss_and_measures_are_the_formula_s(rewarded: Path, pairs: Path) -> None:
    """What the run says of its last weights is what transformers computes of the export."""
    import torch

    with torch.no_grad():
        chosen, rejected = hf_scores(rewarded / "export", pairs).double().unbind(1)
    margin = chosen - rejected
    losses = torch.log1p(torch.exp(0.1 - margin)) + 0.05 * (chosen + rejected).square()
    said = records(rewarded, "eval")[-1]
    assert said["step"] == 4
    assert said["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert said["accuracy"] == pytest.approx((margin > 0).double().mean().item())
    assert said["reward_margin"] == pytest.approx(margin.mean().item(), rel=1e-4)
    assert records(rewarded, "eval")[0]["loss"] > said["loss"] and "perplexity" not in said


def test_the_gradient_is_that_of_the_mean_over_pairs(
    rank_pool: RankPool, pairs: Path, tmp_path: Path
) -> None:
    """One step with all pairs and a learning rate of 0, beside autograd through transformers."""
    import torch
    from transformers import AutoModelForSequenceClassification

    config = write_config(tmp_path, pairs)
    text = config.read_text().replace("lr: 2e-3, warmup_steps: 1", "lr: 1.0e-30, warmup_steps: 0")
    config.write_text(text)
    train(rank_pool, 1, "--config", str(config), "train.steps=1", "packing.capacity=256")
    (step,) = records(tmp_path / "run", "step")
    folder = tmp_path / "run/export"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    original = AutoModelForSequenceClassification.from_pretrained
    try:
        AutoModelForSequenceClassification.from_pretrained = lambda _: model  # type: ignore[method-assign]
        chosen, rejected = hf_scores(folder, pairs).unbind(1)
    finally:
        AutoModelForSequenceClassification.from_pretrained = original  # type: ignore[method-assign]
    losses = torch.nn.functional.softplus(0.1 - (chosen - rejected))
    (losses + 0.05 * (chosen + rejected).square()).mean().backward()
    gradients = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    assert step["grad_norm"] == pytest.approx(torch.stack(gradients).sum().sqrt().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(2, ["parallel.tensor=2"], marks=pytest.mark.slow),
        (2, ["parallel.tensor=2", "parallel.sequence=true"]),
        (2, ["parallel.pipeline=2"]),
        (1, ["train.micro_batch_size=2"]),
    ],
)
def test_no_layout_changes_the_losses(
    rank_pool: RankPool,
    rewarded: Path,
    pairs: Path,
    tmp_path: Path,
    world_size: int,
    layout: list[str],
) -> None:
    config = write_config(tmp_path, pairs)
    train(rank_pool, world_size, "--config", str(config), *layout)
    for one, other in zip(
        records(tmp_path / "run", "step"), records(rewarded, "step"), strict=True
    ):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_a_resumed_run_ends_with_the_same_bits(
    rank_pool: RankPool, rewarded: Path, pairs: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    config = write_config(tmp_path, pairs)
    saved = "checkpoints/step_00000002"
    shutil.copytree(rewarded / saved, tmp_path / "run" / saved)
    assert "at step 2 of 4" in train(rank_pool, 2, "--config", str(config))
    first, second = (
        load_file(run / "export/model.safetensors") for run in (rewarded, tmp_path / "run")
    )
    assert (
        first.keys() == second.keys() and "score.weight" in first and "lm_head.weight" not in first
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_head_is_exported_again_and_does_not_chat(
    rewarded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file

    again = ["export", str(rewarded), "--to", str(tmp_path / "again")]
    assert main(again) == 2 and "say --trust" in capsys.readouterr().err
    assert main([*again, "--trust"]) == 0
    first = load_file(rewarded / "export/model.safetensors")
    again = load_file(tmp_path / "again/model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    config = json.loads((rewarded / "export/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "LABEL_0"}
    card = (rewarded / "export/README.md").read_text()
    assert "AutoModelForSequenceClassification" in card and "text-classification" in card
    assert "Memory, planned and measured" in (rewarded / "report.html").read_text()
    capsys.readouterr()
    assert main(["chat", str(rewarded), "--ask", "upper ab"]) == 2
    assert "scores texts" in capsys.readouterr().err


def test_lora_trains_the_head_whole_and_peft_loads_both(
    rank_pool: RankPool, rewarded: Path, pairs: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    # A model with an LM head to start from: the reward model's, with one put on.
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(rewarded / "export").save_pretrained(base)
    AutoTokenizer.from_pretrained(rewarded / "export").save_pretrained(base)
    config = write_config(tmp_path, pairs)
    text = config.read_text()
    begin, end = text.index("  shape:"), text.index("tokenizer:")
    text = text[:begin] + f"  path: {base}\n" + text[end:]
    config.write_text(text.replace("tokenizer: {path: demo}", "tokenizer: {}"))
    train(rank_pool, 2, "--config", str(config), "lora.rank=4", "parallel.tensor=2")
    merged = hf_scores(tmp_path / "run/export", pairs)
    head = load_file(tmp_path / "run/adapter/adapter_model.safetensors")[
        "base_model.model.score.weight"
    ]
    exported = load_file(tmp_path / "run/export/model.safetensors")["score.weight"]
    assert torch.equal(head, exported)
    peft = pytest.importorskip("peft")
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "run/adapter").eval()
    original = AutoModelForSequenceClassification.from_pretrained
    try:
        AutoModelForSequenceClassification.from_pretrained = lambda _: adapted  # type: ignore[method-assign]
        by_peft = hf_scores(tmp_path / "run/export", pairs)
    finally:
        AutoModelForSequenceClassification.from_pretrained = original  # type: ignore[method-assign]
    torch.testing.assert_close(by_peft, merged, rtol=1e-4, atol=1e-5)


def test_a_loss_of_log_probabilities_is_that_of_supervised_fine_tuning(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    plugin = tmp_path / "nll.py"
    plugin.write_text(SAME_LOSSES)
    chats = tmp_path / "chats.jsonl"
    with chats.open("w") as file:
        for number in range(40):
            user = {"role": "user", "content": f"next of {number}"}
            answer = {"role": "assistant", "content": str(number + 1), "weight": 0.5 + number % 2}
            file.write(json.dumps({"messages": [user, answer]}) + "\n")
    text = SMALL.replace("format: comparison", "format: auto").replace("best_by: accuracy", "")
    lines = [line for line in text.splitlines() if not line.startswith(("stage", "plug", "reward"))]
    config = write_config(tmp_path, chats, text="\n".join(lines))
    train(rank_pool, 2, "--config", str(config), "parallel.tensor=2")
    own = [f"output_dir={tmp_path / 'own'}", "stage=nll", f"plugins=[{plugin}]"]
    train(rank_pool, 2, "--config", str(config), "parallel.tensor=2", *own)
    for one, other in zip(
        records(tmp_path / "own", "step"), records(tmp_path / "run", "step"), strict=True
    ):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert 0 < records(tmp_path / "own", "eval")[-1]["confidence"] < 1


def test_a_preference_of_whole_answers_is_the_formula_s(
    rank_pool: RankPool, pairs: Path, tmp_path: Path
) -> None:
    """On two tensor-parallel ranks, beside log probabilities by transformers of the export."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plugin = tmp_path / "simpo.py"
    plugin.write_text(PREFERENCE)
    config = write_config(tmp_path, pairs)
    text = config.read_text().replace("stage: reward", "stage: simpo")
    text = text.replace("reward: {margin: 0.1, centre: 0.05}", "simpo: {beta: 2.0, gamma: 0.5}")
    config.write_text(text.replace(f"[{PLUGIN}]", f"[{PLUGIN}, {plugin}]"))
    train(rank_pool, 2, "--config", str(config), "parallel.tensor=2", "train.micro_batch_size=2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export")
    means = []
    for line in pairs.read_text().splitlines():
        record = json.loads(line)
        user = {"role": "user", "content": record["prompt"]}
        for name in ("chosen", "rejected"):
            chat = [user, {"role": "assistant", "content": record[name]}]
            ids, asked = (
                tokenizer.apply_chat_template(turns, return_dict=True, **more)["input_ids"]
                for turns, more in ((chat, {}), (chat[:1], {"add_generation_prompt": True}))
            )
            # The template's tokens behind the answer's end are not trained.
            end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
            tokens = torch.tensor(ids[:end])
            with torch.no_grad():
                logprobs = model(tokens[None]).logits[0, :-1].double().log_softmax(-1)
            of_labels = logprobs.gather(1, tokens[1:, None])[:, 0]
            means.append(of_labels[len(asked) - 1 :].mean())
    chosen, rejected = torch.stack(means).view(-1, 2).unbind(1)
    losses = torch.nn.functional.softplus(0.5 - 2 * (chosen - rejected))
    said = records(tmp_path / "run", "eval")[-1]
    # Shared weights are float16.
    assert said["loss"] == pytest.approx(losses.mean().item(), rel=2e-3)
    assert said["accuracy"] == pytest.approx((chosen > rejected).double().mean().item(), rel=2e-3)


@pytest.mark.parametrize("strategy", ["bfd", "window", "sequential", "auto"])
@pytest.mark.parametrize("alignment", [1, 8])
def test_groups_share_a_bin_in_their_order(strategy: str, alignment: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 3 * 200).astype(np.int32)
    plan = StepPlan(
        lengths,
        np.ones_like(lengths),
        capacity=128,
        global_batch_size=4,
        strategy=strategy,
        options=PackingOptions(alignment, max_samples_per_bin=7),
        group_size=3,
    )
    seen: list[int] = []
    for step in range(plan.num_steps_per_epoch, 2 * plan.num_steps_per_epoch):
        for ids in plan.step_bins(*plan.locate(step)):
            assert len(ids) <= 6 and len(ids) % 3 == 0
            assert (ids.reshape(-1, 3) == ids[::3, None] + np.arange(3)).all()
            assert (ids[::3] % 3 == 0).all()
            assert (-(-lengths[ids] // alignment) * alignment).sum() <= 128
            seen += ids.tolist()
    assert sorted(seen) == list(range(600))


def test_groups_that_fit_no_bin_are_refused() -> None:
    lengths = np.array([60, 70, 10, 10], np.int32)
    with pytest.raises(ValueError, match="take up 130 tokens.*raise it"):
        StepPlan(lengths, lengths, capacity=128, global_batch_size=1, group_size=2)
    options = PackingOptions(max_samples_per_bin=1)
    with pytest.raises(ValueError, match="max_samples_per_bin is 1, but 2 samples"):
        StepPlan(lengths, lengths, capacity=256, global_batch_size=1, group_size=2, options=options)


GOOD = {"prompt": "upper ab", "chosen": "AB", "rejected": "ab"}
BAD_RECORDS = {
    "the same": (GOOD | {"rejected": "AB"}, "chosen and rejected are the same"),
    "empty": (GOOD | {"rejected": " "}, "'rejected' is empty"),
    "missing": ({"prompt": "upper ab", "chosen": "AB"}, "no column for 'rejected'"),
    "not a chat": (GOOD | {"chosen": [{"from": "gpt"}]}, "expected a text, or turns"),
    "no answer": (
        GOOD | {"chosen": [{"role": "user", "content": "x"}]},
        "does not end with an answer",
    ),
    "unknown column": (GOOD | {"system": "Be brief."}, "'system' is not read"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_bad_records_are_named(
    rank_pool: RankPool, pairs: Path, tmp_path: Path, bad: dict[str, Any], message: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(GOOD) + "\n" + json.dumps(bad) + "\n")
    config = write_config(tmp_path, rows)
    ((code, _, err),) = rank_pool.run(1, call_main, ["--config", str(config)])
    assert code == 2 and "rows.jsonl:2" in err and message in err


def test_too_long_pairs_follow_the_policy(
    rank_pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    long = GOOD | {"prompt": "upper " + "ab" * 40}
    rows.write_text(json.dumps(GOOD) + "\n" + json.dumps(long) + "\n")
    config = write_config(tmp_path, rows)
    ((code, _, err),) = rank_pool.run(1, call_main, ["--config", str(config)])
    assert code == 2 and "1 of 2 groups of samples" in err and "rows.jsonl:2: 190 tokens" in err
    for policy, samples in (("drop", 2), ("split_turns", 2), ("truncate_left", 4)):
        run = tmp_path / policy
        arguments = [f"data.over_length={policy}", "data.max_rejected=1", f"output_dir={run}"]
        train(rank_pool, 1, "--config", str(config), *arguments, "train.steps=2")
        assert records(run, "data")[-1]["samples"] == samples, policy


@pytest.mark.parametrize(("policy", "samples"), [("drop", 2), ("truncate_left", 4)])
def test_pairs_fit_with_their_padding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: str, samples: int
) -> None:
    """Lengths that fit as they are, and no more when each is padded to the alignment."""
    rows = tmp_path / "rows.jsonl"
    long = GOOD | {"prompt": "upper " + "ab" * 17, "chosen": "AB" * 12}
    rows.write_text(json.dumps(GOOD) + "\n" + json.dumps(long) + "\n")
    config = write_config(tmp_path, rows)
    overrides = ["packing.alignment=64", f"data.over_length={policy}", "data.max_rejected=1"]
    assert main(["data-report", str(config), "--json", *overrides]) == 0
    report = json.loads(capsys.readouterr().out)["train"]["build"]
    assert report["samples"] == samples
    assert main(["plan", str(config), *overrides]) == 0
    assert main(["preview", str(config), *overrides]) == 0


def test_a_mixture_by_weight_keeps_pairs_together(
    rank_pool: RankPool, pairs: Path, tmp_path: Path
) -> None:
    other = comparisons(tmp_path, 30)
    config = write_config(tmp_path, pairs)
    sources = f"[{{path: {pairs}, weight: 1}}, {{path: {other}, weight: 0.3}}]"
    arguments = [f"data.train={sources}", "data.num_processes=2", "train.steps=2"]
    train(rank_pool, 1, "--config", str(config), *arguments)
    (data,) = records(tmp_path / "run", "data")
    assert data["samples"] == 2 * (24 + 7)
    evaluation = records(tmp_path / "run", "eval")[0]
    assert evaluation["loss"] > 0


WRONG = {
    "a stage nobody knows": (["stage=rewrad"], "stage", "one of sft, reward"),
    "no plugin": (["plugins=[nowhere.py]"], "plugins", "does not exist"),
    "a key of the section": (["reward.margn=1"], "reward.margn", "did you mean reward.margin"),
    "its value": (["reward.margin=-1"], "reward.margin", "greater than or equal to 0"),
    "of the loss": (["loss.z_loss=0.1"], "loss.z_loss", "has no effect in the stage reward"),
    "metrics of words": (["evaluation.best_by=perplexity"], "evaluation.best_by", "accuracy"),
    "questions": (
        ["evaluation.exact_match_samples=3"],
        "evaluation.exact_match_samples",
        "has no effect",
    ),
    "answers": (["metrics.samples=3"], "metrics.samples", "has no effect"),
    "a stream": (["data.streaming=true"], "data.streaming", "must share a micro-batch"),
    "context": (
        ["parallel.context=2", "packing.alignment=4"],
        "parallel.context",
        "divide the samples",
    ),
    "a section of another stage": (["stage=sft"], "reward", "unknown section"),
}


@pytest.mark.parametrize(("overrides", "key", "message"), WRONG.values(), ids=WRONG)
def test_what_a_stage_cannot_do_is_said_at_its_key(
    pairs: Path, tmp_path: Path, overrides: list[str], key: str, message: str
) -> None:
    config = write_config(tmp_path, pairs)
    with pytest.raises(ConfigError) as caught:
        load_config(config, overrides)
    text = str(caught.value)
    assert key in text and message in text, text


def test_formats_and_stages_that_do_not_fit_are_named(
    rank_pool: RankPool, pairs: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, pairs)
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    arguments = ["--config", str(config), f"data.train={chats}", "data.format=auto"]
    ((code, _, err),) = rank_pool.run(1, call_main, arguments)
    assert code == 2 and "gives 1 conversations a record, but the stage 'reward' takes 2" in err
    text = config.read_text().replace("stage: reward", "").replace("reward: {margin", "# ")
    sft = tmp_path / "sft.yaml"
    sft.write_text(text.replace("best_by: accuracy", "best_by: loss"))
    ((code, _, err),) = rank_pool.run(1, call_main, ["--config", str(sft)])
    assert code == 2 and "gives 2 conversations a record, but the stage 'sft' takes 1" in err


def test_a_stage_has_a_name_of_its_own() -> None:
    from sft_fast.registry import register_stage, stages
    from sft_fast.stages import Stage, stage_of

    with pytest.raises(ValueError, match="expected letters"):
        register_stage("my-stage")
    with pytest.raises(ValueError, match="is taken"):
        register_stage("sft")(Stage)
    assert "sft" not in stages.entries
    config = load_config(None, [])
    assert type(stage_of(config)) is Stage


def test_the_example_s_own_configuration_is_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples/reward", tmp_path / "examples/reward")
    import runpy

    runpy.run_path("examples/reward/make_comparisons.py", run_name="__main__")
    # One process runs one file for a name: the one that other tests have run.
    example = ["examples/reward/reward.yaml", f"plugins=[{PLUGIN}]"]
    assert main(["check", *example]) == 0
    for command in (["preview"], ["data-report"], ["plan"]):
        assert main([*command, *example]) == 0, command
    out = capsys.readouterr().out
    assert "1448 samples of 724 records" in out and "! " not in out
    lines = sum(1 for _ in PLUGIN.open())
    assert lines < 150
