"""LoRA is what PEFT computes, at every layout; checkpoints resume; exports are the model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_runs import (
    assert_close,
    build,
    gradients,
    load_model,
    lora_config,
    losses_and_norms,
    mean_loss,
    take_steps,
)
from rank_pool import RankPool
from tiny import make_config, save_tiny_llama, vary_vectors
from trainer_calls import call_main

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME = ["model.layers.[13].self_attn.[qv]_proj", "down_proj"]
SEQUENCE = {"tensor": 2, "sequence": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
# name: world size, parallel section, model section
LAYOUTS: dict[str, tuple[int, Any, Any]] = {
    "recompute": (1, {}, {"recompute": "full"}),
    "recompute-mlp": (1, {}, {"recompute": "selective", "recompute_modules": ["mlp"]}),
    "dp2-overlap": (2, OVERLAP, {}),
    "dp2-plain-optimizer": (2, {"distributed_optimizer": False}, {}),
    "tp2": (2, {"tensor": 2}, {}),
    "tp2-sequence": (2, SEQUENCE, {}),
    "tp2-sequence-recompute": (2, SEQUENCE, {"recompute": "full"}),
    "cp2": (2, {"context": 2}, {}),
    "pp2-vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "tp2-pp2-sequence": (4, {"pipeline": 2, **SEQUENCE}, {}),
}
# Each part of them is in another layout, too.
SLOW_LAYOUTS = ("tp2-sequence-recompute", "recompute-mlp", "pp2-vpp2")
EXPECTED: dict[str, list[Any]] = {}


@pytest.mark.parametrize(
    ("layout", "targets"),
    [
        *((layout, "all") for layout in LAYOUTS if layout not in SLOW_LAYOUTS),
        ("tp2-pp2-sequence", "some"),
        ("tp2-pp2-sequence", "dora"),
        *(
            pytest.param(layout, targets, marks=pytest.mark.slow)
            for layout, targets in (
                *(("dp2-overlap", "some"), ("cp2", "some"), ("dp2-overlap", "dora")),
                *(("tp2", "dora"), ("recompute", "dora")),
                *((layout, "all") for layout in SLOW_LAYOUTS),
            )
        ),
    ],
)
def test_loss_and_gradient_norm_do_not_depend_on_the_layout(
    rank_pool: RankPool, llama: str, layout: str, targets: str
) -> None:
    lora = {"targets": SOME if targets == "some" else ALL, "dora": targets == "dora"}
    if targets not in EXPECTED:
        (EXPECTED[targets],) = rank_pool.run(1, losses_and_norms, llama, lora, {}, {})
        losses = [loss for loss, _ in EXPECTED[targets]]
        assert losses[0] > losses[1] > losses[2]
    world_size, *arguments = LAYOUTS[layout]
    for steps in rank_pool.run(world_size, losses_and_norms, llama, lora, *arguments):
        for step, (got, expected) in enumerate(zip(steps, EXPECTED[targets], strict=True)):
            # Adam divides small gradients by their size, so the roundings of each step add up.
            assert got == pytest.approx(expected, rel=1e-5 * (step + 1))


class OracleLora:
    """W x + scale * B A x, or DoRA's m / |W + scale * B A| times it, on a transformers model."""

    def __init__(self, model: Any, adapter: Path):
        from safetensors.torch import load_file

        config = json.loads((adapter / "adapter_config.json").read_text())
        rank = config["r"]
        self.scale = config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)
        tensors = load_file(adapter / "adapter_model.safetensors")
        self.pairs = {name: tensor.double() for name, tensor in tensors.items()}
        for target in config["target_modules"]:
            prefix = f"base_model.model.{target}.lora_"
            a, b = (self.pairs[f"{prefix}{letter}.weight"].requires_grad_() for letter in "AB")
            m = self.pairs.get(f"{prefix}magnitude_vector")
            assert (m is not None) == config["use_dora"]
            linear = model.get_submodule(target)
            linear.register_forward_hook(
                self.lora_hook(a, b) if m is None else self.dora_hook(a, b, m.requires_grad_())
            )

    def lora_hook(self, a: Any, b: Any) -> Any:
        return lambda module, inputs, out: out + self.scale * (inputs[0] @ a.T @ b.T)

    def dora_hook(self, a: Any, b: Any, m: Any) -> Any:
        def hook(module: Any, inputs: Any, out: Any) -> Any:
            weight = module.weight + self.scale * b @ a
            scaled = m / weight.detach().norm(dim=1)
            bias = 0 if module.bias is None else module.bias
            return scaled * (inputs[0] @ weight.T) + bias

        return hook


