"""LoRA on experts is W + scale * B A of each, at every layout, and PEFT loads what is exported."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_runs import (
    assert_close,
    build,
    expert_adapters,
    gradients,
    load_model,
    lora_config,
    losses_and_norms,
    mean_loss,
    take_steps,
)
from rank_pool import RankPool
from tiny import save_tiny_llama

SEQUENCE = {"tensor": 2, "sequence": True}
# name: world size, parallel section, model section
LAYOUTS: dict[str, tuple[int, Any, Any]] = {
    "ep2": (2, {"expert": 2}, {}),
    "etp2": (2, {"expert_tensor": 2}, {}),
    "tp2-etp2": (2, {"expert_tensor": 2, **SEQUENCE}, {}),
}
SLOW_LAYOUTS: dict[str, tuple[int, Any, Any]] = {
    "tp2-ep2": (2, {"expert": 2, **SEQUENCE}, {}),
    "recompute": (1, {}, {"recompute": "full"}),
    "recompute-moe": (1, {}, {"recompute": "selective", "recompute_modules": ["moe"]}),
    "cp2-ep2": (2, {"context": 2, "expert": 2}, {}),
    "etp2-plain-optimizer": (2, {"expert_tensor": 2, "distributed_optimizer": False}, {}),
    "dp2-overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}, {}),
    "pp2-ep2": (4, {"pipeline": 2, "expert": 2}, {}),
    "ep2-etp2": (4, {"expert": 2, "expert_tensor": 2}, {}),
    "tp2-ep2-etp2": (4, {"expert": 2, "expert_tensor": 2, **SEQUENCE}, {}),
}


@pytest.fixture(scope="module")
def truth(rank_pool: RankPool, experts: str) -> list[tuple[float, float]]:
    (steps,) = rank_pool.run(1, losses_and_norms, experts, {}, {}, {})
    losses = [loss for loss, _ in steps]
    assert losses[0] > losses[1] > losses[2]
    return steps


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_LAYOUTS)]
)
def test_loss_and_gradient_norm_do_not_depend_on_the_layout(
    rank_pool: RankPool, experts: str, truth: list[tuple[float, float]], layout: str
) -> None:
    world_size, *arguments = (LAYOUTS | SLOW_LAYOUTS)[layout]
    for steps in rank_pool.run(world_size, losses_and_norms, experts, {}, *arguments):
        for step, (got, expected) in enumerate(zip(steps, truth, strict=True)):
            # Adam divides small gradients by their size, so the roundings of each step add up.
            assert got == pytest.approx(expected, rel=1e-5 * (step + 1))


def add_deltas(model: Any, folder: Path) -> dict[str, Any]:
    """Gives a model of transformers what a per-expert adapter adds; its leaves, by name."""
    import torch
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    leaves = {
        name: tensor.to(model.dtype).requires_grad_()
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }

    def delta(name: str) -> Any:
        a, b = (leaves.get(f"base_model.model.{name}.lora_{x}.weight") for x in "AB")
        return None if a is None else scale * b @ a

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and (added := delta(name)) is not None:
            weight = module.weight.data + added
            del module.weight
            module.weight = weight
        if name.endswith("mlp.experts"):
            numbers = range(module.num_experts)
            every = {
                key: torch.stack([delta(f"{name}.{number}.{key}_proj") for number in numbers])
                for key in ("gate", "up", "down")
            }
            wide = module.gate_up_proj.data + torch.cat([every["gate"], every["up"]], 1)
            narrow = module.down_proj.data + every["down"]
            del module.gate_up_proj, module.down_proj
            module.gate_up_proj, module.down_proj = wide, narrow
    return leaves


def eager_model(folder: str | Path) -> Any:
    """In fp64, one expert after the other."""
    model = load_model(folder)
    model.set_experts_implementation("eager")
    return model.requires_grad_(False)


CASES = {
    "all": (1, {"alpha": 7.0}, {}),
    "rslora-ep2": (2, {"rslora": True}, {"expert": 2, **SEQUENCE}),
    "some-etp2": (
        2,
        {"targets": ["v_proj", "gate_proj", "model.layers.[12].mlp.experts.*.down_proj"]},
        {"expert_tensor": 2, **SEQUENCE},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_gradient_merge_and_export_equal_the_definition(
    rank_pool: RankPool, experts: str, tmp_path: Path, case: str
) -> None:
    import torch

    world_size, lora, parallel = CASES[case]
    found = rank_pool.run(world_size, gradients, experts, str(tmp_path), lora, parallel)[0]
    model = eager_model(experts)
    leaves = add_deltas(model, tmp_path / "per_expert")
    mean_loss(model).backward()
    # What was not adapted is there as zeros, for PEFT.
    extra = leaves.keys() - found.keys()
    assert all(not leaves[name].any() for name in extra)
    assert (len(extra) > 0) == (case == "some-etp2")
    assert len([name for name in leaves if ".experts." in name]) == 4 * 4 * 3 * 2
    assert_close(found, {name: leaves[name].grad for name in found})

    shutil.copy(Path(experts) / "config.json", tmp_path / "merged")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = model(ids).logits
        merged = eager_model(tmp_path / "merged")(ids).logits
        assert (merged - expected).abs().max() < 2e-5 * expected.abs().max()
        assert (eager_model(experts)(ids).logits - expected).abs().max() > 0.01


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16}),
        ("mixtral", {"num_local_experts": 4}),
    ],
)
@pytest.mark.parametrize(
    "lora", [{"rslora": True}, {"targets": ["q_proj", "*.experts.*.gate_proj", "*.experts.*.w1"]}]
)
def test_peft_loads_both_forms(
    rank_pool: RankPool, tmp_path: Path, family: str, options: Any, lora: Any
) -> None:
    peft = pytest.importorskip("peft")
    import torch

    save_tiny_llama(tmp_path, family, num_experts_per_tok=2, num_hidden_layers=2, **options)
    name = {"qwen3_moe": "gate_proj", "mixtral": "w1"}[family]
    if "targets" in lora:
        lora = {"targets": [target for target in lora["targets"] if target[-2:] != "w1"]}
        lora["targets"][1] = f"model.layers.1.*.{name}"
    rank_pool.run(1, gradients, str(tmp_path), str(tmp_path), lora, {})
    shutil.copy(tmp_path / "config.json", tmp_path / "merged")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = eager_model(tmp_path / "merged")(ids).logits
        plain = eager_model(tmp_path)(ids).logits
        assert (plain - expected).abs().max() > 0.01
        for form in ("adapter", "per_expert"):
            model = peft.PeftModel.from_pretrained(eager_model(tmp_path), tmp_path / form)
            found = model.double()(ids).logits
            assert (found - expected).abs().max() < 1e-5 * expected.abs().max(), form


def dropout_steps(folder: str, lora: Any, parallel: Any, model: Any) -> list[Any]:
    return losses_and_norms(folder, {"dropout": 0.3, **lora}, parallel, model)


def test_dropout_is_that_of_the_step_whoever_computes_it(
    rank_pool: RankPool, experts: str, truth: list[tuple[float, float]]
) -> None:
    """Recomputation draws the same masks; ranks that share experts share those of the input."""
    lora = {"targets": ["gate_proj", "up_proj", "down_proj"]}
    (plain,) = rank_pool.run(1, dropout_steps, experts, lora, {}, {})
    (again,) = rank_pool.run(1, dropout_steps, experts, lora, {}, {"recompute": "full"})
    for got, expected in zip(again, plain, strict=True):
        assert got == pytest.approx(expected, rel=1e-5)
    assert plain[0][0] != pytest.approx(truth[0][0], rel=1e-4)
    # The inputs of gate and up have the masks of one rank, whatever part of them a rank has.
    lora = {"targets": ["gate_proj", "up_proj"]}
    layouts = [{"expert_tensor": 2, **SEQUENCE}, SEQUENCE]
    of_two = [rank_pool.run(2, dropout_steps, experts, lora, layout, {}) for layout in layouts]
    for steps in of_two:
        assert steps[0] == steps[1]
        assert all(math.isfinite(loss) and 0 < loss < 20 for loss, _ in steps[0])


def kept_shared(folder: str, parallel: Any) -> list[tuple[bool, bool]]:
    """(is the same on the ranks that share experts, is counted in the norm) of each adapter."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared

    config = lora_config(folder, parallel=parallel)
    run, *rest = build(config)
    take_steps(config, 1, run, *rest)
    found = []
    for experts, projection in expert_adapters(run.model):
        for letter, parameter in experts.parameters_of(projection).items():
            if projection.split_dims[letter] is not None:
                continue
            others: list[Any] = [None] * experts.etp_group.size()
            dist.all_gather_object(others, parameter.detach(), group=experts.etp_group)
            is_same = all(other.equal(parameter) for other in others)
            is_counted = param_is_not_shared(parameter)
            assert param_is_not_tensor_parallel_duplicate(parameter)
            found.append((is_same, is_counted))
    return found


def test_what_ranks_share_stays_the_same_and_counts_once(rank_pool: RankPool, experts: str) -> None:
    first, second = rank_pool.run(2, kept_shared, experts, {"expert_tensor": 2})
    assert first and all(pair == (True, True) for pair in first)
    assert all(pair == (True, False) for pair in second)
