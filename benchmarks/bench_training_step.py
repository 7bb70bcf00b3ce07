"""A whole optimizer step on one device, beside the strongest peer and beside megatron's default.

    pytest benchmarks/bench_training_step.py

All train the same samples from the same random weights, and their losses are compared. The peer is
transformers with PEFT and Liger on the same packed rows (hf_peer.py), at its fastest. megatron's
default does what it does without packing, with the same layers, attention, optimizer and precision
as ours: micro-batches of samples padded to the longest of them, logits of every position, its fused
cross-entropy, and the mask applied to the losses. Lengths are drawn like those of Alpaca, and the
answer is the last half of a sample. "full rows": each row is one sample, and every token trains.
"""

import gc
import statistics
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from hf_peer import run_peer
from kernel_time import profile_step
from sft_fast.config.schema import Config
from sft_fast.constants import IGNORE_INDEX
from sft_fast.megatron.batches import open_batches
from sft_fast.megatron.model import SFTModel, unwrap
from sft_fast.megatron.parallel import Parallel, init_parallel
from sft_fast.megatron.train_step import Run, build_run, train_step
from sft_fast.models.architecture import Architecture
from sft_fast.models.flops import active_matrix_parameters
from sft_fast.models.weights import hf_shapes
from sft_fast.packing.from_config import make_plan
from sft_fast.packing.micro_batch import MicroBatch
from sft_fast.packing.steps import StepPlan
from timing import DEVICE, ON_GPU, matmul_flops_per_s
from tiny import ListStore

NUM_STEPS = 6 if ON_GPU else 2
TIMED = slice(NUM_STEPS // 3, None)
"""The steps before are for compilers and caches; of these the median counts."""
CAPACITY = 8192 if ON_GPU else 256
NUM_PADDED_STEPS = 3 if ON_GPU else 2
TOKENS_PER_STEP = 4 * CAPACITY


@dataclass(frozen=True)
class Case:
    """A model, what of it trains, and on what."""

    architecture: Architecture
    lora_rank: int = 0
    padded_samples: int = 0
    """Samples of a micro-batch of megatron's default; 0 = it is not run."""
    capacity: int = CAPACITY
    is_full: bool = False
    """Every row is one sample, of which every token trains."""
    recompute_layers: int = 0
    """Layers whose norms and activations are written again in our backward pass."""

    @property
    def global_batch_size(self) -> int:
        """Rows per step."""
        return TOKENS_PER_STEP // self.capacity


LLAMA_1B = Architecture(128256, 2048, 16, 32, 8, 8192, 64, 131072, tie_word_embeddings=True)
LLAMA_8B = Architecture(128256, 4096, 32, 32, 8, 14336, 128, 8192)
SMALL = Architecture(8192, 128, 2, 4, 2, 384, 32, 512)
MIXTURE = {"renormalise_experts": True, "family": "Qwen3MoeForCausalLM"}
# Qwen3-30B-A3B with 8 of its 48 layers.
EXPERTS_30B = Architecture(
    151936,
    2048,
    8,
    32,
    4,
    768,
    128,
    32768,
    1e-6,
    1e6,
    num_experts=128,
    experts_per_token=8,
    **MIXTURE,
)
SMALL_EXPERTS = Architecture(
    8192, 128, 2, 4, 2, 64, 32, 512, num_experts=8, experts_per_token=2, **MIXTURE
)
CASES = (
    {
        "8B LoRA": Case(LLAMA_8B, lora_rank=16, padded_samples=8),
        "1B all weights": Case(LLAMA_1B, padded_samples=16),
        "1B all weights, recomputed": Case(LLAMA_1B, recompute_layers=8),
        "experts all weights": Case(EXPERTS_30B),
        "8B LoRA, full rows": Case(LLAMA_8B, lora_rank=16, capacity=4096, is_full=True),
    }
    if ON_GPU
    else {
        "small all weights": Case(SMALL, padded_samples=16),
        "small LoRA": Case(SMALL, lora_rank=4, padded_samples=16),
        "small experts": Case(SMALL_EXPERTS),
        "small, full rows": Case(SMALL, capacity=128, is_full=True),
    }
)


class DeviceWeights:
    """Random weights made on the device: of a real model's size, in no time, the same each time."""

    def __init__(self, architecture: Architecture):
        self.shapes = hf_shapes(architecture)

    def read(self, name: str, rows: slice, columns: slice) -> Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=DEVICE)[rows]
        generator = torch.Generator(DEVICE).manual_seed(zlib.crc32(name.encode()))
        weight = torch.empty(shape, device=DEVICE)
        return weight.normal_(std=0.02, generator=generator)[rows, columns]


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