@pytest.mark.parametrize(
    ("world_size", "lora", "parallel"),
    [
        (1, {}, {}),
        (2, {"rslora": True}, SEQUENCE),
        (2, {"targets": SOME}, {"tensor": 2}),
        (2, {"targets": SOME, "dora": True}, SEQUENCE),
        (2, {"dora": True}, {"tensor": 2}),
    ],
)
def test_gradient_merge_and_export_equal_the_definition(
    rank_pool: RankPool, llama: str, tmp_path: Path, world_size: int, lora: Any, parallel: Any
) -> None:
    import torch

    arguments = (llama, str(tmp_path), lora, parallel)
    found = rank_pool.run(world_size, gradients, *arguments)[0]
    oracle_model = load_model(llama).requires_grad_(False)
    oracle = OracleLora(oracle_model, tmp_path / "adapter")
    mean_loss(oracle_model).backward()
    assert_close(found, {name: value.grad for name, value in oracle.pairs.items()})
    if lora.get("targets") == SOME:
        names = {name.split(".lora_")[0].rpartition("model.layers.")[2] for name in found}
        attention = {f"{layer}.self_attn.{name}_proj" for layer in (1, 3) for name in "qv"}
        assert names == attention | {f"{layer}.mlp.down_proj" for layer in range(4)}

    shutil.copy(Path(llama) / "config.json", tmp_path / "merged")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = oracle_model(ids).logits
        merged = load_model(tmp_path / "merged")(ids).logits
        assert (merged - expected).abs().max() < 2e-5 * expected.abs().max()
        assert (load_model(llama)(ids).logits - expected).abs().max() > 0.01


