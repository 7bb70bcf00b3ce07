"""The estimate of memory against what a training step holds, in bytes of the allocator."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import warm_start
from sft_fast.commands.plan import count_text, size_text, time_text
from sft_fast.config.schema import Config
from sft_fast.models.architecture import Architecture, architecture_from_shape
from sft_fast.models.estimate import (
    Memory,
    best_suggestions,
    bubble,
    estimate_memory,
    estimate_seconds,
    in_flight,
)
from sft_fast.models.flops import Workload, num_parameters
from tiny import make_config

VOCAB = 256
SHAPE = {
    "hidden_size": 128,
    "num_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "ffn_hidden_size": 448,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
LLAMA3_8B = Architecture(128256, 4096, 32, 32, 8, 14336, 128, 8192)


def tiny_architecture(config: Config, num_experts: int) -> Architecture:
    assert config.model.shape is not None
    architecture = architecture_from_shape(config.model.shape, VOCAB)
    if num_experts == 0:
        return architecture
    experts = {"num_experts": num_experts, "experts_per_token": 3, "ffn_hidden_size": 192}
    dense = {"dense_layers": frozenset([1]), "dense_ffn_size": 320, "shared_ffn_size": 256}
    return replace(architecture, family="Qwen2MoeForCausalLM", **experts, **dense)


def measure(
    folder: str,
    sections: dict[str, Any],
    samples: int,
    length: int,
    num_experts: int,
    queue: Any,
) -> None:
    """Trains a step; puts [weights, gradients, optimizer, the rest at its peak] in bytes."""
    import numpy as np
    import torch

    from allocations import most_bytes_held
    from sft_fast.megatron.batches import open_batches
    from sft_fast.megatron.hf import RandomSource
    from sft_fast.megatron.optim import torch_adam_parts
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.megatron.train_step import build_run, train_step
    from sft_fast.packing.from_config import make_plan
    from tiny import make_store

    config = make_config(folder, **sections)
    parallel = init_parallel(config.parallel, config.train, config.seed)
    architecture = tiny_architecture(config, num_experts)
    run = build_run(config, architecture, RandomSource(architecture, 0), 1, parallel)
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, VOCAB, length).tolist() for _ in range(samples)]
    store = make_store([(row, [0] * (length // 2) + [1] * (length // 2)) for row in ids])
    plan = make_plan(store, config.packing, config.train, config.seed)
    sizes = [
        sum(p.numel() * p.element_size() for p in run.model.parameters()),
        sum(4 * p.numel() for p in run.model.parameters()),
        sum(
            state.numel() * state.element_size()
            for part in torch_adam_parts(run.optimizer)
            for values in part.state.values()
            for state in values.values()
            if state.dim() > 0
        ),
    ]
    with open_batches(store, plan, range(2), run.shape, parallel) as batches:
        train_step(run, batches, plan.counts(0))
        peak = most_bytes_held(lambda: train_step(run, batches, plan.counts(1)))
    queue.put([*sizes, peak])
    torch.distributed.destroy_process_group()


def measured(
    tmp_path: Path, sections: dict[str, Any], samples: int, length: int, num_experts: int
) -> list[int]:
    context = warm_start.context()
    queue = context.Queue()
    arguments = (str(tmp_path), sections, samples, length, num_experts, queue)
    process = context.Process(target=measure, args=arguments)
    process.start()
    sizes: list[int] = queue.get(timeout=300)
    process.join(timeout=60)
    return sizes


CASES = {
    "plain": {},
    "long row of one micro-batch": {"train": {"micro_batch_size": 2, "global_batch_size": 2}},
    "recompute": {"model": {"recompute": "full"}},
    "bf16": {"model": {"dtype": "bf16"}},
    "experts": {},
    "experts, recompute": {"model": {"recompute": "full"}},
}


SLOW = ("long row of one micro-batch", "bf16", "experts, recompute")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in CASES]
)
def test_the_estimate_is_what_a_step_holds(name: str, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "model": {"dtype": "fp32", "shape": SHAPE, **CASES[name].get("model", {})},
        "packing": {"capacity": 1024},
        "train": {"steps": 2, "global_batch_size": 1, **CASES[name].get("train", {})},
    }
    rows = sections["train"]["global_batch_size"]
    num_experts = 6 if "experts" in name else 0
    sizes = measured(tmp_path, sections, 8 * rows, length=256, num_experts=num_experts)
    config = make_config(tmp_path, **sections)
    architecture = tiny_architecture(config, num_experts)
    memory = estimate_memory(architecture, config, 1, supervised_share=0.5, is_gpu=False)
    master = 0 if config.model.dtype == "fp32" else num_parameters(architecture) * 4
    assert memory.weights == sizes[0]
    assert memory.gradients == sizes[1]
    assert memory.optimizer == pytest.approx(sizes[2] + master, rel=0.01)
    assert memory.passing == pytest.approx(sizes[3], rel=0.1)


def llama3_config(**sections: dict[str, Any]) -> Config:
    values: dict[str, Any] = {
        "model": {"path": "org/llama", "dtype": "bf16"},
        "data": {"train": "demo"},
        "packing": {"capacity": 8192},
        "train": {"epochs": 1, "global_batch_size": 64},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Config.model_validate(values)


@pytest.mark.parametrize("data_parallel", [1, 8, 64])
@pytest.mark.parametrize("distributed", [True, False])
def test_bytes_a_parameter_are_those_of_megatrons_table(
    data_parallel: int, distributed: bool
) -> None:
    """bf16 parameters, fp32 gradients: 18 bytes, distributed 6 + 12 / d (Megatron's dist_optimizer
    guide)."""
    config = llama3_config(parallel={"distributed_optimizer": distributed})
    memory = estimate_memory(LLAMA3_8B, config, data_parallel)
    state = memory.weights + memory.gradients + memory.optimizer
    expected = 6 + 12 / data_parallel if distributed else 18
    assert state / num_parameters(LLAMA3_8B) == pytest.approx(expected, rel=1e-3)


def test_activations_of_a_layer_by_hand() -> None:
    """Llama 3 8B, one token: 2 bytes x (4 x 4096 + 2 x 4096 + 2 x 1024 + 3 x 14336) = 139264."""
    memory = estimate_memory(LLAMA3_8B, llama3_config(), 1)
    assert memory.activations == 139264 * 8192 * 32
    tensor = {"tensor": 2, "sequence": True}
    split = estimate_memory(LLAMA3_8B, llama3_config(parallel=tensor), 2)
    assert split.activations == memory.activations / 2
    # Without the outputs of the norms, 2 x 4096, and the product of gate and up.
    parts = {"recompute": "selective", "recompute_modules": ["norm", "activation"]}
    fewer = estimate_memory(LLAMA3_8B, llama3_config(model=parts), 1)
    assert fewer.activations == (139264 - 2 * (2 * 4096 + 14336)) * 8192 * 32
    # PyTorch keeps SiLU's output, and the norms' outputs without their weight in fp32.
    plain = estimate_memory(LLAMA3_8B, llama3_config(model={"kernels": "torch"}), 1)
    assert plain.activations == (139264 + 2 * (6 * 4096 + 14336)) * 8192 * 32
    # Without sequence parallelism the norms' 4 h are on every rank.
    whole = estimate_memory(LLAMA3_8B, llama3_config(parallel={"tensor": 2}), 2)
    assert whole.activations - split.activations == 2 * 2 * 4096 * 8192 * 32


def test_logits_stay_inside_their_budget_and_never_below_a_chunk() -> None:
    all_rows = estimate_memory(LLAMA3_8B, llama3_config(loss={"policy": "stored"}), 1)
    assert all_rows.logits == 8192 * 2 * (128256 + 4096)
    half = estimate_memory(LLAMA3_8B, llama3_config(loss={"policy": "stored"}), 1, 0.5)
    assert half.logits == all_rows.logits / 2
    small = estimate_memory(LLAMA3_8B, llama3_config(loss={"memory_budget_gib": 0.1}), 1)
    assert small.logits == 4096 * 2 * 128256 + 8192 * 2 * 4096


def test_logits_are_counted_as_the_loss_chooses() -> None:
    """A head of 2.10 GB in fp32, rows of 256,512 bytes, the budget of 2.15 GB."""

    def logits(micro_batch_size: int, **sections: dict[str, Any]) -> int:
        train = {"train": {"micro_batch_size": micro_batch_size}}
        memory = estimate_memory(LLAMA3_8B, llama3_config(**train, **sections), 1)
        hidden = micro_batch_size * 8192 * 2 * 4096
        return memory.logits - hidden

    row_bytes, sums = 2 * 128256, 4 * 128256 * 4096
    # Two chunks and the sums would be no less than all rows are.
    assert logits(2) == 2 * 8192 * row_bytes
    assert logits(4) == 8192 * row_bytes + sums
    assert logits(4, loss={"policy": "recompute"}) == 8192 * row_bytes
    assert logits(4, loss={"memory_budget_gib": 1.5}) == -(-32768 // 6) * row_bytes
    # A frozen head has no gradient, and a loss of one's own is not made one in the forward pass.
    assert logits(4, lora={"rank": 8}) == 8192 * row_bytes
    assert logits(4, loss={"custom": "own"}) == 8192 * row_bytes


def test_pipeline_stages_hold_as_many_micro_batches_as_there_are_stages() -> None:
    parallel = {"pipeline": 4}
    config = llama3_config(parallel=parallel)
    assert in_flight(config.parallel, 64) == 4 and in_flight(config.parallel, 2) == 2
    one = estimate_memory(LLAMA3_8B, llama3_config(), 1)
    four = estimate_memory(LLAMA3_8B, config, 4)
    assert four.activations == one.activations
    interleaved = llama3_config(parallel={"pipeline": 4, "virtual_pipeline": 2})
    assert in_flight(interleaved.parallel, 64) == pytest.approx(4 * (1 + 3 / 8))
    assert bubble(config.train, config.parallel, 4) == pytest.approx(3 / 64)
    assert bubble(interleaved.train, interleaved.parallel, 4) == pytest.approx(3 / 128)


def test_adapters_have_gradients_and_moments_of_their_own_only() -> None:
    memory = estimate_memory(LLAMA3_8B, llama3_config(lora={"rank": 16}), 1)
    assert memory.gradients == 4 * 41_943_040 and memory.optimizer == 12 * 41_943_040
    assert memory.weights == 2 * num_parameters(LLAMA3_8B)


def test_adapters_of_experts_are_spread_as_the_experts_are() -> None:
    mixture = replace(LLAMA3_8B, num_experts=8, experts_per_token=2, family="MixtralForCausalLM")
    attention, of_experts = 13_631_488, 32 * 8 * 3 * 16 * (4096 + 14336)
    config = llama3_config(lora={"rank": 16}, parallel={"expert": 4, "tensor": 2, "sequence": True})
    memory = estimate_memory(mixture, config, 8)
    assert memory.gradients == 4 * (attention // 2 + of_experts // 4)
    # Two ranks have each expert, four each part of attention.
    assert memory.optimizer == 12 * (attention // 2 // 4 + of_experts // 4 // 2)


def test_time_is_flops_over_rate() -> None:
    workload = Workload(10**9, 0, 10**9)
    c = llama3_config()
    seconds = estimate_seconds(
        LLAMA3_8B, c.model, c.train, c.parallel, c.lora, workload, 8, 1000, mfu=0.5
    )
    matrices = num_parameters(LLAMA3_8B) - 128256 * 4096
    assert seconds == pytest.approx(6 * matrices * 1e9 / (8 * 1e15 * 0.5), rel=1e-3)
    again = llama3_config(model={"recompute": "full"})
    slower = estimate_seconds(
        LLAMA3_8B, again.model, again.train, again.parallel, again.lora, workload, 8, 1000, mfu=0.5
    )
    assert slower == pytest.approx(seconds * 4 / 3)


def suggestions(config: Config, ranks: int, memory_gb: float) -> list[str]:
    workload = Workload(10**9, 10**12, 10**8)
    found = best_suggestions(LLAMA3_8B, config, workload, ranks, memory_gb * 1e9, 1000)
    return [suggestion.overrides for suggestion in found]


def test_knobs_make_a_run_fit_or_faster() -> None:
    config = llama3_config()
    assert estimate_memory(LLAMA3_8B, config, 8).total > 80e9
    too_big = best_suggestions(LLAMA3_8B, config, Workload(10**9, 10**12, 10**8), 8, 80e9, 1000)
    assert 0 < len(too_big) <= 3 and all(suggestion.memory_bytes <= 80e9 for suggestion in too_big)
    assert [suggestion.seconds for suggestion in too_big] == sorted(
        suggestion.seconds for suggestion in too_big
    )
    roomy = llama3_config(model={"recompute": "full"})
    assert suggestions(roomy, 8, 192)[0] == "model.recompute=none"
    assert suggestions(config, 8, 192) == []
    assert all("lora" not in suggestion for suggestion in suggestions(roomy, 8, 192))


def test_layouts_that_do_not_divide_the_model_are_not_proposed() -> None:
    odd = replace(LLAMA3_8B, num_key_value_heads=1)
    found = best_suggestions(odd, llama3_config(), Workload(10**9, 0, 1), 8, 60e9, 1000, count=99)
    assert found and all("tensor" not in suggestion.overrides for suggestion in found)


def test_a_memory_is_the_sum_of_its_parts() -> None:
    """Of logits and workspace the larger one counts: they are not there at the same time."""
    assert Memory(1, 2, 4, 8, 16, 32, 64).total == 127 - 16
    assert Memory(1, 2, 4, 8, 32, 16, 64).total == 127 - 16


def test_plan_says_steps_time_and_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sft_fast.cli import main

    arguments = ["plan", "demo", f"output_dir={tmp_path}", "--gpu", "mi355x", "--ranks", "2"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 120 and found["fits"] and found["gpu"] == "MI355X"
    memory = found["memory"]
    smaller = min(memory["logits"], memory["workspace"])
    assert (
        memory["total"] == sum(size for name, size in memory.items() if name != "total") - smaller
    )
    assert main([*arguments, "--plot", str(tmp_path / "plan.png")]) == 0
    text = capsys.readouterr().out
    assert "120 steps" in text and "2 x MI355X at 40%" in text and ": fits" in text
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, "train.steps=null", "train.epochs=1", "optim.warmup_steps=200"]) == 0
    assert "optim.lr is never reached" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (count_text, 8_030_261_248, "8.03 billion"),
        (count_text, 134_515_008, "134.5 million"),
        (count_text, 820_096, "820,096"),
        (size_text, 96.24e9, "96.2 GB"),
        (size_text, 838.9e6, "0.8 GB"),
        (size_text, 3_300_000, "3.3 MB"),
        (time_text, 5400, "1.5 hours"),
        (time_text, 90, "1.5 minutes"),
        (time_text, 59, "59 seconds"),
        (time_text, 0.26, "under a second"),
    ],
)
def test_figures_of_a_plan_have_units_that_suit_them(
    function: Callable[[float], str], value: float, text: str
) -> None:
    assert function(value) == text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "A100"], "expected one of MI300X"),
        (["--mfu", "1.5"], "expected a share"),
        (["--ranks", "5"], "data-parallel ranks"),
        (["--no-data", "--plot", "x.png"], "leave --no-data out"),
    ],
)
def test_plan_refuses_what_it_cannot_mean(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from sft_fast.cli import main

    assert main(["plan", "demo", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_recomputation_of_parts_lies_between_none_and_all() -> None:
    def total(**model: Any) -> tuple[int, float]:
        config = llama3_config(model=model)
        seconds = estimate_seconds(
            LLAMA3_8B,
            config.model,
            config.train,
            config.parallel,
            config.lora,
            Workload(10**9, 0, 1),
            1,
            1000,
        )
        return estimate_memory(LLAMA3_8B, config, 1).activations, seconds

    nothing, everything = total(), total(recompute="full")
    block = total(recompute="block", recompute_layers=8)
    part = total(recompute="selective", recompute_modules=["mlp"])
    # 8 of 32 layers keep 2 h bytes a token instead of 139264.
    assert block[0] == 8192 * (24 * 139264 + 8 * 2 * 4096)
    assert part[0] == 8192 * 32 * (139264 - 2 * 3 * 14336)
    every, some = (
        total(recompute="selective", recompute_modules=["norm", "activation"], **layers)[0]
        for layers in ({}, {"recompute_layers": 8})
    )
    assert nothing[0] - some == (nothing[0] - every) // 4 > 0
    for memory, seconds in (block, part):
        assert everything[0] < memory < nothing[0]
        assert nothing[1] < seconds < everything[1]


def test_context_parallel_ranks_share_rows_and_optimizer_state() -> None:
    parallel = {"context": 2}
    config = llama3_config(parallel=parallel, packing={"capacity": 8192, "alignment": 4})
    two, one = estimate_memory(LLAMA3_8B, config, 8), estimate_memory(LLAMA3_8B, llama3_config(), 8)
    # Each rank has a copy of its part of the attention's output.
    assert two.activations == one.activations / 2 + 2 * 4096 * 4096 * 32
    assert two.optimizer == one.optimizer and two.weights == one.weights


def test_experts_are_spread_over_their_own_ranks() -> None:
    mixtral = Architecture(
        *(32000, 4096, 32, 32, 8, 14336, 128, 32768),
        num_experts=8,
        experts_per_token=2,
        family="MixtralForCausalLM",
    )
    one = estimate_memory(mixtral, llama3_config(), 8)
    eight = estimate_memory(mixtral, llama3_config(parallel={"expert": 8}), 8)
    experts = 32 * 8 * 3 * 4096 * 14336
    assert one.weights - eight.weights == 2 * experts * 7 // 8
    # The state of all 8 ranks together is the same: 12 bytes a parameter.
    assert eight.optimizer == pytest.approx(one.optimizer, rel=1e-3)
    assert one.optimizer == pytest.approx(12 * num_parameters(mixtral) / 8, rel=1e-3)