def case_store(case: Case) -> ListStore:
    """More samples than the steps of a case need."""
    vocab_size, num_tokens = case.architecture.vocab_size, NUM_STEPS * TOKENS_PER_STEP
    if not case.is_full:
        return make_store(vocab_size, 2 * num_tokens)
    tokens = np.random.default_rng(0).integers(0, vocab_size, num_tokens, dtype=np.uint32)
    everything = np.packbits(np.ones(num_tokens, dtype=bool), bitorder="little")
    return ListStore(tokens, everything, np.arange(0, num_tokens + 1, case.capacity))


def make_config(case: Case, **sections: dict[str, Any]) -> Config:
    """The config of a case; `sections` update the sections of that name."""
    values: dict[str, Any] = {
        "output_dir": "unused",
        "model": {"dtype": "bf16" if ON_GPU else "fp32", "path": "unused"},
        "data": {"train": "unused"},
        "packing": {"capacity": case.capacity, "strategy": "window"},
        "train": {"steps": NUM_STEPS, "global_batch_size": case.global_batch_size},
        "lora": {"rank": case.lora_rank},
        # So small that both sides see the same weights in every step.
        "optim": {"lr": 1e-12, "min_lr": 0.0},
    }
    if case.recompute_layers:
        values["model"] |= {
            "recompute": "selective",
            "recompute_modules": ["norm", "activation"],
            "recompute_layers": case.recompute_layers,
        }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Config.model_validate(values)


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
    config: Config, parallel: Parallel, run: Run, store: ListStore, plan: Any
) -> tuple[list[float], list[float], float]:
    """Seconds and loss of each step, and the seconds that the last half of them waited for data."""
    durations, losses, waited = [], [], 0.0
    steps = range(config.train.steps or 0)
    with open_batches(store, plan, steps, run.shape, parallel) as loader:
        batches = TimedIterator(loader)
        for step in steps:
            begin, before = time.perf_counter(), batches.waited_s
            result = train_step(run, batches, plan.counts(step))
            durations.append(time.perf_counter() - begin)
            losses.append(result.loss)
            if step >= len(steps) // 2:
                waited += batches.waited_s - before
    return durations, losses, waited


def run_padded(
    config: Config, parallel: Parallel, run: Run, store: ListStore, plan: Any, size: int
) -> tuple[list[float], list[float]]:
    """The same samples in the same steps, megatron's way."""
    durations, losses = [], []
    for chunk in run.model:
        unwrap(chunk).config.cross_entropy_loss_fusion = True
        unwrap(chunk).config.cross_entropy_fusion_impl = "native"
    for step in range(NUM_PADDED_STEPS):
        bins = plan.micro_batches(step, 0, 1, plan.global_batch_size)[0]
        batches = padded_batches(store, np.concatenate(bins), size)
        # megatron takes the length for that of the sequence, which only pipelines use.
        shape = replace(run.shape, num_microbatches=len(batches), capacity=1)
        padded = replace(run, shape=shape, forward_step=padded_forward_step)
        with mock.patch.object(SFTModel, "_postprocess", GPTModel._postprocess):
            begin = time.perf_counter()
            result = train_step(padded, iter(batches), plan.counts(step))
            durations.append(time.perf_counter() - begin)
        losses.append(result.loss)
    return durations, losses


