"""What several devices cost and gain: the loss over tensor-parallel ranks, scaling of a step, the
balance of cost over ranks, and what a checkpoint in the background takes from training.

    pytest benchmarks/bench_parallel.py

A rank is a process, one for each GPU, with NCCL or RCCL between them; two gloo ranks of a small
model without GPUs. Every figure is the slowest rank's. Collectives are found in the profiler's
record of a step: time in them is *exposed* while no other kernel runs on that GPU.
"""

import functools
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench_training_step import (
    LLAMA_1B,
    LLAMA_8B,
    SMALL,
    Case,
    DeviceWeights,
    make_config,
    make_store,
    run_packed,
)
from rank_pool import RankPool
from sft_fast.constants import IGNORE_INDEX
from sft_fast.loss import HeadSettings, masked_linear_cross_entropy
from sft_fast.megatron import optim
from sft_fast.megatron.batches import open_batches
from sft_fast.megatron.parallel import init_parallel
from sft_fast.megatron.train_step import build_run, train_step
from sft_fast.packing import steps
from sft_fast.packing.balance import imbalance, round_robin
from sft_fast.packing.from_config import make_plan
from sft_fast.runtime.phases import Phases
from timing import DEVICE, ON_GPU, matmul_flops_per_s, median_s

NUM_DEVICES = torch.cuda.device_count() if ON_GPU else 2
SIZES = [size for size in (2, 4, 8) if size <= NUM_DEVICES]
NUM_ROWS, HIDDEN, VOCAB = (16384, 4096, 128256) if ON_GPU else (256, 64, 1024)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
Section = dict[str, Any]

