"""Warm restarts: ranks are forked from processes that have imported all that they need.

The process that torchrun starts for a rank becomes its keeper: it imports, never uses the GPU, and
forks the rank. When a rank is lost, every keeper ends its own and forks the next one; they meet
under another prefix of the store and resume from the newest checkpoint. A rank leaves nothing to
the next but files, so a spoiled GPU context or a broken communicator ends with its process.

torchrun hears nothing of it unless a keeper is lost too, with its machine for example, or there
were too many restarts; then it does what it does without keepers.
"""

import contextlib
import gc
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

from sft_fast.errors import first_line
from sft_fast.exit_codes import FAILED, HANG
from sft_fast.runtime.launch_files import number_of
from sft_fast.runtime.processes import (
    LAUNCHER_VARIABLE,
    adopt_orphans,
    die_with_parent,
    end_children,
)
from sft_fast.runtime.signals import SIGNALS, wanted_signals
from sft_fast.runtime.watchdog import FOLLOW_S, log

if TYPE_CHECKING:
    from torch.distributed import Store

POLL_S = 0.05
RANKS_THAT_LOOK_PER_S = 2000
# A rank that is not to be restarted leaves by itself, unless it is stopped or stuck.
LEAVE_WITHIN_S = 30.0
# Other keepers know of a failure at once, and need no longer than their ranks.
ANSWER_WITHIN_S = LEAVE_WITHIN_S + 15.0
STORE_TIMEOUT = timedelta(seconds=30)


@dataclass(frozen=True)
class Outcome:
    """How a rank ended."""

    rank: int
    code: int
    """Exit code; a negative one is a signal."""
    was_told: bool
    """A signal told it to leave."""
    was_ended: bool = False
    """Its keeper ended it, because of another's failure."""

    @property
    def is_failure(self) -> bool:
        """Whether another start may mend it; what users have to mend is none."""
        return self.code in (FAILED, HANG) or self.code < 0

    def was_killed(self) -> bool:
        """Whether a signal ended it that no keeper sent."""
        return self.code < 0 and not self.was_ended

    def describe(self) -> str:
        """The outcome in words."""
        if self.code < 0:
            names = {int(number): number.name for number in signal.Signals}
            return f"rank {self.rank} was ended by {names.get(-self.code, f'signal {-self.code}')}"
        return f"rank {self.rank} ended with exit code {self.code}"


def keep_rank(most: int, preload: Callable[[], object]) -> int | None:
    """Makes this process the keeper of its rank; returns in each rank, and at the end in itself.

    Args:
        most: restarts before a failure is one of the run.
        preload: imports what ranks need; uses no GPU and leaves no thread behind.

    Returns: None in a rank, which begins; in the keeper the exit code of its last rank.

    Raises:
        ValueError: the keepers have no store to meet in, or a system that does not end what they
            leave; in a rank: what was imported has begun to use the GPU, which a forked process
            then cannot.
    """
    if sys.platform != "linux":
        raise ValueError(f"parallel.warm_restarts needs Linux, this is {sys.platform}; set it to 0")
    import torch

    # So that a look at the number of GPUs does not open one.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    preload()
    keeper = Keeper(open_store(), most)
    # What was imported is shared with the ranks for as long as nobody writes to it.
    gc.collect()
    gc.freeze()
    code = keeper.run()
    # Without a GPU, a look at their number counts as use.
    if code is None and torch.cuda._is_in_bad_fork() and torch.cuda.is_available():
        raise ValueError(
            "parallel.warm_restarts: the GPU was in use before the ranks were forked, by a file of "
            "plugins or a library that opens it when it is imported; let it wait until it is "
            "called, or set parallel.warm_restarts to 0"
        )
    return code


def open_store() -> "Store":
    """Where the keepers of a job meet; torchrun's, which outlives ranks."""
    import torch.distributed as dist

    if number_of("WORLD_SIZE", 1) == 1:
        return dist.HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise ValueError(
            "parallel.warm_restarts needs the store of torchrun, which outlives the ranks; start "
            "with sft_fast train or torchrun, or set parallel.warm_restarts to 0"
        )
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=STORE_TIMEOUT,
        wait_for_workers=False,
    )


