"""Process groups and seeds: from the config's parallel sizes to megatron's parallel state."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from sft_fast.config.layout import check_world_size
from sft_fast.config.sections import ParallelConfig, TrainConfig
from sft_fast.data.build import Progress
from sft_fast.megatron.device import distributed_backend, init_device
from sft_fast.megatron.exchange import Ranks
from sft_fast.megatron.join import agree, wait_for_all
from sft_fast.runtime.processes import is_gone, process_space, start_of

logger = logging.getLogger(__name__)
SHORTEST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.5


@dataclass(frozen=True)
class Parallel:
    """This rank's place in the layout."""

    device: torch.device
    rank: int
    world_size: int
    tp_size: int
    tp_rank: int
    tp_group: dist.ProcessGroup
    pp_size: int
    pp_rank: int
    pp_group: dist.ProcessGroup
    vp_size: int
    cp_size: int
    cp_rank: int
    cp_group: dist.ProcessGroup
    dp_size: int
    dp_rank: int
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    """The ranks that have the same weights: data-parallel and context-parallel ones."""
    ep_size: int
    """Ranks that the experts of a layer are spread over."""
    ep_rank: int
    ep_group: dist.ProcessGroup
    etp_size: int
    """Ranks that one expert is split over."""
    etp_rank: int
    etp_group: dist.ProcessGroup
    edp_rank: int
    """Number of this rank's copy of its experts."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank has the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the LM head."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_first_replica(self) -> bool:
        """True on the ranks that together hold the model for the first time."""
        return self.dp_rank == 0 and self.cp_rank == 0

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes shared files."""
        return self.rank == 0

    def describe(self) -> str:
        """The layout in words."""
        kind = "CPU" if self.device.type == "cpu" else "GPU"
        ranks = f"{self.world_size} {kind} rank{'s' if self.world_size > 1 else ''}"
        return (
            f"{ranks}: tensor {self.tp_size} x pipeline {self.pp_size} x "
            f"context {self.cp_size} x data {self.dp_size}"
        )


def init_distributed(timeout_minutes: float, facts: Mapping[str, str]) -> None:
    """Joins the process group that torchrun describes; a single process needs no torchrun.

    The store prefix carries the restart count: after `--max-restarts` the new ranks would otherwise
    read the dead ranks' addresses.

    Args:
        timeout_minutes: of a collective, and for all ranks to come.
        facts: what must be equal on all ranks.

    Raises:
        ValueError: the ranks have other configurations, code or versions.
        TimeoutError: not all ranks came.
    """
    if dist.is_initialized():
        return
    backend, timeout = distributed_backend(), timedelta(minutes=timeout_minutes)
    if "MASTER_ADDR" not in os.environ:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    uses_agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    tcp_store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0 and not uses_agent_store,
        timeout=timeout,
        wait_for_workers=False,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt_{attempt}", tcp_store)
    ranks, timeout_s = Ranks(store, rank, world_size), timeout.total_seconds()
    wait_for_all(ranks, timeout_s)
    agree("settings", facts, timeout_s, ranks)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def init_parallel(
    parallel: ParallelConfig,
    train: TrainConfig,
    seed: int,
    facts: Mapping[str, str] | None = None,
) -> Parallel:
    """Starts torch.distributed and megatron's groups, and seeds this rank.

    Args:
        parallel: sizes and time limits.
        train: what the world size must fit.
        seed: of the run.
        facts: what must be equal on all ranks; see join.settings.

    Raises:
        ConfigError: the world size does not fit the layout.
        ValueError, TimeoutError: as `init_distributed`.
    """
    device = init_device()
    init_distributed(parallel.timeout_minutes, facts or {})
    check_world_size(parallel, train, dist.get_world_size())
    virtual = parallel.virtual_pipeline
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        distributed_timeout_minutes=int(parallel.timeout_minutes),
        create_gloo_process_groups=False,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return current_parallel(device)


def current_parallel(device: torch.device) -> Parallel:
    """Reads megatron's initialised parallel state, once, so that nothing else has to look it up."""
    return Parallel(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        vp_size=parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        cp_size=parallel_state.get_context_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_group=parallel_state.get_data_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_group=parallel_state.get_expert_model_parallel_group(),
        etp_size=parallel_state.get_expert_tensor_parallel_world_size(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        etp_group=parallel_state.get_expert_tensor_parallel_group(),
        edp_rank=parallel_state.get_expert_data_parallel_rank(),
    )


def once_per_node(name: str, work: Callable[[Progress], Path], log: Progress = logger.info) -> Path:
    """Runs `work` on one rank of each node while the node's other ranks wait for it.

    They wait on keys of the store, not inside a collective, so no watchdog fires however long the
    work takes. How far it is they log; its failure, whatever it is, reaches them at once, and so
    does the end of its process.

    Args:
        name: unique in the run.
        work: given a function that takes a line of text about its progress; returns where its
            result is.
        log: gets these lines on the rank that works.

    Returns: what `work` returned, on every rank.

    Raises:
        ValueError: `work` failed on the other rank.
    """
    store = dist.distributed_c10d._get_default_store()
    node = os.environ.get("GROUP_RANK", "0")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"sft_fast/{attempt}/{name}/{node}"
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        return wait_for_node(store, key, name)

    def report(text: str) -> None:
        log(text)
        store.set(f"{key}/progress", text)

    worker = (os.getpid(), start_of(os.getpid()), process_space())
    store.set(f"{key}/worker", " ".join(map(str, worker)))
    try:
        result = work(report)
    except BaseException as error:
        is_explained = isinstance(error, ValueError | OSError)
        store.set(key, f"error {error}" if is_explained else f"error {name}: {error!r}")
        raise
    store.set(key, f"done {result}")
    return result


def wait_for_node(store: dist.Store, key: str, name: str) -> Path:
    """Waits until another rank of this node has set `key`; see `once_per_node`."""
    shown, pause_s = "", SHORTEST_PAUSE_S
    while not store.check([key]):
        if store.check([f"{key}/progress"]):
            text = store.get(f"{key}/progress").decode()
            if text != shown:
                shown = text
                logger.info("waiting for %s: %s", name, text)
        if store.check([f"{key}/worker"]):
            pid, started, space = store.get(f"{key}/worker").decode().split()
            if is_gone(int(pid), float(started), space) and not store.check([key]):
                raise ValueError(
                    f"{name}: process {pid}, which prepares it for this node, has ended "
                    "without a word; it was killed, by the system perhaps for want of memory"
                )
        time.sleep(pause_s)
        # A store serves the ranks of all nodes.
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    status, _, answer = store.get(key).decode().partition(" ")
    if status != "done":
        raise ValueError(answer)
    return Path(answer)
