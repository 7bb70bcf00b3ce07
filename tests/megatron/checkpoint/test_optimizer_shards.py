"""Each rank saves its own part of the optimizer, and finds it again at any layout."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocations import most_bytes_held
from rank_pool import RankPool
from sft_fast.runtime.phases import Phases
from tiny import VOCAB_SIZE, make_config, make_store, random_samples

NUM_SAMPLES = 16
COLLECTIVES = (
    *(
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_single",
        "all_gather_object",
        "gather",
        "gather_object",
    ),
    *(
        "all_reduce",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "reduce_scatter_single",
        "broadcast",
    ),
    *("broadcast_object_list", "scatter", "all_to_all", "all_to_all_single", "barrier"),
)
Section = dict[str, Any]


def layout(name: str, world_size: int, *marks: Any, **parallel: Any) -> Any:
    return pytest.param(world_size, parallel, id=name, marks=marks)


OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
PLAIN = {"distributed_optimizer": False}
STATES = "optimizer.state."
SLOW = pytest.mark.slow
LAYOUTS = [
    layout("dp1", 1),
    layout("dp2-overlap", 2, SLOW, **OVERLAP),
    layout("dp4-overlap", 4, SLOW, **OVERLAP),
    layout("tp2", 2, tensor=2, sequence=True),
    layout("dp2-tp2", 4, SLOW, tensor=2, sequence=True),
    layout("dp2-pp2", 4, SLOW, pipeline=2),
    layout("pp2-vpp2", 2, pipeline=2, virtual_pipeline=2),
    layout("pp2-uneven", 2, pipeline=2, stage_layers=[1, 3]),
    layout("cp2", 2, SLOW, context=2),
]
EXPERT_LAYOUTS = [
    layout("dp2", 2),
    layout("dp4-ep2", 4, SLOW, expert=2),
    layout("tp2-etp2", 2, SLOW, tensor=2, sequence=True, expert_tensor=2),
]


@settings(deadline=None)
@given(st.data(), st.lists(st.integers(0, 5), max_size=4))
def test_rectangles_are_the_range_in_order(data: st.DataObject, shape: list[int]) -> None:
    from sft_fast.megatron.checkpoint.flat_ranges import rectangles

    elements = np.arange(math.prod(shape)).reshape(shape)
    begin = data.draw(st.integers(0, elements.size))
    end = data.draw(st.integers(begin, elements.size))
    found = list(rectangles(tuple(shape), begin, end))
    assert len(found) <= max(2 * len(shape) - 1, 1)
    parts = [
        elements[tuple(slice(a, a + n) for a, n in zip(offset, sizes, strict=True))].ravel()
        for offset, sizes in found
    ]
    np.testing.assert_array_equal(np.concatenate([[], *parts]), np.arange(begin, end))


def work(
    model: str,
    parallel: Section,
    source: str,
    targets: dict[int, str],
    first_step: int = 0,
    is_old: bool = False,
    dtype: str = "fp32",
) -> list[float]:
    """Losses of a run that begins at `source`, or anew, and saves after so many steps.

    Args:
        first_step: of the data.
        is_old: save megatron's gathered state, as earlier versions did.
    """
    from sft_fast.megatron.batches import open_batches
    from sft_fast.megatron.checkpoint.load import load_checkpoint
    from sft_fast.megatron.checkpoint.save import CheckpointWriter
    from sft_fast.megatron.checkpoint.train_state import TrainState
    from sft_fast.megatron.train_step import train_step
    from sft_fast.packing.from_config import make_plan

    run, config, ranks = begin(model, parallel, dtype)
    if source:
        load_checkpoint(Path(source), run.model, run.optimizer, run.schedule)
    store = make_store(random_samples(NUM_SAMPLES, seed=3))
    plan = make_plan(store, config.packing, config.train, config.seed)
    num_steps = max(targets)
    losses: list[float] = []
    with open_batches(
        store, plan, range(first_step, first_step + num_steps), run.shape, ranks
    ) as batches:
        for step in range(num_steps + 1):
            if step in targets:
                folder, phases = Path(targets[step]), Phases.unwatched()
                writer = CheckpointWriter(folder, config.checkpoint, print, run.copier, phases)
                parts = old_state(run) if is_old else state_without_collectives(run)
                writer.save(TrainState(0, {}), parts, is_last=True)
            if step < num_steps:
                result = train_step(run, batches, plan.counts(0))
                losses.append(result.loss)
    return losses


def begin(model: str, parallel: Section, dtype: str = "fp32") -> tuple[Any, Any, Any]:
    """A run at step 0, its config and layout."""
    from sft_fast.megatron.hf import SafetensorsSource
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.megatron.train_step import build_run
    from sft_fast.models.architecture import architecture_from_hf, read_hf_config

    config = make_config(
        model={"path": model, "shape": None, "dtype": dtype},
        tokenizer={"path": None},
        packing={"strategy": "bfd", "alignment": 4},
        train={"global_batch_size": NUM_SAMPLES, "micro_batch_size": 2},
        parallel=parallel,
        optim={"eps": 1e-3},
    )
    ranks = init_parallel(config.parallel, config.train, config.seed)
    architecture = architecture_from_hf(read_hf_config(Path(model)))
    source = SafetensorsSource(Path(model), architecture)
    return build_run(config, architecture, source, 9, ranks), config, ranks


def old_state(run: Any) -> dict[str, Any]:
    from sft_fast.megatron.checkpoint.optimizer_shards import SHARDING
    from sft_fast.megatron.checkpoint.state import model_weights

    weights = model_weights(run.model)
    optimizer = run.optimizer.sharded_state_dict(weights, metadata=dict(SHARDING))
    return {"model": weights, "optimizer": optimizer, "lr_schedule": run.schedule.state_dict()}


def state_without_collectives(run: Any) -> dict[str, Any]:
    import torch.distributed as dist

    from sft_fast.megatron.checkpoint.shards import take_snapshot
    from sft_fast.megatron.checkpoint.state import sharded_state

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a collective while the state is taken")

    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, refuse, raising=False)
            patch.setattr(dist.distributed_c10d, name, refuse, raising=False)
        take_snapshot(sharded_state(run.model, run.optimizer, run.schedule), run.copier)
        return sharded_state(run.model, run.optimizer, run.schedule)


def read_tensors(folder: str) -> dict[str, Any]:
    """The global tensors of a checkpoint, without padding of the vocabulary."""
    import torch
    from safetensors.torch import load_file

    from sft_fast.megatron.checkpoint.reading import ShardReader
    from sft_fast.runtime.run_files import checkpoint_path

    tensors, checkpoint = {}, checkpoint_path(Path(folder), 0)
    files = {path: load_file(path) for path in checkpoint.glob("*.safetensors")}
    for key, found in ShardReader(checkpoint).shards.items():
        whole = torch.full(found[0][0].global_shape, math.nan)
        for shard, record in found:
            sizes = zip(shard.offset, shard.shape, strict=True)
            place = tuple(slice(begin, begin + size) for begin, size in sizes)
            assert whole[place].isnan().all(), f"{key}: an element twice"
            whole[place] = files[record.path][shard.name]
        assert not whole.isnan().any(), f"{key}: an element is missing"
        is_vocabulary = "word_embeddings" in key or "output_layer" in key
        tensors[key] = whole[:VOCAB_SIZE] if is_vocabulary else whole
    return tensors


def assert_same(folder: str, other: str) -> None:
    import torch

    tensors, expected = read_tensors(folder), read_tensors(other)
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, expected[key]), key


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=SLOW)], ids=lambda n: f"from-{n}")
def saved(
    request: pytest.FixtureRequest,
    rank_pool: RankPool,
    llama: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """Two steps of some data-parallel ranks."""
    folder = str(tmp_path_factory.mktemp("saved"))
    rank_pool.run(request.param, work, llama, {}, "", {2: folder})
    return folder


def checkpoint_in(folder: str | Path) -> str:
    return f"{folder}/step_00000000"


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS)
def test_a_change_of_layout_changes_no_bit(
    rank_pool: RankPool,
    llama: str,
    saved: str,
    tmp_path: Path,
    world_size: int,
    parallel: Section,
) -> None:
    rank_pool.run(world_size, work, llama, parallel, checkpoint_in(saved), {0: str(tmp_path)})
    assert_same(str(tmp_path), saved)


@pytest.mark.parametrize(("world_size", "parallel"), EXPERT_LAYOUTS)
def test_a_change_of_layout_changes_no_bit_of_experts(
    rank_pool: RankPool, experts: str, tmp_path: Path, world_size: int, parallel: Section
) -> None:
    first, middle = str(tmp_path / "first"), str(tmp_path / "middle")
    rank_pool.run(2, work, experts, {"expert": 2}, "", {1: first})
    rank_pool.run(world_size, work, experts, parallel, checkpoint_in(first), {0: middle})
    assert_same(middle, first)


def assert_resume_is_bit_identical(
    run: Callable[..., Any], tmp_path: Path, dtype: str = "fp32"
) -> None:
    """Three steps, and the last two of them again.

    Args:
        run: `work` on some ranks, of a model and layout.
    """
    half, whole, resumed = (str(tmp_path / name) for name in ("half", "whole", "resumed"))
    losses = run("", {1: half, 3: whole}, 0, False, dtype)[0]
    again = run(checkpoint_in(half), {2: resumed}, 1, False, dtype)[0]
    assert again == losses[1:]
    assert_same_files(resumed, whole)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=SLOW)])
def test_resume_is_bit_identical(
    rank_pool: RankPool, llama: str, tmp_path: Path, world_size: int
) -> None:
    assert_resume_is_bit_identical(partial(rank_pool.run, world_size, work, llama, {}), tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=SLOW)])
@pytest.mark.parametrize(
    "parallel", [pytest.param(PLAIN, id="plain"), pytest.param({}, id="distributed", marks=SLOW)]
)
def test_resume_in_16_bits_is_bit_identical(
    rank_pool: RankPool, llama: str, tmp_path: Path, parallel: Section, dtype: str
) -> None:
    run = partial(rank_pool.run, 2, work, llama, parallel)
    assert_resume_is_bit_identical(run, tmp_path, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("parallel", [{"expert": 2}, {"expert": 2} | PLAIN], ids=str)
def test_resume_of_experts_is_bit_identical(
    rank_pool: RankPool, experts: str, tmp_path: Path, parallel: Section, dtype: str
) -> None:
    start, half, whole, resumed = (str(tmp_path / str(number)) for number in range(4))
    run = partial(rank_pool.run, 4, work, experts, parallel)
    losses = run("", {0: start, 1: half, 3: whole}, 0, False, dtype)[0]
    assert run(checkpoint_in(half), {2: resumed}, 1, False, dtype)[0] == losses[1:]
    assert_same_files(resumed, whole)
    again = str(tmp_path / "again")
    assert run(checkpoint_in(start), {3: again}, 0, False, dtype)[0] == losses
    assert_same_files(again, whole)


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("fp16", marks=SLOW)])
@pytest.mark.parametrize(
    "parallel", [pytest.param(PLAIN, id="plain"), pytest.param({}, id="distributed", marks=SLOW)]
)
def test_a_run_whose_steps_were_all_skipped_resumes(
    rank_pool: RankPool, llama: str, tmp_path: Path, parallel: Section, dtype: str
) -> None:
    first, whole, again, resumed = (str(tmp_path / str(number)) for number in range(4))
    run = partial(rank_pool.run, 2, work, llama, parallel)
    losses = run("", {0: first, 1: whole}, 0, False, dtype)
    assert run(checkpoint_in(first), {0: again, 1: resumed}, 0, False, dtype) == losses
    assert_same_files(again, first)
    assert_same_files(resumed, whole)


def assert_same_files(folder: str, other: str) -> None:
    """Data, and what is common to all ranks."""
    names = {path.name for path in Path(checkpoint_in(other)).iterdir()}
    assert {path.name for path in Path(checkpoint_in(folder)).iterdir()} == names
    for name in names:
        files = (Path(checkpoint_in(one)) / name for one in (folder, other))
        assert len({file.read_bytes() for file in files}) == 1, name


@pytest.mark.parametrize(
    ("world_size", "parallel", "most"),
    [
        (2, {}, 1.01),
        pytest.param(4, {}, 1.01, marks=SLOW),
        pytest.param(4, {"context": 2}, 1.01, marks=SLOW),
        pytest.param(4, {"tensor": 2}, 1.05, marks=SLOW),
    ],
)
def test_every_rank_writes_and_reads_its_share(
    rank_pool: RankPool,
    llama: str,
    tmp_path: Path,
    world_size: int,
    parallel: Section,
    most: float,
) -> None:
    rank_pool.run(world_size, work, llama, parallel, "", {0: str(tmp_path)})
    sizes = tensor_bytes(tmp_path)
    assert max(sizes) < most * sum(sizes) / world_size
    held = sum(tensor_bytes(tmp_path, STATES))
    read = rank_pool.run(world_size, states_read, llama, parallel, checkpoint_in(tmp_path))
    assert held <= sum(read) < most * held
    assert max(read) < most * sum(read) / world_size


def states_read(model: str, parallel: Section, source: str) -> int:
    """Bytes of the optimizer's states that this rank reads to resume."""
    from sft_fast.megatron.checkpoint.load import load_checkpoint
    from sft_fast.megatron.checkpoint.reading import ShardReader

    run, _, _ = begin(model, parallel)
    want, counts = ShardReader.want, []

    def counted(reader: Any, wanted: Any, target: Any) -> None:
        want(reader, wanted, target)
        if STATES in wanted.key:
            counts.append(target.nbytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardReader, "want", counted)
        load_checkpoint(Path(source), run.model, run.optimizer, run.schedule)
    return sum(counts)


