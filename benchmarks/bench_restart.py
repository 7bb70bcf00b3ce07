"""From a killed rank to the next step: warm restarts beside torchrun's.

Run: `pytest benchmarks/bench_restart.py`. Two ranks of a tiny model train on the CPU; one is killed
with SIGKILL in the middle of the run, and the time until the end of the next step is read from
metrics.jsonl. `extra_info` has the seconds of both kinds of restart, and how many times longer
torchrun's takes (medians). The weights at the end are compared, bit by bit, with those of a run
that nothing happened to.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[1]
STEPS = 40
KILL_AT = (10, 20, 30)
CONFIG = """
output_dir: {output}
model:
  dtype: fp32
  shape: {{hidden_size: 64, num_layers: 2, num_attention_heads: 4, num_key_value_heads: 2,
          ffn_hidden_size: 128, max_position_embeddings: 512}}
tokenizer: {{path: demo}}
data: {{train: {rows}, cache_dir: {cache}}}
packing: {{capacity: 512}}
train: {{steps: {steps}, global_batch_size: 8}}
checkpoint: {{every_steps: 1}}
metrics: {{log_every_steps: 1, pictures: false}}
evaluation: {{exact_match_samples: 0}}
"""
KINDS = {
    "torchrun": (("--max-restarts", "99"), ()),
    "warm": ((), ("parallel.warm_restarts=99",)),
}


def write_config(folder: Path, name: str) -> Path:
    rows = folder / "rows.jsonl"
    if not rows.exists():
        texts = (json.dumps({"prompt": f"after {n}", "completion": str(n + 1)}) for n in range(999))
        rows.write_text("\n".join(texts) + "\n")
    config = folder / f"{name}.yaml"
    values = {"output": folder / name, "rows": rows, "cache": folder / "cache", "steps": STEPS}
    config.write_text(CONFIG.format(**values))
    return config


def start(folder: Path, name: str, kind: str) -> subprocess.Popen[bytes]:
    of_torchrun, overrides = KINDS[kind]
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", *of_torchrun)
    script = (str(ROOT / "sft_fast/train.py"), "--config", str(write_config(folder, name)))
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *launcher, *script, *overrides],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    path = folder / name / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def last_step(folder: Path, name: str) -> int:
    return max([one["step"] for one in records(folder, name) if one["kind"] == "step"], default=0)


def next_step_at(folder: Path, name: str, killed: float) -> float | None:
    """When the first step of the next start ended, seconds since 1970."""
    later = itertools.dropwhile(
        lambda one: one["kind"] != "launch" or one["time"] < killed, records(folder, name)
    )
    return next((one["time"] for one in later if one["kind"] == "step"), None)


def last_rank(launcher: int) -> psutil.Process:
    """The process that trains: below its keeper, where there is one."""
    rank = max(psutil.Process(launcher).children(), key=lambda process: process.pid)
    return rank.children()[0] if rank.children() else rank


def restarts_s(folder: Path, kind: str) -> list[float]:
    """Seconds from each kill of a rank to the end of the next step."""
    job, seconds = start(folder, kind, kind), []

    def wait_a_moment() -> None:
        assert job.poll() is None, (folder / f"{kind}.log").read_text()
        time.sleep(0.01)

    try:
        for step in KILL_AT:
            while last_step(folder, kind) < step:
                wait_a_moment()
            victim, killed = last_rank(job.pid), time.time()
            victim.send_signal(signal.SIGKILL)
            while (done := next_step_at(folder, kind, killed)) is None:
                wait_a_moment()
            seconds.append(done - killed)
        assert job.wait(300) == 0, (folder / f"{kind}.log").read_text()
    finally:
        job.terminate()
        job.wait()
    return seconds


@pytest.mark.slow
def test_restart(benchmark: Any, tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    assert start(tmp_path, "unbroken", "torchrun").wait(300) == 0
    seconds: dict[str, list[float]] = {}

    def kill_and_wait() -> None:
        for kind in KINDS:
            seconds[kind] = restarts_s(tmp_path, kind)

    benchmark.pedantic(kill_and_wait, rounds=1)
    expected = (tmp_path / "unbroken/export/model.safetensors").read_bytes()
    for kind in KINDS:
        assert (tmp_path / kind / "export/model.safetensors").read_bytes() == expected, kind
    median_s = {kind: statistics.median(values) for kind, values in seconds.items()}
    benchmark.extra_info |= {
        "seconds": {kind: [round(one, 2) for one in values] for kind, values in seconds.items()},
        "times_warm": round(median_s["torchrun"] / median_s["warm"], 2),
    }
    print(benchmark.extra_info)
