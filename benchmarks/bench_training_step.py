"""A whole optimizer step on one device: packed rows and masked loss, against megatron's default.

    pytest benchmarks/bench_training_step.py

Both sides train the same samples with the same layers, attention, optimizer and precision, from
random weights. The peer does what megatron does without packing: micro-batches of samples padded to
the longest of them, logits of every position, megatron's fused cross-entropy, and the mask applied
to the losses. Lengths are drawn like those of Alpaca; the answer is the last half of a sample.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from megatron.core.models.gpt import GPTModel
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from sft_fast.config.schema import Config
from sft_fast.constants import IGNORE_INDEX
from sft_fast.megatron import sft
from sft_fast.megatron.batches import open_batches
from sft_fast.megatron.hf import hf_shapes
from sft_fast.megatron.model import SFTModel, unwrap
from sft_fast.megatron.parallel import Parallel, init_parallel
from sft_fast.megatron.schedule import run_schedule
from sft_fast.models.architecture import Architecture
from sft_fast.packing.from_config import make_plan
from sft_fast.packing.micro_batch import MicroBatch
from timing import DEVICE, ON_GPU, matmul_flops_per_s
from tiny import ListStore

NUM_STEPS = 4 if ON_GPU else 2
GLOBAL_BATCH_SIZE = 4
CAPACITY = 8192 if ON_GPU else 256


@dataclass(frozen=True)
class Case:
    """A model, what of it trains, and how many samples the peer's micro-batch has."""

    architecture: Architecture
    lora_rank: int = 0
    padded_samples: int = 16


LLAMA_1B = Architecture(128256, 2048, 16, 32, 8, 8192, 64, 131072, tie_word_embeddings=True)
LLAMA_8B = Architecture(128256, 4096, 32, 32, 8, 14336, 128, 8192)
SMALL = Architecture(8192, 128, 2, 4, 2, 384, 32, 512)
CASES = (
    {"8B LoRA": Case(LLAMA_8B, lora_rank=16, padded_samples=8), "1B full": Case(LLAMA_1B)}
    if ON_GPU
    else {"small full": Case(SMALL), "small LoRA": Case(SMALL, lora_rank=4)}
)


class DeviceWeights:
    """Random weights made on the device: of a real model's size, in no time."""

    def __init__(self, architecture: Architecture):
        self.shapes = hf_shapes(architecture)

    def read(self, name: str, rows: slice, columns: slice) -> Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=DEVICE)[rows]
        return torch.empty(shape, device=DEVICE).normal_(std=0.02)[rows, columns]


def make_store(
    vocab_size: int,
    num_tokens: int,
    longest: int = CAPACITY // 2,
    mean: float = 150,
    sigma: float = 0.65,
) -> ListStore:
    """At least `num_tokens` in samples of log-normal lengths from 16 on; by default Alpaca's."""
    rng = np.random.default_rng(0)
    count = int(2 * num_tokens / min(mean, longest)) + 8
    lengths = np.exp(rng.normal(np.log(mean) - sigma**2 / 2, sigma, count))
    lengths = lengths.clip(16, longest).astype(np.int64)
    lengths = lengths[: np.searchsorted(lengths.cumsum(), num_tokens) + 1]
    offsets = np.concatenate([[0], lengths.cumsum()])
    places = np.arange(offsets[-1]) - offsets[:-1].repeat(lengths)
    supervised = places >= lengths.repeat(lengths) // 2
    tokens = rng.integers(0, vocab_size, offsets[-1], dtype=np.uint32)
    return ListStore(tokens, np.packbits(supervised, bitorder="little"), offsets)


