"""Runs a training under torchrun and breaks it at random, to see what is left of it.

    python tests/faults/punisher.py OUT --config X.yaml --minutes 60 --every 60

Every `--every` seconds on average a rank is killed, stopped, or told to leave, or a file of a
checkpoint is damaged. What comes of it is printed as JSON: steps that were taken, steps that were
lost and taken again, memory, open files and processes left behind. Exit status 1: something that
must hold did not.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
FAULTS = ("kill", "kill", "stop", "leave", "damage", "kill launcher")


def launch(arguments: argparse.Namespace) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(arguments.ranks), "--max-restarts", "1000"]
    command += [str(ROOT / "sft_fast/train.py"), "--config", str(arguments.config)]
    command += [f"output_dir={arguments.output}", *arguments.overrides]
    with (arguments.output / "punished.log").open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def ranks_of(agent: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(agent.pid).children()
    return []


def read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {}


def punish(fault: str, agent: "subprocess.Popen[bytes]", output: Path, rng: random.Random) -> None:
    ranks = ranks_of(agent)
    if fault == "kill launcher":
        agent.kill()
    elif fault == "damage":
        files = sorted(output.glob("checkpoints/step_*/*"))
        if files:
            path = rng.choice(files)
            with contextlib.suppress(OSError), path.open("r+b") as file:
                file.seek(rng.randrange(max(path.stat().st_size, 1)))
                file.write(b"\x5a")
    elif ranks:
        numbers = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "leave": signal.SIGTERM}
        with contextlib.suppress(psutil.NoSuchProcess):
            rng.choice(ranks).send_signal(numbers[fault])


def steps_taken(output: Path) -> list[int]:
    path = output / "metrics.jsonl"
    if not path.exists():
        return []
    steps = []
    for line in path.read_text(errors="replace").splitlines():
        # A killed run leaves half a line, and the next one writes behind it.
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            steps += [record["step"]] if record["kind"] == "step" else []
    return steps


def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    """Punishes until the time is over, or the run has finished."""
    rng = random.Random(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * arguments.minutes
    counts: dict[str, int] = dict.fromkeys(FAULTS, 0)
    memory: list[int] = []
    files: list[int] = []
    orphans = num_launches = 0
    state = ""
    agent: subprocess.Popen[bytes] | None = None
    family: list[psutil.Process] = []
    next_fault = time.monotonic() + rng.expovariate(1 / arguments.every)
    while time.monotonic() < ends:
        if agent is None or agent.poll() is not None:
            _, alive = psutil.wait_procs(family, timeout=arguments.orphans_within)
            orphans += len(alive)
            for process in alive:
                process.kill()
            state = read(arguments.output / "status.json").get("state", "")
            if state == "finished":
                break
            agent, num_launches = launch(arguments), num_launches + 1
        time.sleep(0.5)
        family = ranks_of(agent) or family
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            memory.append(family[0].memory_info().rss)
            files.append(family[0].num_fds())
        if time.monotonic() >= next_fault:
            next_fault += rng.expovariate(1 / arguments.every)
            fault = rng.choice(FAULTS)
            counts[fault] += 1
            punish(fault, agent, arguments.output, rng)
    if agent is not None and agent.poll() is None:
        agent.terminate()
        agent.wait(60)
    steps = steps_taken(arguments.output)
    return {
        "state": state,
        "faults": counts,
        "launches": num_launches,
        "steps": len(set(steps)),
        "goodput": len(set(steps)) / max(len(steps), 1),
        "orphans": orphans,
        "largest_memory_mib": max(memory, default=0) >> 20,
        "most_open_files": max(files, default=0),
        "shared_memory_files": len(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else 0,
        "left_in_checkpoints": sorted(
            path.name for path in (arguments.output / "checkpoints").glob(".*")
        ),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=60.0, help="mean seconds between faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--orphans-within", type=float, default=5.0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    arguments = parser.parse_intermixed_args(argv)
    found = soak(arguments)
    print(json.dumps(found, indent=1))
    return int(found["orphans"] > 0 or found["steps"] == 0)


if __name__ == "__main__":
    sys.exit(main())