def test_replicas_are_spread_where_every_rank_has_all(
    rank_pool: RankPool, llama: str, tmp_path: Path
) -> None:
    first, again = str(tmp_path / "first"), str(tmp_path / "again")
    rank_pool.run(2, work, llama, PLAIN, "", {1: first})
    sizes = tensor_bytes(Path(first))
    assert len(sizes) == 2 and max(sizes) - min(sizes) < 64
    rank_pool.run(1, work, llama, PLAIN, checkpoint_in(first), {0: again})
    assert_same(again, first)


def tensor_bytes(folder: Path, part_of_name: str = "") -> list[int]:
    from safetensors import safe_open

    sizes = []
    for path in sorted(folder.glob("step_*/rank_*")):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            wanted = [name for name in names if part_of_name in name]
            sizes.append(sum(file.get_tensor(name).nbytes for name in wanted))
    return sizes


def test_a_checkpoint_of_gathered_state_loads(
    rank_pool: RankPool, llama: str, tmp_path: Path
) -> None:
    old, new, loaded = (str(tmp_path / name) for name in ("old", "new", "loaded"))
    rank_pool.run(2, work, llama, {}, "", {1: old}, 0, True)
    rank_pool.run(2, work, llama, {}, "", {1: new})
    assert_same(old, new)
    rank_pool.run(2, work, llama, {"tensor": 2}, checkpoint_in(old), {0: loaded})
    assert_same(loaded, new)


