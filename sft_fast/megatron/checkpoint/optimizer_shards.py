"""Each rank's own part of weights and optimizer state, as blocks of the global tensors.

megatron's distributed optimizer gives every data-parallel rank a flat range of each parameter. A
flat range is a few blocks (flat_ranges.py), so a rank saves and loads what it owns, straight from
the device: no collective, and no copy of what other ranks own. What every data-parallel rank holds
is cut into equal ranges likewise.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from sft_fast.constants import ceil_div
from sft_fast.megatron.checkpoint.flat_ranges import Sharded, as_rectangles
from sft_fast.megatron.checkpoint.reading import ShardReader
from sft_fast.megatron.optim import optimizer_parts

# The one optimizer layout of megatron that loads at any data-parallel size; its names are ours.
# megatron adds process groups to the mapping it is given, so it gets copies.
SHARDING: Mapping[str, str] = {"distrib_optim_sharding_type": "fully_reshardable"}
SHARDING_FIELD = "param_state_sharding_type"
STATES = ("param", "exp_avg", "exp_avg_sq")
# Of a group of parameters: what is no option, and what sets it apart.
GROUP_STATE = ("params", "step")
GROUP_KIND = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")


def state_of_parts(optimizer: MegatronOptimizer, state: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """Each optimizer with its own part of a state in megatron's form."""
    parts = optimizer_parts(optimizer)
    states = [state] if len(parts) == 1 else [state[number] for number in range(len(parts))]
    return list(zip(parts, states, strict=True))


def is_distributed(optimizer: MegatronOptimizer) -> bool:
    """Whether each data-parallel rank has its own part of the state."""
    kinds = {isinstance(part, DistributedOptimizer) for part in optimizer_parts(optimizer)}
    assert len(kinds) <= 1, "distributed and other optimizers in one run"
    return kinds == {True}


def state_prefixes(optimizer: MegatronOptimizer) -> list[tuple[Any, str]]:
    """The distributed optimizers, and what megatron puts before the keys of their states."""
    parts = optimizer_parts(optimizer)
    chained = len(parts) > 1
    named = ((part, f"chained_{number}." if chained else "") for number, part in enumerate(parts))
    return [(part, prefix) for part, prefix in named if not part.is_stub_optimizer]


def owned_ranges(part: Any) -> Iterator[tuple[Tensor, int, int]]:
    """Parameters, of any shape, with the first and last + 1 element whose state this rank has."""
    for by_dtype in part.gbuf_ranges:
        for buckets in by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def by_parameter(weights: Mapping[str, Any]) -> dict[Tensor, Sharded]:
    """Parameter, of any shape, -> where it lies in its global tensor."""
    tensors, _ = extract_sharded_tensors_and_factories(dict(weights))
    return {sharded.data: sharded for sharded in nested_values(tensors)}


def is_written_here(sharded: Sharded) -> bool:
    """Whether the data-parallel ranks of this rank are those that write a tensor, not another
    pipeline stage or tensor-parallel rank with the same one."""
    assert len(sharded.replica_id) == 3, f"{sharded.key}: replica {sharded.replica_id}"
    return sharded.replica_id[0] == sharded.replica_id[1] == 0


def own_tensors(
    weights: Mapping[str, Any], optimizer: MegatronOptimizer
) -> Iterator[ShardedTensor]:
    """What this rank owns of a distributed optimizer's states, and of the weights it updates.

    Only the owner's weights are sure to be up to date: the others' come with the next gather.
    """
    shards = by_parameter(weights)
    for part, prefix in state_prefixes(optimizer):
        allocate_state(part)
        for parameter, begin, end in owned_ranges(part):
            sharded = shards[parameter]
            assert sharded.replica_id[-1] == part.data_parallel_group.rank(), sharded.key
            if not is_written_here(sharded):
                continue
            values = parameter.detach().reshape(-1)[begin:end]
            yield from (p for *_, p in as_rectangles(sharded, begin, end, "", values, values.dtype))
            states = part._get_main_param_and_optimizer_states(parameter)
            for name in STATES:
                values, key = states[name].detach().reshape(-1), f"{prefix}optimizer.state.{name}."
                yield from (
                    p for *_, p in as_rectangles(sharded, begin, end, key, values, values.dtype)
                )