def make_config(case: Case, **sections: dict[str, Any]) -> Config:
    """The config of a case; `sections` update the sections of that name."""
    values: dict[str, Any] = {
        "output_dir": "unused",
        "model": {"dtype": "bf16" if ON_GPU else "fp32", "path": "unused"},
        "data": {"train": "unused"},
        "packing": {"capacity": CAPACITY, "strategy": "window"},
        "train": {"steps": NUM_STEPS, "global_batch_size": GLOBAL_BATCH_SIZE},
        "lora": {"rank": case.lora_rank},
        # So small that both sides see the same weights in every step.
        "optim": {"lr": 1e-12, "min_lr": 0.0},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Config.model_validate(values)


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest) -> Iterator[tuple[Any, ...]]:
    case = CASES[request.param]
    config = make_config(case)
    parallel = init_parallel(config)
    run = sft.build_run(
        config, case.architecture, DeviceWeights(case.architecture), NUM_STEPS, parallel
    )
    store = make_store(case.architecture.vocab_size, NUM_STEPS * GLOBAL_BATCH_SIZE * CAPACITY * 2)
    yield request.param, case, config, parallel, run, store
    del run
    torch.distributed.destroy_process_group()
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if ON_GPU:
        torch.cuda.empty_cache()


class TimedIterator(Iterator[MicroBatch]):
    """Adds up the time its consumer waits."""

    def __init__(self, source: Iterator[MicroBatch]):
        self.source, self.waited_s = source, 0.0

    def __next__(self) -> MicroBatch:
        begin = time.perf_counter()
        try:
            return next(self.source)
        finally:
            self.waited_s += time.perf_counter() - begin


@dataclass(frozen=True)
class PaddedBatch:
    """Samples side by side, each padded at its end."""

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    num_supervised: int


def padded_batches(store: ListStore, sample_ids: np.ndarray, size: int) -> list[PaddedBatch]:
    """Micro-batches of `size` samples, in the order of the plan."""
    mask = np.unpackbits(store.supervised_bits, bitorder="little").astype(bool)
    batches = []
    for first in range(0, len(sample_ids), size):
        ids = sample_ids[first : first + size]
        longest = int(store.lengths[ids].max())
        tokens = np.zeros((len(ids), longest), dtype=np.int64)
        labels = np.full((len(ids), longest), IGNORE_INDEX, dtype=np.int64)
        for row, sample in enumerate(ids):
            own = slice(store.offsets[sample], store.offsets[sample + 1])
            values, trains = store.tokens[own].astype(np.int64), mask[own]
            tokens[row, : len(values)] = values
            labels[row, : len(values) - 1][trains[1:]] = values[1:][trains[1:]]
        rows = [torch.from_numpy(array).to(DEVICE) for array in (tokens, labels)]
        position_ids = torch.arange(longest, device=DEVICE).expand(len(ids), -1)
        batches.append(PaddedBatch(*rows, position_ids, int((labels != IGNORE_INDEX).sum())))
    return batches


