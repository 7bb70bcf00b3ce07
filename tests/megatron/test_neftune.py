"""NEFTune noise: its size and distribution, and that it does not depend on the layout."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rank_pool import RankPool
from sft_fast.runtime.phases import Phases
from tiny import make_config, make_store, random_samples, save_tiny_llama

HIDDEN, ALPHA = 64, 5.0
LENGTHS = np.array([40, 3, 400, 17], dtype=np.int32)


def noise_of(ids: list[int], step: int = 7, seed: int = 1, alignment: int = 1) -> torch.Tensor:
    """[rows, HIDDEN] of the samples `ids` packed in a row, with two rows of padding."""
    from sft_fast.megatron.attention.packed_samples import pack_samples
    from sft_fast.megatron.neftune import EmbeddingNoise

    parallel: Any = SimpleNamespace(cp_size=1, tp_rank=0)
    noise = EmbeddingNoise(ALPHA, seed, LENGTHS, parallel)
    noise.step = step
    slots = tuple(int(-(-LENGTHS[i] // alignment) * alignment) for i in ids)
    samples = replace(
        pack_samples(slots, torch.tensor((0, *slots)).cumsum(0).int()), sample_ids=np.array(ids)
    )
    positions = torch.cat([*(torch.arange(slot) for slot in slots), torch.zeros(2).long()])
    embeddings = torch.zeros(len(positions), 1, HIDDEN)
    return noise.add(embeddings, positions[None], samples)[:, 0]


def test_a_sample_has_its_own_noise_in_any_row() -> None:
    packed, aligned = noise_of([0, 1, 2, 3]), noise_of([3, 0], alignment=8)
    alone = [noise_of([number]) for number in range(4)]
    start = 0
    for number, length in enumerate(LENGTHS):
        assert torch.equal(packed[start : start + length], alone[number][:length])
        start += length
    assert not packed[start:].any(), "padding"
    assert torch.equal(aligned[:17], alone[3][:17]) and torch.equal(aligned[24:64], alone[0][:40])
    assert not aligned[17:24].any(), "padding inside a slot"


def test_noise_is_uniform_and_as_large_as_the_paper_says() -> None:
    noise = noise_of([2])[:400]
    limit = ALPHA / math.sqrt(400 * HIDDEN)
    scaled = (noise / limit).double()
    assert 0.99 < scaled.abs().max() <= 1
    # 25600 values: five standard deviations of each statistic.
    assert abs(float(scaled.mean())) < 5 * math.sqrt(1 / 3 / 25600)
    assert abs(float((scaled**2).mean()) - 1 / 3) < 5 * math.sqrt(4 / 45 / 25600)
    quarters = torch.histc(scaled, 4, -1, 1) / 25600
    assert (quarters - 0.25).abs().max() < 5 * math.sqrt(0.1875 / 25600)


@pytest.mark.parametrize("other", ["row", "channel", "step", "sample", "seed"])
def test_noise_is_not_repeated(other: str) -> None:
    noise = noise_of([0])[:40]
    others = {
        "row": lambda: noise.roll(1, 0),
        "channel": lambda: noise.roll(1, 1),
        "step": lambda: noise_of([0], step=8)[:40],
        "sample": lambda: noise_of([2])[:40],
        "seed": lambda: noise_of([0], seed=2)[:40],
    }
    correlation = torch.corrcoef(torch.stack([noise.flatten(), others[other]().flatten()]))[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(noise.numel())


def losses_with_noise(folder: str, alpha: float, parallel_section: Any) -> list[tuple[float, ...]]:
    """(loss, gradient norm) of two steps, then the evaluation loss."""
    from sft_fast.megatron.batches import open_batches
    from sft_fast.megatron.evaluation import AnswerTally, evaluate
    from sft_fast.megatron.hf import SafetensorsSource
    from sft_fast.megatron.neftune import add_noise, begin_step
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.megatron.train_step import build_run, train_step
    from sft_fast.models.architecture import architecture_from_hf, read_hf_config
    from sft_fast.packing.from_config import make_plan

    config = make_config(
        model={"path": folder, "shape": None},
        tokenizer={"path": None},
        packing={"alignment": 4},
        train={"global_batch_size": 8, "neftune_alpha": alpha},
        parallel=parallel_section,
        optim={"eps": 1e-3},
    )
    parallel = init_parallel(config.parallel, config.train, config.seed)
    architecture = architecture_from_hf(read_hf_config(Path(folder)))
    run = build_run(
        config, architecture, SafetensorsSource(Path(folder), architecture), 2, parallel
    )
    store = make_store(random_samples(12, seed=3))
    add_noise(run.model, config.train, config.seed, store.lengths, parallel)
    plan = make_plan(store, config.packing, config.train, config.seed)
    tally = AnswerTally([], parallel)
    evaluated, _ = evaluate(run.model, store, plan, run.shape, parallel, tally, Phases.unwatched())
    results: list[tuple[float, ...]] = [(evaluated["loss"],)]
    with open_batches(store, plan, range(2), run.shape, parallel) as batches:
        for step in range(2):
            begin_step(run.model, step)
            result = train_step(run, batches, plan.counts(step))
            results.append((result.loss, result.grad_norm))
    return results


def test_losses_with_noise_do_not_depend_on_the_layout(rank_pool: RankPool, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path, tie_word_embeddings=True)
    (quiet,) = rank_pool.run(1, losses_with_noise, str(tmp_path), 0.0, {})
    (expected,) = rank_pool.run(1, losses_with_noise, str(tmp_path), ALPHA, {})
    assert quiet[0] == expected[0], "none in evaluation"
    assert abs(quiet[1][0] - expected[1][0]) > 1e-3
    for world_size, section in (
        (4, {"context": 2, "tensor": 2, "sequence": True}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
    ):
        for results in rank_pool.run(world_size, losses_with_noise, str(tmp_path), ALPHA, section):
            for got, wanted in zip(results, expected, strict=True):
                assert got == pytest.approx(wanted, rel=1e-5)