@pytest.mark.parametrize("parallel", [{}, SEQUENCE])
def test_a_fused_matrix_has_one_pair(rank_pool: RankPool, tmp_path: Path, parallel: Any) -> None:
    """Phi-3's queries, keys and values, and its gate and up; DoRA has their rows' lengths, too."""
    import torch

    save_tiny_llama(tmp_path, "phi3", num_hidden_layers=2)
    arguments = str(tmp_path), str(tmp_path), {"dora": bool(parallel)}, parallel
    found = rank_pool.run(2 if parallel else 1, gradients, *arguments)[0]
    modules = {name.split(".lora_")[0].rpartition(".")[2] for name in found}
    assert modules == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    model = load_model(tmp_path).requires_grad_(False)
    oracle = OracleLora(model, tmp_path / "adapter")
    mean_loss(model).backward()
    assert_close(found, {name: value.grad for name, value in oracle.pairs.items()})
    shutil.copy(tmp_path / "config.json", tmp_path / "merged")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = model(ids).logits
        merged = load_model(tmp_path / "merged")(ids).logits
    assert (merged - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("lora", [{"rslora": True}, {"dora": True}])
def test_peft_loads_the_adapter_and_has_the_same_gradient(
    rank_pool: RankPool, llama: str, tmp_path: Path, lora: Any
) -> None:
    peft = pytest.importorskip("peft")
    (found,) = rank_pool.run(1, gradients, llama, str(tmp_path), lora, {})
    base = load_model(llama)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).double()
    mean_loss(model).backward()
    expected = {
        name.replace("vector.default.weight", "vector").replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert_close(found, expected)


def what_is_frozen(folder: str) -> dict[str, Any]:
    import torch

    from sft_fast.megatron.model import unwrap

    config = lora_config(folder)
    run, *rest = build(config)
    model = unwrap(run.model[0])
    before = {name: value.clone() for name, value in model.named_parameters()}
    asks: list[bool] = []
    for layer in model.decoder.layers:
        linear = layer.self_attention.linear_qkv
        linear.register_forward_pre_hook(
            lambda module, inputs: asks.append(inputs[0].requires_grad)
        )
    take_steps(config, 1, run, *rest)
    changed = {
        name.rpartition(".")[2][:7]
        for name, value in model.named_parameters()
        if not torch.equal(value, before[name])
    }
    head = model.output_layer.weight
    has_gradient = hasattr(head, "main_grad") or head.grad is not None
    return {"changed": changed, "asks": asks[:4], "head has a gradient": has_gradient}


def test_the_base_is_frozen_and_the_first_layer_asks_for_no_input_gradient(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    save_tiny_llama(tmp_path, tie_word_embeddings=False)
    (result,) = rank_pool.run(1, what_is_frozen, str(tmp_path))
    assert result == {
        "changed": {"lora_a_", "lora_b_"},
        "asks": [False, True, True, True],
        "head has a gradient": False,
    }


def changes_of(folder: str, ratio: float) -> dict[str, Any]:
    """What one step adds to every parameter that is trained."""
    config = lora_config(folder, lora={"loraplus_lr_ratio": ratio})
    run, *rest = build(config)
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    take_steps(config, 1, run, *rest)
    return {
        name: (value - before[name]).detach().numpy()
        for name, value in run.model.named_parameters()
        if value.requires_grad
    }


def test_every_b_has_its_own_learning_rate(rank_pool: RankPool, experts: str) -> None:
    ((plain,), (faster,)) = (rank_pool.run(1, changes_of, experts, ratio) for ratio in (1.0, 4.0))
    for name, change in plain.items():
        ratio = 4 if ".lora_b_" in name else 1
        assert faster[name] == pytest.approx(change * ratio, rel=1e-3, abs=1e-7), name
    assert {name.rpartition(".")[2][:7] for name in plain} == {"lora_a_", "lora_b_"}
    assert any(".experts." in name and abs(change).max() > 1e-4 for name, change in plain.items())


def dropout_losses(folder: str, targets: list[str], parallel: Any) -> list[Any]:
    config = lora_config(folder, lora={"dropout": 0.3, "targets": targets}, parallel=parallel)
    return take_steps(config, 2, *build(config))


def test_dropout_masks_are_shared_where_the_input_is(rank_pool: RankPool, llama: str) -> None:
    column = ["q_proj", "v_proj", "up_proj"]
    (alone,) = rank_pool.run(1, dropout_losses, llama, column, {})
    for split in rank_pool.run(2, dropout_losses, llama, column, {"tensor": 2}):
        for got, expected in zip(split, alone, strict=True):
            assert got == pytest.approx(expected, rel=1e-5)
    (without,) = rank_pool.run(1, losses_and_norms, llama, {"targets": column}, {}, {})
    assert alone[0] != pytest.approx(without[0], rel=1e-3)
    for parallel in ({"tensor": 2}, SEQUENCE):
        first, second = rank_pool.run(2, dropout_losses, llama, ALL, parallel)
        assert first == second
        assert all(0 < loss < 20 for loss, _ in first)


SMALL = """
output_dir: {output}
seed: 7
model: {{path: {model}, dtype: {dtype}, verify: never}}
data: {{train: {train}}}
packing: {{capacity: 128}}
train: {{steps: 4, global_batch_size: 4}}
optim: {{lr: 1e-2, eps: 1e-3}}
lora: {{rank: 4, dropout: {dropout}, dora: {dora}, loraplus_lr_ratio: 4}}
checkpoint: {{every_steps: 2, keep_last: 3}}
"""


def train(pool: RankPool, world_size: int, *arguments: str) -> None:
    for code, _, err in pool.run(world_size, call_main, ["--config", *arguments]):
        assert code == 0, err


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A training file and a model with the demo tokenizer."""
    folder = tmp_path_factory.mktemp("chats")
    with (folder / "train.jsonl").open("w") as file:
        for number in range(60):
            user = {"role": "user", "content": f"next of {number}"}
            assistant = {"role": "assistant", "content": str(number + 1)}
            file.write(json.dumps({"messages": [user, assistant]}) + "\n")
    from transformers import LlamaConfig, LlamaForCausalLM

    from sft_fast.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("demo", None)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    vary_vectors(model)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return {"train": str(folder / "train.jsonl"), "model": str(folder / "model")}


def write_config(
    folder: Path, chats: dict[str, str], name: str, dtype: str = "fp32", dropout: float = 0.0
) -> str:
    path = folder / f"{name}.yaml"
    values = {"output": folder / name, "dtype": dtype, "dropout": dropout, **chats}
    path.write_text(SMALL.format(**values, dora=str(dtype == "bf16").lower()))
    return str(path)


def copy_checkpoint(source: Path, target: Path) -> None:
    name = "checkpoints/step_00000002"
    shutil.copytree(source / name, target / name)


def step_losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "step"]


def saved_names(checkpoint: Path) -> set[str]:
    from sft_fast.megatron.checkpoint.reading import ShardReader

    return set(ShardReader(checkpoint).shards)


@pytest.mark.parametrize(
    ("dtype", "dropout"), [("fp32", 0.2), pytest.param("bf16", 0.0, marks=pytest.mark.slow)]
)
def test_a_resumed_run_is_bit_identical(
    rank_pool: RankPool, chats: dict[str, str], tmp_path: Path, dtype: str, dropout: float
) -> None:
    import torch
    from safetensors.torch import load_file

    train(rank_pool, 2, write_config(tmp_path, chats, "unbroken", dtype, dropout))
    copy_checkpoint(tmp_path / "unbroken", tmp_path / "broken")
    train(rank_pool, 2, write_config(tmp_path, chats, "broken", dtype, dropout))
    assert step_losses(tmp_path / "broken") == step_losses(tmp_path / "unbroken")[2:]
    files = ("adapter/adapter_model.safetensors", "export/model.safetensors")
    for file in files:
        expected = load_file(tmp_path / "unbroken" / file)
        for name, value in load_file(tmp_path / "broken" / file).items():
            assert torch.equal(value, expected[name]), name
            assert "lora_B" not in name or value.any(), name

    if dtype == "bf16":  # one process, without optimizer: the same as at the end of the run
        from sft_fast.cli import main

        again = tmp_path / "again"
        assert main(["export", str(tmp_path / "unbroken"), "--to", str(again)]) == 0
        exported = load_file(again / "model.safetensors")
        expected = load_file(tmp_path / "unbroken/export/model.safetensors")
        assert exported.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in exported.items())

    names = saved_names(tmp_path / "unbroken/checkpoints/step_00000004")
    weights = {name for name in names if name.startswith(("decoder", "embedding", "output"))}
    assert weights and all(".lora_" in name for name in weights), weights


def test_adapters_resume_in_another_layout(
    rank_pool: RankPool, chats: dict[str, str], tmp_path: Path
) -> None:
    config = write_config(tmp_path, chats, "run")
    train(rank_pool, 1, config)
    losses = step_losses(tmp_path / "run")
    layouts = (["parallel.tensor=2", "parallel.sequence=true"], ["parallel.pipeline=2"])
    for number, layout in enumerate(layouts):
        other = tmp_path / f"layout{number}"
        copy_checkpoint(tmp_path / "run", other)
        train(rank_pool, 2, config, f"output_dir={other}", *layout)
        assert step_losses(other) == pytest.approx(losses[2:], rel=1e-5)


def test_adapters_of_fused_matrices_resume_in_another_layout(
    rank_pool: RankPool, chats: dict[str, str], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chats["model"])
    sizes = {"num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    save_tiny_llama(tmp_path / "model", "phi3", **sizes)
    tokenizer.save_pretrained(tmp_path / "model")
    config = write_config(tmp_path, chats | {"model": str(tmp_path / "model")}, "run")
    dora = "lora.dora=true"
    train(rank_pool, 1, config, dora)
    copy_checkpoint(tmp_path / "run", tmp_path / "split")
    layout = ["parallel.tensor=2", "parallel.sequence=true"]
    train(rank_pool, 2, config, dora, f"output_dir={tmp_path / 'split'}", *layout)
    assert step_losses(tmp_path / "split") == pytest.approx(step_losses(tmp_path / "run")[2:], 1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rank=8", "--allow-change adapter"),
        ("lora.rank=0", "--allow-change adapter"),
        ("lora.targets=[q_proj]", "--allow-change adapter"),
        ("lora.loraplus_lr_ratio=2.0", "was trained with 4.0, and this run has 2.0"),
        ("lora.targets=[q_proj, query] output_dir=fresh", "query: selects no projection"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    rank_pool: RankPool, chats: dict[str, str], tmp_path: Path, override: str, message: str
) -> None:
    config = write_config(tmp_path, chats, "run")
    train(rank_pool, 1, config, "train.steps=1", "export.enabled=false")
    overrides = override.replace("=fresh", f"={tmp_path / 'fresh'}").replace(", ", ",").split()
    ((code, _, err),) = rank_pool.run(
        1, call_main, ["--config", config, "train.steps=1", *overrides]
    )
    assert code != 0 and message in err


def test_adapters_are_refused_on_another_base(
    rank_pool: RankPool, chats: dict[str, str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    config = write_config(tmp_path, chats, "run")
    train(rank_pool, 1, config, "train.steps=1", "export.enabled=false")
    other = tmp_path / "other"
    shutil.copytree(chats["model"], other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"] *= 1.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    arguments = ["--config", config, "train.steps=1", f"model.path={other}"]
    ((code, _, err),) = rank_pool.run(1, call_main, arguments)
    assert code != 0 and "--allow-change adapter" in err


def test_dora_with_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lora\.dora"):
        make_config(lora={"rank": 2, "dora": True, "dropout": 0.1})
