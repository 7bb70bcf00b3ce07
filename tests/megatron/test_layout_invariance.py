"""One global batch gives one loss and one gradient, however it is laid out over ranks and rows."""

from pathlib import Path
from typing import Any

import pytest

from rank_pool import RankPool
from tiny import make_config, make_store, random_samples, save_tiny_llama

NUM_SAMPLES = 16
BFD, NONE = {"strategy": "bfd"}, {"strategy": "none"}
ALIGNED = {"strategy": "bfd", "alignment": 4}
Section = dict[str, Any]
# name: world size, packing section, micro_batch_size, parallel section, model section
LAYOUTS: dict[str, tuple[int, Section, int, Section, Section]] = {
    "micro-batch-8": (1, BFD, 8, {}, {}),
    "recompute": (1, BFD, 2, {}, {"recompute": "full"}),
    "recompute-selective": (
        1,
        BFD,
        2,
        {},
        {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]},
    ),
    "tp2-vpp2-recompute-block": (
        4,
        BFD,
        2,
        {"pipeline": 2, "virtual_pipeline": 2, "tensor": 2, "sequence": True},
        {"recompute": "block", "recompute_layers": 1},
    ),
    "window": (1, {"strategy": "window"}, 2, {}, {}),
    "sequential": (1, {"strategy": "sequential"}, 4, {}, {}),
    "aligned": (1, {"strategy": "auto", "alignment": 8, "max_samples_per_bin": 2}, 2, {}, {}),
    "unpacked": (1, NONE, 4, {}, {}),
    "dp2": (2, BFD, 2, {}, {}),
    "dp2-plain-optimizer": (2, BFD, 2, {"distributed_optimizer": False}, {}),
    "dp2-overlap": (
        2,
        BFD,
        1,
        {"overlap_grad_reduce": True, "overlap_param_gather": True},
        {},
    ),
    "tp2": (2, BFD, 1, {"tensor": 2}, {}),
    "tp2-sequence": (2, BFD, 2, {"tensor": 2, "sequence": True}, {}),
    "pp2": (2, BFD, 1, {"pipeline": 2}, {}),
    "pp2-unpacked": (2, NONE, 4, {"pipeline": 2, "stage_layers": [3, 1]}, {}),
    "pp2-vpp2": (2, BFD, 2, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "cp2": (2, ALIGNED, 2, {"context": 2}, {}),
    "cp2-pp2-vpp2": (
        4,
        ALIGNED,
        2,
        {"context": 2, "pipeline": 2, "virtual_pipeline": 2},
        {},
    ),
    "cp2-tp2-sequence": (4, ALIGNED, 1, {"context": 2, "tensor": 2, "sequence": True}, {}),
    "dp4": (4, BFD, 1, {}, {}),
    "dp4-unpacked": (4, NONE, 2, {}, {}),
    "dp2-tp2-sequence": (4, BFD, 1, {"tensor": 2, "sequence": True}, {}),
    "dp2-pp2": (4, BFD, 2, {"pipeline": 2}, {}),
    "tp2-pp2-sequence": (4, BFD, 1, {"tensor": 2, "pipeline": 2, "sequence": True}, {}),
}


# The same of a model with experts, whose ranks get rows of different length, and whose router is
# trained by losses of its own.
EXPERT_LAYOUTS: dict[str, tuple[int, Section, int, Section, Section]] = {
    "micro-batch-4": (1, BFD, 4, {}, {}),
    "cp2-ep2": (2, BFD | {"alignment": 4}, 1, {"context": 2, "expert": 2}, {}),
    "pp2": (2, BFD, 2, {"pipeline": 2}, {}),
    "ep2": (2, BFD, 1, {"expert": 2}, {}),
    "ep2-recompute": (2, BFD, 2, {"expert": 2}, {"recompute": "full"}),
    "dp2": (2, BFD, 2, {}, {}),
    "tp2-ep2": (2, BFD, 1, {"tensor": 2, "sequence": True, "expert": 2}, {}),
    "tp2-etp2": (2, BFD, 1, {"tensor": 2, "sequence": True, "expert_tensor": 2}, {}),
}
SLOW_EXPERT_LAYOUTS: dict[str, tuple[int, Section, int, Section, Section]] = {
    "ep2-plain-optimizer": (2, BFD, 1, {"expert": 2, "distributed_optimizer": False}, {}),
    "tp2": (2, BFD, 1, {"tensor": 2, "sequence": True}, {}),
    "etp2": (2, BFD, 1, {"expert_tensor": 2}, {}),
    "recompute-moe": (1, BFD, 2, {}, {"recompute": "selective", "recompute_modules": ["moe"]}),
    "pp2-ep2": (4, BFD, 1, {"pipeline": 2, "expert": 2}, {}),
    "ep4": (4, BFD, 1, {"expert": 4}, {}),
    "tp2-ep2-etp2": (
        4,
        BFD,
        1,
        {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2},
        {},
    ),
}