def padded_forward_step(batches: Iterator[PaddedBatch], model: torch.nn.Module) -> Any:
    batch = next(batches)
    losses = model(
        batch.tokens, batch.position_ids, None, labels=batch.labels.clamp(min=0).contiguous()
    )
    mask = batch.labels != IGNORE_INDEX

    def loss_func(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss_sum = (losses * mask).sum()
        num_tokens = torch.tensor(batch.num_supervised, dtype=torch.int32, device=DEVICE)
        report = torch.stack([loss_sum.detach(), num_tokens.to(loss_sum.dtype)])
        return loss_sum, num_tokens, {"lm loss": report}

    return losses, loss_func


def run_packed(
    config: Config, parallel: Parallel, run: sft.Run, store: ListStore, plan: Any
) -> tuple[list[float], list[float], float]:
    """Seconds and loss of each step, and the seconds that the last half of them waited for data."""
    durations, losses, waited = [], [], 0.0
    steps = range(config.train.steps or 0)
    with open_batches(store, plan, steps, config, parallel) as loader:
        batches = TimedIterator(loader)
        for step in steps:
            begin, before = time.perf_counter(), batches.waited_s
            result = sft.train_step(run, batches, plan.counts(step), config, parallel)
            durations.append(time.perf_counter() - begin)
            losses.append(result.loss)
            if step >= len(steps) // 2:
                waited += batches.waited_s - before
    return durations, losses, waited


def run_padded(
    config: Config, parallel: Parallel, run: sft.Run, store: ListStore, plan: Any, size: int
) -> tuple[list[float], list[float]]:
    """The same samples in the same steps, megatron's way."""
    durations, losses = [], []
    for chunk in run.model:
        unwrap(chunk).config.cross_entropy_loss_fusion = True
        unwrap(chunk).config.cross_entropy_fusion_impl = "native"
    for step in range(NUM_STEPS):
        bins = plan.micro_batches(step, 0, 1, GLOBAL_BATCH_SIZE)[0]
        batches = padded_batches(store, np.concatenate(bins), size)
        padded = config.model_copy(
            update={
                "train": config.train.model_copy(update={"global_batch_size": len(batches)}),
                # The schedule takes it for the sequence length, which only pipelines use.
                "packing": config.packing.model_copy(update={"capacity": 1}),
            }
        )
        with (
            mock.patch.object(SFTModel, "_postprocess", GPTModel._postprocess),
            mock.patch.object(sft, "run_schedule", partial(run_schedule, step=padded_forward_step)),
        ):
            begin = time.perf_counter()
            result = sft.train_step(run, iter(batches), plan.counts(step), padded, parallel)
            durations.append(time.perf_counter() - begin)
        losses.append(result.loss)
    return durations, losses


def step_flops(architecture: Architecture, num_tokens: int, num_active: int, lora: bool) -> float:
    """Products of forward and backward, without attention, of the tokens that need them.

    Frozen weights need no gradient of their own: 4 instead of 6 operations per weight and token.
    """
    shapes = hf_shapes(architecture)
    layers = sum(
        int(np.prod(shape))
        for name, shape in shapes.items()
        if ".layers." in name and len(shape) > 1
    )
    head = architecture.vocab_size * architecture.hidden_size
    return (4 if lora else 6) * (layers * num_tokens + head * num_active)


def test_step(benchmark: BenchmarkFixture, trained: tuple[Any, ...]) -> None:
    name, case, config, parallel, run, store = trained
    plan = make_plan(store, config, case.architecture)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    durations, losses, waited = run_packed(config, parallel, run, store, plan)
    peak = torch.cuda.max_memory_allocated() if ON_GPU else 0
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    size = case.padded_samples
    padded_durations, padded_losses = run_padded(config, parallel, run, store, plan, size)
    padded_peak = torch.cuda.max_memory_allocated() if ON_GPU else 0
    assert np.allclose(losses, padded_losses, rtol=2e-3 if ON_GPU else 1e-5)
    timed = slice(NUM_STEPS // 2, None)
    counts = [plan.counts(step) for step in range(NUM_STEPS)][timed]
    num_tokens = sum(count.num_tokens for count in counts)
    num_active = sum(count.num_supervised for count in counts)
    packed_s, padded_s = sum(durations[timed]), sum(padded_durations[timed])
    benchmark.pedantic(lambda: None, rounds=1)
    flops = step_flops(case.architecture, num_tokens, num_active, case.lora_rank > 0)
    benchmark.extra_info.update(
        case=name,
        attention=str(unwrap(run.model[0]).attention),
        tokens_per_step=num_tokens / len(counts),
        supervised_share=num_active / num_tokens,
        step_ms=[1e3 * duration for duration in durations],
        padded_step_ms=[1e3 * duration for duration in padded_durations],
        times_faster_than_padded=padded_s / packed_s,
        tokens_per_s=num_tokens / packed_s,
        flops_per_s=flops / packed_s,
        fraction_of_products=flops / packed_s / matmul_flops_per_s() if ON_GPU else None,
        data_wait_share=waited / packed_s,
        peak_bytes=peak,
        padded_peak_bytes=padded_peak,
        losses=losses,
        padded_losses=padded_losses,
    )
