"""Starts tiny training runs as real processes, forked from a server that has imported everything,
so that a start costs a tenth of a second and a test can afford many."""

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from faults import hooks
from warm_start import CONTEXT, ensure_running

CONFIG = """
output_dir: {output}
seed: 7
model:
  dtype: fp32
  shape: {{hidden_size: 16, num_layers: 2, num_attention_heads: 2, num_key_value_heads: 1,
          ffn_hidden_size: 16, max_position_embeddings: 64}}
tokenizer: {{path: demo}}
data: {{train: {rows}, cache_dir: {cache}}}
packing: {{capacity: 64}}
train: {{steps: {steps}, global_batch_size: 4}}
optim: {{lr: 1e-2, warmup_steps: 1}}
checkpoint: {{every_steps: 1}}
"""


def write_rows(path: Path, count: int = 64) -> None:
    with path.open("w") as file:
        for number in range(count):
            user = {"role": "user", "content": f"next of {number}"}
            assistant = {"role": "assistant", "content": str(number + 1)}
            file.write(json.dumps({"messages": [user, assistant]}) + "\n")


@dataclass
class Job:
    """Ranks of one start."""

    output: Path
    log: Path
    ranks: list[Any]
    began: float = field(default_factory=time.monotonic)

    def wait(self, timeout_s: float = 120.0) -> list[int]:
        """Exit codes by rank; a negative one is a signal."""
        deadline = time.monotonic() + timeout_s
        for rank in self.ranks:
            rank.join(max(deadline - time.monotonic(), 0.01))
        codes = [rank.exitcode for rank in self.ranks]
        if None in codes:
            self.kill()
            raise TimeoutError(f"exit codes {codes} after {timeout_s} s:\n{self.said()}")
        return codes

    def wait_until(self, text: str, timeout_s: float = 60.0) -> None:
        """Waits for the log to hold `text`."""
        deadline = time.monotonic() + timeout_s
        while text not in self.said():
            if time.monotonic() > deadline or not any(rank.is_alive() for rank in self.ranks):
                raise TimeoutError(f"no {text!r}:\n{self.said()}")
            time.sleep(0.005)

    def signal(self, number: int, rank: int | None = None) -> None:
        for place, process in enumerate(self.ranks):
            if rank in (None, place) and process.is_alive():
                # It may end between the two.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        for rank in self.ranks:
            rank.join()

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def json(self, name: str) -> dict[str, Any]:
        return json.loads((self.output / name).read_text())


class Launcher:
    """Starts jobs, as torchrun would: environment, store, restart count."""

    def __init__(self, folder: Path):
        self.folder, self.num_jobs = folder, 0
        self.rows, self.cache = folder / "rows.jsonl", folder / "cache"
        write_rows(self.rows)
        self.stores: dict[str, Any] = {}
        self.jobs: list[Job] = []
        ensure_running()

    def config(self, name: str, steps: int = 6) -> Path:
        path = self.folder / f"{name}.yaml"
        values = {"output": self.folder / name, "rows": self.rows, "cache": self.cache}
        path.write_text(CONFIG.format(steps=steps, **values))
        return path

    def start(
        self,
        name: str,
        *overrides: str,
        ranks: int = 1,
        hook: str | Sequence[str] = "",
        attempt: int = 0,
        job: str | None = None,
        steps: int = 6,
    ) -> Job:
        """Starts `ranks` ranks of the run `name`.

        Args:
            hook: names in faults.hooks, "name:argument", for all ranks or one for each.
            attempt: torchrun's restart count; a restart has the `job` of the first start.
        """
        self.num_jobs += 1
        job = job or f"job{self.num_jobs}"
        environment = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        environment |= {"TORCHELASTIC_RUN_ID": job, "TORCHELASTIC_RESTART_COUNT": str(attempt)}
        if ranks > 1:
            environment |= self.agent_store(job, ranks)
        log = self.folder / f"{name}-{self.num_jobs}.log"
        arguments = ["--config", str(self.config(name, steps)), *overrides]
        hook_of = [hook] * ranks if isinstance(hook, str) else hook
        processes = []
        for rank in range(ranks):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = CONTEXT.Process(
                target=hooks.run_rank, args=(arguments, own, str(log), hook_of[rank])
            )
            process.start()
            processes.append(process)
        started = Job(self.folder / name, log, processes)
        self.jobs.append(started)
        return started

    def run(self, name: str, *overrides: str, **options: Any) -> Job:
        """As `start`, to the end; every rank must succeed."""
        job = self.start(name, *overrides, **options)
        codes = job.wait()
        assert codes == [0] * len(codes), (codes, job.said())
        return job

    def agent_store(self, job: str, ranks: int) -> dict[str, str]:
        """A store that outlives the ranks, as torchrun's agent has it."""
        if job not in self.stores:
            import torch.distributed as dist

            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            store = dist.TCPStore(
                "127.0.0.1", port, is_master=True, wait_for_workers=False,
                timeout=timedelta(seconds=60),
            )  # fmt: skip
            self.stores[job] = (store, port)
        return {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.stores[job][1]),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }

    def close(self) -> None:
        for job in self.jobs:
            job.kill()
        self.stores.clear()


def weights(run: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(run / "export" / "model.safetensors")


def same_weights(first: Path, second: Path) -> bool:
    return (first / "export/model.safetensors").read_bytes() == (
        second / "export/model.safetensors"
    ).read_bytes()


def step_losses(run: Path) -> dict[int, float]:
    """The last report of each step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "step"}