if ON_GPU:
    pytestmark = pytest.mark.skipif(NUM_DEVICES < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def pool() -> Any:
    pool = RankPool()
    yield pool
    pool.close()


class HeadInputs:
    """One rank's part of an LM head with its input split along the sequence."""

    def __init__(self, size: int, active_ratio: float):
        self.group, rank = dist.group.WORLD, dist.get_rank()
        own: Any = {"device": DEVICE, "generator": torch.Generator(DEVICE).manual_seed(1 + rank)}
        same: Any = {"device": DEVICE, "generator": torch.Generator(DEVICE).manual_seed(0)}
        self.hidden = torch.randn(NUM_ROWS // size, 1, HIDDEN, **own).to(DTYPE).requires_grad_()
        weight = torch.randn(VOCAB // size, HIDDEN, **own) / HIDDEN**0.5
        self.weight = weight.to(DTYPE).requires_grad_()
        # Prompts and answers alternate, so that every rank owns active rows.
        self.labels = torch.randint(VOCAB, (1, NUM_ROWS), **same)
        places = torch.arange(NUM_ROWS, device=DEVICE) % 512
        self.labels[:, places >= round(512 * active_ratio)] = IGNORE_INDEX
        self.active_tokens = (self.labels[0] != IGNORE_INDEX).nonzero().squeeze(1).cpu()


def masked(inputs: HeadInputs) -> Tensor:
    return masked_linear_cross_entropy(
        inputs.hidden,
        inputs.weight,
        inputs.labels,
        HeadSettings(tp_group=inputs.group, sequence_parallel=True, summed=True),
        active_tokens=inputs.active_tokens,
    ).sum()


def megatron(inputs: HeadInputs, fused: bool) -> Tensor:
    """As GPTModel does it: logits of every row, its loss, the mask."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.layers import (
        linear_with_grad_accumulation_and_async_allreduce as linear,
    )

    logits = linear(
        inputs.hidden,
        inputs.weight,
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=False,
        sequence_parallel=True,
        tp_group=inputs.group,
    )
    targets = inputs.labels.t().clamp(min=0).contiguous()
    if fused:
        losses = fused_vocab_parallel_cross_entropy(logits, targets, inputs.group)
    else:
        losses = vocab_parallel_cross_entropy(logits, targets)
    return (losses * (inputs.labels.t() != IGNORE_INDEX)).sum()


METHODS: dict[str, Callable[[HeadInputs], Tensor]] = {
    "masked": masked,
    "Megatron fused": functools.partial(megatron, fused=True),
    "Megatron unfused": functools.partial(megatron, fused=False),
}


def head_step(method: str, inputs: HeadInputs) -> tuple[Tensor, ...]:
    """Loss and both gradients."""
    loss = METHODS[method](inputs)
    return loss.detach(), *torch.autograd.grad(loss, (inputs.hidden, inputs.weight))


def communication(function: Callable[[], object], rounds: int = 3) -> dict[str, Any]:
    """NCCL's kernels of one call on this GPU by name, and their time; empty without a GPU."""
    if not ON_GPU:
        return {}
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(rounds):
            function()
        torch.cuda.synchronize()
    kernels = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    ours = sorted(kernel[1:] for kernel in kernels if "nccl" in kernel[0].lower())
    others = sorted(kernel[1:] for kernel in kernels if "nccl" not in kernel[0].lower())
    names = Counter(name.split("(")[0] for name, *_ in kernels if "nccl" in name.lower())
    total, alone = length(ours), length(ours + others) - length(others)
    return {
        "collectives": {name: count / rounds for name, count in names.items()},
        "communication_ms": total / 1e3 / rounds,
        "exposed_ms": alone / 1e3 / rounds,
    }


def length(intervals: list[tuple[float, float]]) -> float:
    """Of the union."""
    covered, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        covered += max(0.0, last - max(first, end))
        end = max(end, last)
    return covered


def time_head(size: int, active_ratio: float) -> dict[str, Any]:
    """One rank's times of each method over `size` tensor-parallel ranks."""
    config = make_config(Case(SMALL), parallel={"tensor": size, "sequence": True})
    init_parallel(config.parallel, config.train, config.seed)
    inputs = HeadInputs(size, active_ratio)
    results: dict[str, Any] = {"num_active": len(inputs.active_tokens)}
    truth = None
    for method in METHODS:
        loss, *grads = head_step(method, inputs)
        norms = [float(grad.float().norm()) for grad in grads]
        if truth is None:
            truth = float(loss), *norms
        # Megatron's fused loss rounds its gradient to bfloat16, whatever the logits are.
        assert (float(loss), *norms) == pytest.approx(truth, rel=1e-2), method
        del loss, grads
        step = functools.partial(head_step, method, inputs)
        dist.barrier()
        seconds = median_s(step, rounds=8)
        peak = 0
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        results[method] = {"s": seconds, "peak": peak, "communication": communication(step)}
    results["products"] = matmul_flops_per_s() if ON_GPU else None
    return results


@pytest.mark.parametrize("active_ratio", [1.0, 0.35])
@pytest.mark.parametrize("size", SIZES)
def test_head_over_tensor_parallel_ranks(
    benchmark: BenchmarkFixture, pool: RankPool, size: int, active_ratio: float
) -> None:
    ranks = pool.run(size, time_head, size, active_ratio)
    benchmark.pedantic(lambda: None, rounds=1)
    num_active = ranks[0]["num_active"]
    flops = 6 * num_active * HIDDEN * VOCAB / size
    benchmark.extra_info.update(
        ranks=size, num_rows=NUM_ROWS, num_active=num_active, hidden_size=HIDDEN, vocab_size=VOCAB
    )
    for method in METHODS:
        slowest = max(rank[method]["s"] for rank in ranks)
        record: dict[str, Any] = {
            "ms": 1e3 * slowest,
            "peak_bytes": max(rank[method]["peak"] for rank in ranks),
            "masked_times_faster": slowest / max(rank["masked"]["s"] for rank in ranks),
        }
        if ON_GPU:
            # Waiting for a peer counts as communication: the rank that waits least tells its cost.
            record |= min(
                (rank[method]["communication"] for rank in ranks),
                key=lambda seen: seen["communication_ms"],
            )
            record["products_limit_ms"] = 1e3 * flops / min(rank["products"] for rank in ranks)
        benchmark.extra_info[method] = record


@dataclass(frozen=True)
class Scaling:
    """Steps of one model, at one rank and at more."""

    case: Case
    capacity: int
    rows: int
    """Of a global batch, for each data-parallel rank."""
    sections: Section
    """Of the config, besides."""
    samples: tuple[float, float]
    """Mean of the lengths, sigma of their logarithm."""
    steps: int = 4


SHORT, LONG_TAIL = (150.0, 0.65), (3000.0, 1.3)
RECOMPUTE = {"model": {"recompute": "full"}}
OVERLAP = {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}
SCALINGS = (
    {
        "data 1B full": Scaling(Case(LLAMA_1B), 8192, 4, OVERLAP, SHORT),
        "data 8B LoRA": Scaling(Case(LLAMA_8B, lora_rank=16), 8192, 2, {}, SHORT),
        "tensor 8B LoRA": Scaling(Case(LLAMA_8B, lora_rank=16), 8192, 4, {}, SHORT),
        "context 1B full 32k": Scaling(Case(LLAMA_1B), 32768, 2, RECOMPUTE, (1e6, 0.1)),
        "context 1B full 128k": Scaling(Case(LLAMA_1B), 131072, 1, RECOMPUTE, (1e6, 0.1), 2),
    }
    if ON_GPU
    else {
        "data small full": Scaling(Case(SMALL), 256, 2, OVERLAP, SHORT, 3),
        "tensor small LoRA": Scaling(Case(SMALL, lora_rank=4), 256, 2, {}, SHORT, 3),
        "context small full": Scaling(Case(SMALL), 512, 1, RECOMPUTE, (1e6, 0.1), 3),
    }
)


def layout(kind: str, size: int) -> Section:
    """The config's section for `size` ranks of one kind."""
    if kind == "tensor":
        return {"tensor": size, "sequence": size > 1}
    return {"context": size} if kind == "context" else {}


def scaled_config(scaling: Scaling, kind: str, size: int) -> Any:
    sections: dict[str, Section] = {name: dict(value) for name, value in scaling.sections.items()}
    sections.setdefault("parallel", {}).update(layout(kind, size))
    rows = scaling.rows * (size if kind == "data" else 1)
    sections["train"] = {"global_batch_size": rows, "steps": scaling.steps}
    sections["packing"] = {"capacity": scaling.capacity}
    if kind == "context" and size > 1:
        sections["packing"]["alignment"] = 2 * size
    return make_config(scaling.case, **sections)


def time_steps(scaling: Scaling, kind: str, size: int, balanced: bool = True) -> dict[str, Any]:
    """One rank's times of the steps that count."""
    release_memory()
    config = scaled_config(scaling, kind, size)
    parallel = init_parallel(config.parallel, config.train, config.seed)
    architecture = scaling.case.architecture
    run = build_run(config, architecture, DeviceWeights(architecture), scaling.steps, parallel)
    rows = config.train.global_batch_size * scaling.steps
    mean, sigma = scaling.samples
    store = make_store(
        architecture.vocab_size, rows * scaling.capacity * 2, scaling.capacity, mean, sigma
    )
    plan = make_plan(store, config.packing, config.train, config.seed, architecture)
    spread = steps.balance if balanced else assign_round_robin
    with mock.patch.object(steps, "balance", spread):
        durations, _, waited = run_packed(config, parallel, run, store, plan)
    timed = range(len(durations) // 2, len(durations))
    counts = [plan.counts(step) for step in timed]
    costs = [plan.step(step).costs() for step in timed]
    return {
        "s": sum(durations[step] for step in timed),
        "steps_s": durations,
        "waited_s": waited,
        "num_tokens": sum(count.num_tokens for count in counts),
        "peak": torch.cuda.max_memory_allocated() if ON_GPU else 0,
        # Plain data parallelism waits at the end of a step, not at every micro-batch.
        "imbalance": statistics.mean(
            imbalance(cost, spread(cost, parallel.dp_size, 1).T.reshape(1, parallel.dp_size, -1))
            for cost in costs
        ),
    }


def release_memory() -> None:
    """Gives back what the job before left in the allocator."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def assign_round_robin(costs: Any, dp_size: int, micro_batch_size: int) -> Any:
    return round_robin(len(costs), dp_size, micro_batch_size)


def slowest(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    return max(ranks, key=lambda rank: rank["s"])


@pytest.mark.parametrize("name", SCALINGS)
def test_scaling(benchmark: BenchmarkFixture, pool: RankPool, name: str) -> None:
    scaling, kind = SCALINGS[name], name.split()[0]
    benchmark.pedantic(lambda: None, rounds=1)
    speeds = {}
    for size in [1, *SIZES]:
        if kind == "context" and size > 4:
            continue
        try:
            result = slowest(pool.run(size, time_steps, scaling, kind, size))
        except AssertionError as error:
            if "OutOfMemory" not in str(error):
                raise
            benchmark.extra_info[f"{size} ranks"] = "out of memory"
            continue
        speeds[size] = result["num_tokens"] / result["s"]
        benchmark.extra_info[f"{size} ranks"] = {
            "tokens_per_s": speeds[size],
            "efficiency": speeds[size] / (size * speeds[1]) if 1 in speeds else None,
            "step_ms": [1e3 * duration for duration in result["steps_s"]],
            "data_wait_share": result["waited_s"] / result["s"],
            "peak_bytes": result["peak"],
        }


def time_until_computed(
    scaling: Scaling, kind: str, size: int, balanced: bool
) -> tuple[dict[str, Any], list[float]]:
    """One rank's times of the steps that count, and the moments at which it had done its part of
    each and began to wait for the others."""
    moments: list[float] = []
    finalize = optim.finalize_model_grads

    def noted(*args: Any, **kwargs: Any) -> None:
        if ON_GPU:
            torch.cuda.current_stream().synchronize()
        moments.append(time.perf_counter())
        finalize(*args, **kwargs)

    with mock.patch.object(optim, "finalize_model_grads", noted):
        result = time_steps(scaling, kind, size, balanced)
    return result, moments[len(moments) // 2 :]


def test_cost_balance(benchmark: BenchmarkFixture, pool: RankPool) -> None:
    """Long-tailed lengths in long rows; lost is the time from a mean rank's end to the last's."""
    size = SIZES[-1]
    if ON_GPU:
        scaling = Scaling(Case(LLAMA_1B), 32768, 8, {**RECOMPUTE, **OVERLAP}, LONG_TAIL, 4)
    else:
        scaling = Scaling(Case(SMALL), 512, 8, RECOMPUTE, (100.0, 1.3), 4)
    lost = {}
    for name in ("in turn", "balanced"):
        ranks = pool.run(size, time_until_computed, scaling, "data", size, name == "balanced")
        result = slowest([result for result, _ in ranks])
        # The clock is the same for all processes of a machine.
        steps = list(zip(*(moments for _, moments in ranks), strict=True))
        waits = [max(moments) - statistics.mean(moments) for moments in steps]
        lost[name] = sum(waits)
        benchmark.extra_info[name] = {
            "s": result["s"],
            "lost_s": lost[name],
            "lost_of_each_step_s": waits,
            "imbalance_of_cost": result["imbalance"],
        }
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(ranks=size, recovered=1 - lost["balanced"] / lost["in turn"])


def save_in_background(
    case: Case, sections: Section, folder: str | None, rounds: int
) -> dict[str, Any]:
    """One rank's times of steps with and without a save beside them.

    Args:
        folder: None = nothing is written to disk.
    """
    from sft_fast.megatron.checkpoint.save import CheckpointWriter
    from sft_fast.megatron.checkpoint.state import sharded_state
    from sft_fast.megatron.checkpoint.train_state import TrainState

    release_memory()
    config = make_config(case, **sections)
    parallel = init_parallel(config.parallel, config.train, config.seed)
    architecture = case.architecture
    num_steps = config.train.steps
    run = build_run(config, architecture, DeviceWeights(architecture), num_steps, parallel)
    num_tokens = 2 * num_steps * config.train.global_batch_size * config.packing.capacity
    store = make_store(architecture.vocab_size, num_tokens, config.packing.capacity)
    plan = make_plan(store, config.packing, config.train, config.seed, architecture)
    phases = Phases.unwatched()
    run_dir = Path(folder or "unused")
    checkpoints = CheckpointWriter(run_dir, config.checkpoint, print, run.copier, phases)
    stalls, steps, saves, copies = [], [], [], []
    begin = time.perf_counter()
    checkpoints.prepare(sharded_state(run.model, run.optimizer, run.schedule))
    # A first save comes long after; here it would come too soon.
    run.copier.finish_reserving()
    reserved_s = time.perf_counter() - begin

    def wait_for_copy(
        self: CheckpointWriter, final: Path, state: Any, snapshot: Any, _: Any
    ) -> None:
        begin = time.perf_counter()
        self.copier.wait()
        copies.append((snapshot.num_bytes, time.perf_counter() - begin))

    write = CheckpointWriter.write if folder else wait_for_copy
    with (
        mock.patch.object(CheckpointWriter, "write", write),
        open_batches(store, plan, range(num_steps), run.shape, parallel) as batches,
    ):
        for step in range(num_steps):
            begin = time.perf_counter()
            train_step(run, batches, plan.counts(step))
            synchronize()
            steps.append(time.perf_counter() - begin)
            if step % 3 != 1 or len(stalls) == rounds:
                continue
            checkpoints.finish()
            dist.barrier()
            begin = time.perf_counter()
            parts = sharded_state(run.model, run.optimizer, run.schedule)
            checkpoints.save(TrainState(step + 1, {}), parts)
            stalls.append(time.perf_counter() - begin)
            saves.append(step)
    begin = time.perf_counter()
    checkpoints.finish(is_last=True)
    last_finish_s = time.perf_counter() - begin
    run.copier.release()
    return {
        "stalls_s": stalls,
        "steps_s": steps,
        "after_save": [step + 1 for step in saves],
        "reserved_s": reserved_s,
        "bytes_and_seconds_of_copies": copies,
        "last_finish_s": last_finish_s,
        "peak": torch.cuda.max_memory_allocated() if ON_GPU else 0,
    }


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


SAVES = (
    {"1B full, data parallel": (Case(LLAMA_1B), {}), "8B full": (Case(LLAMA_8B), {"tensor": 2})}
    if ON_GPU
    else {"small full": (Case(SMALL), {}), "small tensor": (Case(SMALL), {"tensor": 2})}
)


@pytest.mark.parametrize("name", SAVES)
def test_checkpoint_stall(
    benchmark: BenchmarkFixture, pool: RankPool, tmp_path: Path, name: str
) -> None:
    case, parallel_section = SAVES[name]
    sections = {
        "parallel": parallel_section | {"sequence": "tensor" in parallel_section},
        "packing": {"capacity": 512 if ON_GPU else 256},
        "train": {"global_batch_size": 2, "steps": 8},
        "checkpoint": {"asynchronous": True},
        **RECOMPUTE,
    }
    is_large = case.architecture == LLAMA_8B
    folder = None if is_large else str(tmp_path)
    rounds = 2
    ranks = pool.run(2, save_in_background, case, sections, folder, rounds)
    benchmark.pedantic(lambda: None, rounds=1)
    files = [path for path in tmp_path.rglob("*.safetensors")]
    benchmark.extra_info.update(
        checkpoint_bytes=sum(path.stat().st_size for path in files) // rounds,
        bytes_and_seconds_of_copies=[rank["bytes_and_seconds_of_copies"] for rank in ranks],
        stalls_s=[max(rank["stalls_s"][i] for rank in ranks) for i in range(rounds)],
        step_ms=[1e3 * max(rank["steps_s"][i] for rank in ranks) for i in range(8)],
        steps_after_a_save=ranks[0]["after_save"],
        seconds_to_reserve_host_memory=max(rank["reserved_s"] for rank in ranks),
        last_finish_s=max(rank["last_finish_s"] for rank in ranks),
        peak_bytes=max(rank["peak"] for rank in ranks),
    )