def allocate_state(part: Any) -> None:
    """Gives the state of step 0 to an optimizer that has made no step, where all were skipped."""
    if not part.optimizer.state and part.init_state_fn is not None:
        part.init_state_fn(part.optimizer, part.config)


def spread_replicas(tensors: Iterable[Sharded]) -> Iterator[ShardedTensor]:
    """This rank's equal share, in bytes, of tensors that all data-parallel ranks hold.

    Each rank finds the same ends from the sizes alone, so that the shares fit together.
    """
    groups: dict[bool, list[Sharded]] = {False: [], True: []}
    for sharded in tensors:
        if is_written_here(sharded):
            groups[".experts." in sharded.key].append(sharded)
    for is_expert, group in groups.items():
        total, passed = sum(sharded.data.nbytes for sharded in group), 0
        for sharded in group:
            rank, size = sharded.replica_id[-1], num_replicas(is_expert)
            assert rank < size, f"{sharded.key}: replica {rank} of {size}"
            values = sharded.data.detach().reshape(-1)
            item, count = values.element_size(), values.numel()
            ends = (total * index // size - passed for index in (rank, rank + 1))
            begin, end = (min(max(ceil_div(place, item), 0), count) for place in ends)
            passed += count * item
            data = values[begin:end]
            yield from (p for *_, p in as_rectangles(sharded, begin, end, "", data, data.dtype))


def num_replicas(is_expert: bool) -> int:
    """Over how many data-parallel ranks a parameter's state is spread."""
    if is_expert:
        return int(parallel_state.get_expert_data_parallel_world_size())
    return int(parallel_state.get_data_parallel_world_size(with_context_parallel=True))


def state_to_save(weights: dict[str, Any], optimizer: MegatronOptimizer) -> dict[str, Any]:
    """What this rank writes, and what is common to all, of weights and optimizer.

    Args:
        weights: sharded state dicts of the model's chunks.
        optimizer: of the run.
    """
    if is_distributed(optimizer):
        updated = {
            parameter
            for part, _ in state_prefixes(optimizer)
            for buffer in part.buffers
            for parameter in buffer.param_index_map
        }
        own, common = list(own_tensors(weights, optimizer)), common_state(optimizer)
    else:
        # megatron's are in the sharded form already; the same on all data-parallel ranks.
        updated, own = set(), []
        common = optimizer.sharded_state_dict(weights, metadata=dict(SHARDING))
    replicated, rest = extract_sharded_tensors_and_factories(
        {"model": dict(weights), "optimizer": common}
    )
    own += spread_replicas(t for t in nested_values(replicated) if t.data not in updated)
    assert len({(p.key, p.global_offset) for p in own}) == len(own), "a block twice"
    return {**rest, "own": dict(enumerate(own))}


def common_state(optimizer: MegatronOptimizer) -> dict[Any, Any]:
    """What a distributed optimizer has besides its tensors, in megatron's form."""
    parts = optimizer_parts(optimizer)
    if len(parts) > 1:
        optimizer._synchronize_steps()
    sharding = {SHARDING_FIELD: SHARDING["distrib_optim_sharding_type"]}
    states = [{} if part.is_stub_optimizer else part.state_dict() | sharding for part in parts]
    for state in states:
        for group in state.get("optimizer", {}).get("param_groups", ()):
            # An offloaded optimizer's groups name the classes of its parts.
            for name in [name for name, value in group.items() if isinstance(value, type)]:
                del group[name]
    return states[0] if len(parts) == 1 else dict(enumerate(states))


def want_weights(weights: Mapping[str, Any], reader: ShardReader) -> dict[str, Any]:
    """Has the reader fill the parameters themselves.

    Returns: the values that are no tensors, by name.
    """
    others = {}
    for name, sharded in weights.items():
        if isinstance(sharded, ShardedObject):
            others[name] = reader.object(sharded)
            continue
        target = sharded.data.detach()
        want_range(sharded, 0, target.numel(), "", reader, target)
    return others


def want_range(
    sharded: Sharded, begin: int, end: int, prefix: str, reader: ShardReader, target: Tensor
) -> None:
    """Has the reader fill a contiguous tensor, of any shape, with elements begin..end-1 of a local
    tensor, wherever the checkpoint has them."""
    flat = target.view(-1)
    for first, last, block in as_rectangles(sharded, begin, end, prefix, None, target.dtype):
        reader.want(block, flat[first:last])


def want_optimizer(
    optimizer: MegatronOptimizer,
    common: Mapping[Any, Any],
    weights: Mapping[str, Any],
    reader: ShardReader,
) -> Callable[[], None]:
    """Restores what is common to all ranks of a distributed optimizer, and has the reader fill what
    this rank owns; returns what is to be done after that.

    Raises:
        ValueError: the parameters are grouped by another ratio of learning rates.
    """
    keep_options(optimizer, common)
    parts = state_of_parts(optimizer, common)
    for part, state in parts:
        if not part.is_stub_optimizer:
            fields = {name: value for name, value in state.items() if name != SHARDING_FIELD}
            part.load_state_dict(fields)
    if len(parts) > 1:
        optimizer._synchronize_steps()
    shards, filled = by_parameter(weights), []
    for part, prefix in state_prefixes(optimizer):
        for parameter, begin, end in owned_ranges(part):
            found = part._get_main_param_and_optimizer_states(parameter)
            states = {name: found[name] for name in STATES}
            for name, state in states.items():
                key = f"{prefix}optimizer.state.{name}."
                want_range(shards[parameter], begin, end, key, reader, state.detach())
            filled.append((part, parameter, states))

    def finish() -> None:
        for part, parameter, states in filled:
            set_states(part, parameter, states)
        for part, _ in state_prefixes(optimizer):
            if hasattr(part.optimizer, "_sync_hdo_state_to_sub_optimizers"):
                part.optimizer._sync_hdo_state_to_sub_optimizers()

    return finish


def keep_options(optimizer: MegatronOptimizer, state: Mapping[Any, Any]) -> None:
    """Gives the groups of parameters in a saved state the options of the optimizer's own: rates,
    betas, epsilon.

    Those are the configuration's. megatron's schedule goes by a group's rates, and 0.19 tells
    groups apart by them.

    Raises:
        ValueError: the parameters are grouped by another ratio of learning rates.
    """
    for part, own_state in state_of_parts(optimizer, state):
        if getattr(part, "is_stub_optimizer", False):
            continue
        groups = part.optimizer.param_groups
        saved = own_state.get("optimizer", own_state)["param_groups"]
        check_rates(groups, saved)
        own = {kind_of(group): group for group in groups}
        for group in saved:
            options = own[kind_of(group)].items()
            group.update({name: value for name, value in options if name not in GROUP_STATE})


def kind_of(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What sets a group of parameters apart, whatever its rates."""
    return tuple(group.get(name) for name in GROUP_KIND)


def check_rates(groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError unless the saved groups of parameters have the learning rates' ratios that
    the optimizer's groups have, without which megatron cannot tell them apart."""
    present, before = ({group["lr_mult"] for group in each} for each in (groups, saved))
    if present != before:
        raise ValueError(
            f"lora.loraplus_lr_ratio: the checkpoint was trained with {max(before)}, and this run "
            f"has {max(present)}; keep it, or choose another output_dir"
        )


@torch.no_grad()
def set_states(part: Any, parameter: Tensor, states: dict[str, Tensor]) -> None:
    """Tells the optimizer of states, flat [elements of this rank], which may be its own."""
    # torch's AdamW has a step count per parameter, which megatron has restored but asks for again.
    group, order = part.model_param_group_index_map[parameter]
    state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
    step = {"step": state["step"]} if "step" in state else {}
    part._set_main_param_and_optimizer_states(parameter, step | states)