def run_steps(
    folder: str,
    packing_section: Section,
    micro_batch_size: int,
    parallel_section: Section,
    model_section: Section,
    weights_of_tokens: list[float] | None = None,
    router: Section | None = None,
) -> list[tuple[float, ...]]:
    """(loss, grad_norm, what a router reports) of two optimizer steps over the same global batch.

    The weights are repeated over all tokens.
    """
    import numpy as np

    from sft_fast.megatron.batches import open_batches
    from sft_fast.megatron.hf import SafetensorsSource
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.megatron.train_step import build_run, train_step
    from sft_fast.models.architecture import architecture_from_hf, read_hf_config
    from sft_fast.packing.from_config import make_plan

    # The samples need fewer rows than the global batch has: the last ones are empty.
    config = make_config(
        model={"path": folder, "shape": None, **model_section},
        tokenizer={"path": None},
        packing=packing_section,
        train={"global_batch_size": NUM_SAMPLES, "micro_batch_size": micro_batch_size},
        parallel=parallel_section,
        router=router or {},
        # With the usual epsilon Adam turns the sign of a gradient of 1e-8 into a whole step.
        optim={"eps": 1e-3},
    )
    parallel = init_parallel(config.parallel, config.train, config.seed)
    architecture = architecture_from_hf(read_hf_config(Path(folder)))
    weights = SafetensorsSource(Path(folder), architecture)
    samples = random_samples(NUM_SAMPLES, seed=3)
    token_weights = None
    if weights_of_tokens is not None:
        num_tokens = sum(len(ids) for ids, _ in samples)
        token_weights = np.resize(weights_of_tokens, num_tokens).astype(np.float16)
    store = make_store(samples, token_weights)
    run = build_run(config, architecture, weights, 2, parallel)
    plan = make_plan(store, config.packing, config.train, config.seed)
    assert plan.num_steps_per_epoch == 1
    results = []
    with open_batches(store, plan, range(2), run.shape, parallel) as batches:
        for _ in range(2):
            result = train_step(run, batches, plan.counts(0))
            results.append((result.loss, result.grad_norm, *result.experts.values()))
    return results


@pytest.fixture(scope="module")
def truth(rank_pool: RankPool, llama: str) -> list[tuple[float, ...]]:
    """One rank, one row at a time."""
    (result,) = rank_pool.run(1, run_steps, llama, BFD, 1, {}, {})
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_do_not_depend_on_the_layout(
    rank_pool: RankPool, llama: str, truth: list[tuple[float, ...]], layout: str
) -> None:
    world_size, *arguments = LAYOUTS[layout]
    for rank, steps in enumerate(rank_pool.run(world_size, run_steps, llama, *arguments)):
        for got, expected in zip(steps, truth, strict=True):
            assert got == pytest.approx(expected, rel=1e-5), f"rank {rank}"
    assert truth[1][0] < truth[0][0]


WEIGHTS = [0.25, 1.0, 3.0, 0.5, 0.5, 2.0, 1.5]


@pytest.fixture(scope="module")
def weighted_truth(rank_pool: RankPool, llama: str) -> list[tuple[float, ...]]:
    (result,) = rank_pool.run(1, run_steps, llama, BFD, 1, {}, {}, WEIGHTS)
    return result


@pytest.mark.parametrize(
    "layout", ["micro-batch-8", "aligned", "dp2", "tp2-sequence", "pp2-unpacked"]
)
def test_weighted_loss_does_not_depend_on_the_layout(
    rank_pool: RankPool, llama: str, weighted_truth: list[tuple[float, ...]], layout: str
) -> None:
    world_size, *arguments = LAYOUTS[layout]
    for steps in rank_pool.run(world_size, run_steps, llama, *arguments, WEIGHTS):
        for got, expected in zip(steps, weighted_truth, strict=True):
            assert got == pytest.approx(expected, rel=1e-5)


def test_only_ratios_of_weights_count(
    rank_pool: RankPool,
    llama: str,
    truth: list[tuple[float, ...]],
    weighted_truth: list[tuple[float, ...]],
) -> None:
    for weights, expected in (
        ([0.125], truth),
        ([4 * weight for weight in WEIGHTS], weighted_truth),
    ):
        (steps,) = rank_pool.run(1, run_steps, llama, BFD, 1, {}, {}, weights)
        for got, wanted in zip(steps, expected, strict=True):
            assert got == pytest.approx(wanted, rel=1e-5)
    assert weighted_truth[0] != pytest.approx(truth[0], rel=1e-4)


ROUTER = {"aux_loss_coef": 1.0, "z_loss_coef": 0.01}


@pytest.fixture(scope="module")
def experts_truth(rank_pool: RankPool, experts: str) -> list[tuple[float, ...]]:
    (result,) = rank_pool.run(1, run_steps, experts, BFD, 1, {}, {}, None, ROUTER)
    return result