def step_flops(
    architecture: Architecture, num_tokens: float, num_active: float, lora: bool
) -> float:
    """Products of forward and backward, without attention, of the tokens that need them.

    Frozen weights need no gradient of their own: 4 instead of 6 operations per weight and token.
    What the last layer does behind its attention only active tokens need.
    """
    a = architecture
    behind = 0 if a.num_experts else a.hidden_size * (a.value_size + 3 * a.ffn_hidden_size)
    of_all = active_matrix_parameters(a) - behind
    of_active = behind + a.vocab_size * a.hidden_size
    return (4 if lora else 6) * (of_all * num_tokens + of_active * num_active)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """Undoes what init_parallel makes."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        parallel_state.destroy_model_parallel()


def reset_peak() -> None:
    """Gives back what is not in use, and counts the peak of memory anew."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if ON_GPU else 0


def profile_ours(
    config: Config, parallel: Parallel, run: Run, store: ListStore, plan: StepPlan
) -> dict[str, object]:
    """Where the device time of one of our steps goes."""
    numbers = iter(range(2))
    with open_batches(store, plan, range(2), run.shape, parallel) as batches:
        return profile_step(lambda: train_step(run, batches, plan.counts(next(numbers))))


def run_ours(case: Case, store: ListStore, plan: StepPlan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of our steps and, where the case asks for them, of megatron's default."""
    config = make_config(case)
    parallel = init_parallel(config.parallel, config.train, config.seed)
    weights = DeviceWeights(case.architecture)
    run = build_run(config, case.architecture, weights, NUM_STEPS, parallel)
    reset_peak()
    durations, losses, waited = run_packed(config, parallel, run, store, plan)
    ours = {
        "attention": str(unwrap(run.model[0]).attention),
        "step_ms": [1e3 * duration for duration in durations],
        "losses": losses,
        "data_wait_share": waited / sum(durations[NUM_STEPS // 2 :]),
        "peak_bytes": peak_bytes(),
    }
    if ON_GPU:
        ours |= profile_ours(config, parallel, run, store, plan)
    padded: dict[str, Any] = {}
    if case.padded_samples:
        reset_peak()
        times, padded_losses = run_padded(config, parallel, run, store, plan, case.padded_samples)
        assert np.allclose(losses[:NUM_PADDED_STEPS], padded_losses, rtol=2e-3 if ON_GPU else 1e-5)
        padded = {"step_ms": [1e3 * time for time in times], "peak_bytes": peak_bytes()}
    return ours, padded


@pytest.mark.parametrize("name", CASES)
def test_step(benchmark: BenchmarkFixture, one_rank: None, name: str) -> None:
    case = CASES[name]
    if case.lora_rank:
        pytest.importorskip("peft")
    store = case_store(case)
    config = make_config(case)
    plan = make_plan(store, config.packing, config.train, config.seed, case.architecture)
    ours, padded = run_ours(case, store, plan)
    reset_peak()
    peer = run_peer(
        case.architecture,
        DeviceWeights(case.architecture),
        store,
        plan,
        NUM_STEPS,
        case.lora_rank,
        profile_step if ON_GPU else None,
    )
    reset_peak()
    assert np.allclose(ours["losses"], peer.losses, rtol=2e-3 if ON_GPU else 1e-5)
    counts = [plan.counts(step) for step in range(NUM_STEPS)][TIMED]
    num_tokens = sum(count.num_tokens for count in counts)
    num_active = sum(count.num_supervised for count in counts)
    seconds = statistics.median(ours["step_ms"][TIMED]) / 1e3
    per_step = num_tokens / len(counts), num_active / len(counts)
    flops = step_flops(case.architecture, *per_step, case.lora_rank > 0)
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(
        case=name,
        tokens_per_step=per_step[0],
        supervised_share=num_active / num_tokens,
        tokens_per_s=per_step[0] / seconds,
        flops_per_s=flops / seconds,
        fraction_of_products=flops / seconds / matmul_flops_per_s() if ON_GPU else None,
        times_faster_than_peer=statistics.median(peer.durations[TIMED]) / seconds,
        peer={
            "kernels": peer.kernels,
            "step_ms": [1e3 * duration for duration in peer.durations],
            "losses": peer.losses,
            "peak_bytes": peer.peak_bytes,
            **peer.profile,
        },
        **ours,
    )
    if padded:
        benchmark.extra_info["times_faster_than_padded"] = (
            statistics.median(padded["step_ms"][1:]) / 1e3 / seconds
        )
        benchmark.extra_info["padded"] = padded