def bytes_of_an_update(model: str, parallel: Section, folder: str) -> list[int]:
    """Bytes of the optimizer's weights here, and at most held at once while they are updated,
    after a checkpoint of an optimizer that was not fused was loaded."""
    import torch

    from sft_fast.megatron.checkpoint.load import load_checkpoint
    from sft_fast.megatron.checkpoint.save import CheckpointWriter
    from sft_fast.megatron.checkpoint.state import sharded_state
    from sft_fast.megatron.checkpoint.train_state import TrainState
    from sft_fast.megatron.optim import torch_adam_parts

    run, config, _ = begin(model, parallel)
    (adam,) = torch_adam_parts(run.optimizer)
    for group in adam.param_groups:
        group.update(fused=None, foreach=None)
    phases = Phases.unwatched()
    writer = CheckpointWriter(Path(folder), config.checkpoint, print, run.copier, phases)
    state = sharded_state(run.model, run.optimizer, run.schedule)
    writer.save(TrainState(0, {}), state, is_last=True)
    load_checkpoint(Path(checkpoint_in(folder)), run.model, run.optimizer, run.schedule)
    parameters = [parameter for group in adam.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    assert {float(state["step"]) for state in adam.state.values()} == {1.0}
    return [sum(parameter.nbytes for parameter in parameters), most_bytes_held(adam.step)]


@pytest.mark.parametrize("parallel", [{}, PLAIN], ids=["distributed", "plain"])
def test_an_update_holds_no_copy_of_the_state(
    rank_pool: RankPool, llama: str, tmp_path: Path, parallel: Section
) -> None:
    for num_bytes, peak in rank_pool.run(2, bytes_of_an_update, llama, parallel, str(tmp_path)):
        assert peak < num_bytes / 20


def offloaded(*args: Any) -> list[float]:
    """As `work`, with all of the optimizer in host memory, as if this were a GPU."""
    from megatron.core.optimizer import optimizer_config
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    from sft_fast.megatron import optim

    def as_offloaded(self: Any, fraction: float) -> Any:
        groups, copies = [], {}
        for group in self.param_groups:
            wide = [p.detach().clone().float() for p in group["params"]]
            copies |= dict(zip(group["params"], wide, strict=True))
            groups += [group | {"params": wide}] if wide else []
        return groups, [], copies, {copy: p for p, copy in copies.items()}, dict(copies)

    options = {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": 1.0,
        "use_precision_aware_optimizer": True,
        "pin_cpu_grads": False,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", as_offloaded)
        patch.setattr(optimizer_config, "is_te_min_version", lambda *_: True)
        patch.setattr(optim, "optimizer_offload_options", lambda *_: options)
        return work(*args)


@pytest.mark.slow
def test_an_offloaded_optimizer_resumes_bit_identically(
    rank_pool: RankPool, llama: str, tmp_path: Path
) -> None:
    start, half, whole, resumed, again = (str(tmp_path / str(number)) for number in range(5))
    run = partial(rank_pool.run, 2, offloaded, llama, {})
    losses = run("", {0: start, 1: half, 3: whole}, 0, False, "bf16")[0]
    assert run(checkpoint_in(half), {0: again, 2: resumed}, 1, False, "bf16")[0] == losses[1:]
    assert_same_files(again, half)
    assert_same_files(resumed, whole)


def load_counting(model: str, source: str) -> tuple[str, dict[str, int]]:
    """The damage that this rank hears of, and bytes that it reads of each file."""
    import os

    from sft_fast.megatron.checkpoint.load import CheckpointDamageError, load_checkpoint
    from sft_fast.runtime import manifest

    run, _, _ = begin(model, {})
    preadv, counts = os.preadv, dict.fromkeys(path.name for path in Path(source).iterdir()) | {}

    def counted(descriptor: int, buffers: list[memoryview], begin: int) -> int:
        count = preadv(descriptor, buffers, begin)
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        counts[name] = (counts[name] or 0) + count
        return count

    found = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest.os, "preadv", counted)
        try:
            load_checkpoint(Path(source), run.model, run.optimizer, run.schedule)
        except CheckpointDamageError as error:
            found = str(error)
    return found, {name: count for name, count in counts.items() if count is not None}


def test_a_load_reads_once_and_tells_all_ranks_of_damage(
    rank_pool: RankPool, llama: str, saved: str
) -> None:
    import shutil

    files = sorted(Path(checkpoint_in(saved)).glob("rank_*"))
    if len(files) != 2:
        pytest.skip("of two ranks is enough")
    copy = Path(saved) / "copy"
    for place in (None, -5, 100, 12):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(checkpoint_in(saved), copy)
        last = copy / files[1].name
        if place is not None:
            content = bytearray(last.read_bytes())
            content[place] ^= 4
            last.write_bytes(content)
        found = rank_pool.run(2, load_counting, llama, str(copy))
        if place is not None:
            assert all(text == found[0][0] and str(last) in text for text, _ in found), place
            continue
        sizes = {path.name: path.stat().st_size for path in files}
        for rank, (text, counts) in enumerate(found):
            own = files[rank].name
            assert text == "" and counts.pop(own) == sizes.pop(own)
            # Of others it reads the weights, whose states they own.
            (rest,) = counts.values()
            assert rest <= sizes[files[1 - rank].name] / 3
            sizes[own] = files[rank].stat().st_size