class Keeper:
    """Forks a rank, and again when the keepers agree on a restart.

    Attributes:
        child: process id of the rank; 0 = there is none.
        was_told: a signal was passed on to it.
        is_alone: the store is gone; nothing can be agreed on any more.
    """

    def __init__(self, store: "Store", most: int):
        """Args:
        store: of all keepers.
        most: restarts.
        """
        self.store, self.most = store, most
        self.rank = number_of("RANK", 0)
        self.world_size = number_of("WORLD_SIZE", 1)
        self.start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.parent = os.getppid()
        self.poll_s = max(POLL_S, self.world_size / RANKS_THAT_LOOK_PER_S)
        self.child = 0
        self.was_told = self.is_alone = False
        self.first: Outcome | None = None
        """The failure that came first in this start."""
        self.waiting: list[int] = []
        """Signals that came while there was no rank."""
        self.old_handlers: dict[int, Any] = {}

    def run(self) -> int | None:
        """Forks ranks until one start needs no other; see `keep_rank`."""
        adopt_orphans()
        self.old_handlers = {one: signal.signal(one, self.relay) for one in wanted_signals()}
        for restart in range(self.most + 1):
            if self.fork(restart):
                return None
            outcomes = self.wait(restart)
            if restart == self.most or not self.may_restart(outcomes):
                break
            # A rank that a killed one leaves in the lurch may fail before that is noticed.
            self.first = next(filter(Outcome.was_killed, outcomes), self.first)
            self.report(restart + 1)
        own = next(outcome for outcome in outcomes if outcome.rank == self.rank)
        return end_like(own.code)

    def report(self, restart: int) -> None:
        """Says once why the ranks start again."""
        if self.first is not None and self.first.rank == self.rank:
            log(
                f"{self.first.describe()}: all ranks start again from the newest checkpoint "
                f"(warm restart {restart} of {self.most})"
            )

    def relay(self, number: int, frame: FrameType | None) -> None:
        """Passes a signal on to the rank; to the next one where there is none."""
        if not self.child:
            self.waiting.append(number)
            return
        self.was_told = True
        # It may have ended, and not be known to have.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child, number)

    def fork(self, restart: int) -> bool:
        """Forks a rank; True in it."""
        keeper = os.getpid()
        # They wait, here for the rank to be known, there for it to listen.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        child = os.fork()
        if child == 0:
            self.become_rank(restart, keeper)
            return True
        self.child, waiting, self.waiting = child, self.waiting, []
        for number in waiting:
            self.relay(number, None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return False

    def become_rank(self, restart: int, keeper: int) -> None:
        """Makes a forked process what torchrun would have started; its watchdog unblocks signals.

        Args:
            restart: number of the warm restart; 0 = the first start.
            keeper: process id of the keeper.
        """
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        die_with_parent(signal.SIGTERM)
        if os.getppid() != keeper:
            os._exit(FAILED)  # it died before it could be watched
        os.environ[LAUNCHER_VARIABLE] = str(self.parent)
        if restart > 0:
            # All who read it take it for the name of a start.
            os.environ["TORCHELASTIC_RESTART_COUNT"] = f"{self.start}.{restart}"

    def wait(self, restart: int) -> list[Outcome]:
        """Waits until the ranks of a start have ended; ends this one where another has failed.

        Returns: of all ranks; of this one alone where the other keepers do not answer.
        """
        topic = f"sft_fast/keepers/{self.start}.{restart}"
        own: Outcome | None = None
        was_ended = False
        self.first, failed_at = None, math.inf
        while True:
            time.sleep(self.poll_s)
            if os.getppid() != self.parent:
                # Its rank sees the same, and leaves.
                os._exit(FAILED)
            if own is None and (code := self.poll_child()) is not None:
                own = Outcome(self.rank, code, self.was_told, was_ended)
                self.attempt(self.tell, topic, own)
            if self.first is None:
                self.first = self.attempt(self.first_failure, topic)
                failed_at = math.inf if self.first is None else time.monotonic()
            waited_s = time.monotonic() - failed_at
            if own is None:
                if self.first is not None and waited_s >= self.patience_s(self.first, restart):
                    os.kill(self.child, signal.SIGKILL)
                    was_ended = True
            elif self.is_alone or waited_s > ANSWER_WITHIN_S:
                return [own]
            elif (outcomes := self.attempt(self.all_outcomes, topic)) is not None:
                return outcomes

    def poll_child(self) -> int | None:
        """The exit code of the rank once it has ended, and nothing of it is left."""
        while self.child:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return None
            if pid == self.child:
                self.child = 0
                end_children()
                return os.waitstatus_to_exitcode(status)
        return None

    def patience_s(self, first: Outcome, restart: int) -> float:
        """How long this rank may take to leave by itself after another one's failure."""
        was_told = self.was_told or first.was_told
        if restart == self.most or was_told or not first.is_failure:
            return LEAVE_WITHIN_S
        # Of a hang every rank writes its stacks.
        return 2 * FOLLOW_S if first.code == HANG else 0.0

    def may_restart(self, outcomes: Sequence[Outcome]) -> bool:
        """Whether the ranks start again; all keepers answer alike."""
        if len(outcomes) < self.world_size or any(outcome.was_told for outcome in outcomes):
            return False
        failed = [outcome for outcome in outcomes if outcome.code != 0]
        return bool(failed) and all(outcome.is_failure for outcome in failed)

    # --- the store

    def attempt(self, work: Callable[..., Any], *args: Any) -> Any:
        """What `work` finds in the store; None where that is gone."""
        if self.is_alone:
            return None
        try:
            return work(*args)
        except RuntimeError as error:
            self.is_alone = True
            text = f"no warm restarts any more, the store of torchrun is gone: {first_line(error)}"
            log(f"rank {self.rank}: warning: {text}")
            return None

    def tell(self, topic: str, own: Outcome) -> None:
        """Says how this rank ended."""
        text = json.dumps(asdict(own))
        if own.code != 0:
            self.store.compare_set(f"{topic}/failed", "", text)
        self.store.set(f"{topic}/ended/{self.rank}", text)
        if self.store.add(f"{topic}/num_ended", 1) == self.world_size:
            self.store.set(f"{topic}/all_ended", "")

    def first_failure(self, topic: str) -> Outcome | None:
        """The first rank that ended otherwise than well."""
        if not self.store.check([f"{topic}/failed"]):
            return None
        return Outcome(**json.loads(self.store.get(f"{topic}/failed")))

    def all_outcomes(self, topic: str) -> list[Outcome] | None:
        """Of all ranks; None until the last has ended."""
        if not self.store.check([f"{topic}/all_ended"]):
            return None
        keys = [f"{topic}/ended/{rank}" for rank in range(self.world_size)]
        return [Outcome(**json.loads(text)) for text in self.store.multi_get(keys)]


def end_like(code: int) -> int:
    """Ends this process by a signal as the rank was, so that torchrun can name it; else returns
    the exit code."""
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code