def test_losses_of_the_router_are_part_of_the_gradient(
    rank_pool: RankPool, experts: str, experts_truth: list[tuple[float, ...]]
) -> None:
    (plain,) = rank_pool.run(1, run_steps, experts, BFD, 1, {}, {})
    z_loss = {"z_loss_coef": ROUTER["z_loss_coef"]}
    (without,) = rank_pool.run(1, run_steps, experts, BFD, 1, {}, {}, None, z_loss)
    # The auxiliary loss has no gradient before a batch was counted.
    assert experts_truth[0][:2] == without[0][:2] and without[0][1] != plain[0][1]
    assert experts_truth[1][1] != pytest.approx(without[1][1], rel=1e-3)
    # Without losses only the counts are reported, which are the same.
    assert plain[0][2:] == experts_truth[0][2:5]


@pytest.mark.parametrize(
    "layout",
    [
        *EXPERT_LAYOUTS,
        *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_EXPERT_LAYOUTS),
    ],
)
def test_nor_do_they_with_experts(
    rank_pool: RankPool, experts: str, experts_truth: list[tuple[float, ...]], layout: str
) -> None:
    world_size, *arguments = (EXPERT_LAYOUTS | SLOW_EXPERT_LAYOUTS)[layout]
    arguments += [None, ROUTER]
    for rank, steps in enumerate(rank_pool.run(world_size, run_steps, experts, *arguments)):
        for got, expected in zip(steps, experts_truth, strict=True):
            assert got == pytest.approx(expected, rel=1e-5), f"rank {rank}"


CAPPED = {
    "model_type": "gemma2",
    "head_dim": 16,
    "sliding_window": 9,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 2.0,
}
LONGROPE = {
    "model_type": "phi3",
    "original_max_position_embeddings": 20,
    # The attention factor of 1.8 triples the scores. With weights of 0.3 the softmax saturates, and
    # fp32 is off by 1.5e-4 from an fp64 run in every layout; here all agree with it to 2e-7.
    "initializer_range": 0.15,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 500.0,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [1.0, 3.0, 5.0, 9.0],
    },
}


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        (CAPPED, "cp2"),
        (LONGROPE, "cp2"),
        pytest.param(CAPPED, "tp2-pp2-sequence", marks=pytest.mark.slow),
        pytest.param(LONGROPE, "cp2-pp2-vpp2", marks=pytest.mark.slow),
    ],
)
def test_nor_do_they_with_windows_soft_caps_and_positions_by_length(
    rank_pool: RankPool, tmp_path: Path, options: Section, layout: str
) -> None:
    save_tiny_llama(tmp_path, **options)
    (truth,) = rank_pool.run(1, run_steps, str(tmp_path), BFD, 1, {}, {})
    world_size, *arguments = LAYOUTS[layout]
    for steps in rank_pool.run(world_size, run_steps, str(tmp_path), *arguments):
        for got, expected in zip(steps, truth, strict=True):
            assert got == pytest.approx(expected, rel=1e-5)


def test_a_packed_sample_has_the_loss_it_has_alone(rank_pool: RankPool, llama: str) -> None:
    (differences,) = rank_pool.run(1, packed_minus_alone, llama)
    assert max(differences) < 1e-5


def packed_minus_alone(folder: str) -> list[float]:
    """|loss packed - loss alone| of each sample of one packed row."""
    import torch

    from sft_fast.megatron.forward_step import packed_samples
    from sft_fast.megatron.hf import SafetensorsSource, load_hf_weights
    from sft_fast.megatron.model import build_model
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.models.architecture import architecture_from_hf, read_hf_config
    from sft_fast.packing.micro_batch import fill_micro_batch

    config = make_config()
    parallel = init_parallel(config.parallel, config.train, config.seed)
    architecture = architecture_from_hf(read_hf_config(Path(folder)))
    (model,) = build_model(
        architecture, config.model, config.parallel, config.lora, config.loss, parallel
    )
    load_hf_weights(model, SafetensorsSource(Path(folder), architecture), architecture, parallel)
    store = make_store(random_samples(5, seed=8))

    def losses(sample_ids: list[int]) -> torch.Tensor:
        num_rows = int(store.lengths[sample_ids].sum()) + 3
        batch = fill_micro_batch(store, sample_ids, num_rows).to(parallel.device)
        with torch.no_grad():
            samples = packed_samples(batch)
            row = model(
                batch.tokens,
                batch.position_ids,
                None,
                labels=batch.labels,
                packed_seq_params=samples,
            )
        return torch.stack([part.sum() for part in row[0, :-3].split(list(batch.seqlens))])

    packed = losses(list(range(5)))
    alone = torch.cat([losses([sample]) for sample in range(5)])
    return (packed - alone).abs().tolist()
