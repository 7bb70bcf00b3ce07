"""Runs of a model with experts: checkpoints move between layouts, and the export is the model."""

import json
import shutil
from pathlib import Path

import pytest

from rank_pool import RankPool
from tiny import vary_vectors
from trainer_calls import call_main

CONFIG = """\
output_dir: {output}
model: {{path: {model}, dtype: fp32, verify: never}}
data: {{train: {train}}}
packing: {{capacity: 64}}
train: {{steps: 4, global_batch_size: 4}}
optim: {{lr: 1.0e-3, eps: 1.0e-3, decay: constant}}
router: {{aux_loss_coef: 0.05, bias_update_rate: 0.01}}
checkpoint: {{every_steps: 2, keep_last: 9}}
"""
EXPERTS = ["parallel.expert=2"]
SEQUENCE = ["parallel.tensor=2", "parallel.sequence=true"]


def train(pool: RankPool, world_size: int, config: Path, *overrides: str) -> None:
    arguments = ["--config", str(config), *overrides]
    for code, _, err in pool.run(world_size, call_main, arguments):
        assert code == 0, err


def steps(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "step"]


def step_losses(run: Path) -> list[float]:
    return [line["loss"] for line in steps(run)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

    from sft_fast.data.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("experts")
    with (folder / "train.jsonl").open("w") as file:
        for number in range(60):
            user = {"role": "user", "content": f"next of {number}"}
            assistant = {"role": "assistant", "content": str(number + 1)}
            file.write(json.dumps({"messages": [user, assistant]}) + "\n")
    tokenizer = load_tokenizer("demo", None)
    shape = MiniMaxM2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rotary_dim=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        intermediate_size=24,
        initializer_range=0.3,
    )
    model = MiniMaxM2ForCausalLM(shape)
    vary_vectors(model)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    paths = {"train": folder / "train.jsonl", "model": folder / "model", "output": folder / "run"}
    (folder / "config.yaml").write_text(CONFIG.format(**paths))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def run(rank_pool: RankPool, config: Path) -> Path:
    """Trained over two expert-parallel ranks."""
    train(rank_pool, 2, config, *EXPERTS)
    return config.parent / "run"


@pytest.mark.parametrize(
    ("world_size", "layout"), [(1, []), (2, EXPERTS), (2, SEQUENCE), (2, ["parallel.pipeline=2"])]
)
def test_a_run_continues_at_any_layout(
    rank_pool: RankPool, config: Path, run: Path, tmp_path: Path, world_size: int, layout: list[str]
) -> None:
    name = "checkpoints/step_00000002"
    shutil.copytree(run / name, tmp_path / name)
    train(rank_pool, world_size, config, f"output_dir={tmp_path}", *layout)
    losses = step_losses(run)[2:]
    if layout == EXPERTS:
        assert step_losses(tmp_path) == losses
    else:
        assert step_losses(tmp_path) == pytest.approx(losses, rel=1e-5)


def test_a_step_tells_the_load_of_the_experts(run: Path) -> None:
    for line in steps(run):
        assert 1 <= line["expert_load"] <= line["expert_load_worst"] <= 4
        assert 0 <= line["empty_experts"] <= 0.75 and line["router_aux_loss"] > 0


def test_the_export_is_the_trained_model(rank_pool: RankPool, config: Path, run: Path) -> None:
    """Exported by two ranks, and once more by one from the checkpoint."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    exported: dict = {}
    for path in (run / "export").glob("*.safetensors"):
        exported.update(load_file(path))
    model, info = AutoModelForCausalLM.from_pretrained(run / "export", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    again = run.parent / "again"
    overrides = [f"checkpoint.resume={run / 'checkpoints/step_00000004'}", f"output_dir={again}"]
    train(rank_pool, 1, config, *overrides)
    lone = load_file(again / "export/model.safetensors")
    assert lone.keys() == exported.keys()
    before = load_file(config.parent / "model/model.safetensors")
    for name, tensor in lone.items():
        assert tensor.equal(exported[name]), name
        assert not tensor.equal(before[name]), name


def broken_export(arguments: list[str]) -> tuple[int, str, str]:
    """A run whose export loses the order of query heads."""
    from sft_fast.megatron.export import weights

    original = weights.merge_shards

    def merge(rule: object, *rest: object) -> list:
        tensors = original(rule, *rest)
        return [tensor.flip(0) if rule.split == "qkv" else tensor for tensor in tensors]

    weights.merge_shards = merge
    try:
        return call_main(arguments)
    finally:
        weights.merge_shards = original


def test_an_export_that_computes_something_else_is_refused(
    rank_pool: RankPool, config: Path, tmp_path: Path
) -> None:
    arguments = ["--config", str(config), f"output_dir={tmp_path}", "train.steps=1"]
    ((code, _, err),) = rank_pool.run(1, broken_export, arguments)
    assert code != 0 and "the logits of the exported model are off" in err
    assert not (tmp_path / "export").exists()


def test_adapters_of_experts_continue_at_any_layout(
    rank_pool: RankPool, config: Path, run: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    lora = ["lora.rank=2", "lora.dropout=0.0", "router.bias_update_rate=0"]
    train(rank_pool, 2, config, *EXPERTS, *lora, f"output_dir={tmp_path / 'first'}")
    losses = step_losses(tmp_path / "first")
    assert losses[0] == pytest.approx(step_losses(run)[0], rel=1e-5)
    name = "checkpoints/step_00000002"
    layouts = {"same": EXPERTS, "shared": [*SEQUENCE, "parallel.expert_tensor=2"]}
    for key, layout in layouts.items():
        shutil.copytree(tmp_path / "first" / name, tmp_path / key / name)
        output = f"output_dir={tmp_path / key}"
        train(rank_pool, 2, config, *lora, *layout, output)
        exact = key == "same"
        assert step_losses(tmp_path / key) == (
            losses[2:] if exact else pytest.approx(losses[2:], rel=1e-5)
        )
    adapters = [load_file(tmp_path / key / "adapter/adapter_model.safetensors") for key in layouts]
    expected = load_file(tmp_path / "first/adapter/adapter_model.safetensors")
    trained = [
        tensor for name, tensor in expected.items() if ".mlp.experts.base_layer.lora_B" in name
    ]
    assert len(trained) == 2 and all(tensor.any() for tensor in trained)
    assert adapters[0].keys() == adapters[1].keys() == expected.keys()
    assert all(adapters[0][name].equal(expected[name]) for name in expected)


@pytest.mark.slow
def test_the_demo_of_a_mixture_trains_and_exports(rank_pool: RankPool, tmp_path: Path) -> None:
    from sft_fast.recipes import find_recipe

    arguments = [f"output_dir={tmp_path}", "train.steps=2", "optim.warmup_steps=1"]
    arguments += ["evaluation.max_samples=20", "evaluation.exact_match_samples=2"]
    train(rank_pool, 1, find_recipe("demo_moe"), *arguments)
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"] and config["num_local_experts"] == 8
    assert "expert load" in (tmp_path / "report.html").read_text()
