"""Ranks tell each other small facts through the store of the process group.

Unlike a collective this works from a thread, has a time limit that names who is late, and moves
JSON, not pickles.
"""

import json
import time
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

LONGEST_PAUSE_S = 0.1
_answers: dict[str, str] = {}
"""Topic -> key of rank 0's last answer; the store would keep one for every save of a run."""


@dataclass(frozen=True)
class Ranks:
    """Who shares a store."""

    store: dist.Store
    rank: int
    """This one."""
    world_size: int

    @classmethod
    def of_process_group(cls) -> "Ranks":
        """The ranks that have joined the default process group."""
        store = dist.distributed_c10d._get_default_store()
        return cls(store, dist.get_rank(), dist.get_world_size())


class StoreExchange:
    """One conversation among all ranks; see manifest.Exchange."""

    def __init__(self, topic: str, timeout_s: float, ranks: "Ranks | None" = None):
        """
        Args:
            topic: what it is about, the same on every rank; may be used again later.
            timeout_s: how long a rank waits for the others.
            ranks: who takes part; None = those of the process group.
        """
        ranks = ranks or Ranks.of_process_group()
        self.store, self.rank, self.world_size = ranks.store, ranks.rank, ranks.world_size
        serial = self.store.add(f"sft_fast/{topic}/{self.rank}", 1)
        self.subject = topic
        self.topic, self.timeout_s = f"sft_fast/{topic}/{serial}", timeout_s

    def all_gather(self, name: str, value: Any) -> list[Any]:
        """What each rank says, by rank; waits for all of them."""
        topic = f"{self.topic}/{name}"
        self.store.set(f"{topic}/{self.rank}", json.dumps(value))
        keys = [f"{topic}/{rank}" for rank in range(self.world_size)]
        if self.rank == 0:
            values = [json.loads(self.wait_for(key)) for key in keys]
            self.store.set(f"{topic}/all", json.dumps(values))
            # Whoever says something new has read the last answer.
            last, new = _answers.get(self.subject), f"{topic}/all"
            for key in (*keys, *([last] if last not in (None, new) else [])):
                self.store.delete_key(key)
            _answers[self.subject] = new
            return values
        return json.loads(self.wait_for(f"{topic}/all"))

    def wait_for(self, key: str) -> bytes:
        """Polls, because a waiting store client would block the other threads of this process."""
        deadline, pause = time.monotonic() + self.timeout_s, 0.001
        while not self.store.check([key]):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"rank {self.rank} waited {self.timeout_s:.0f} s for {key} (topic, attempt, "
                    "phase, rank): that rank hangs or is gone"
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        return self.store.get(key)
