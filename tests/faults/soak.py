"""Runs `sft_fast train` for an hour and breaks it at random, to see what is left of it.

    python tests/faults/soak.py OUT --config X.yaml --minutes 60 --every 60 --seed 0

Every `--every` seconds on average one of FAULTS happens. What comes of it is printed as JSON, and
each fault with its seed's choices is a line of OUT/soak.jsonl:

goodput     seconds of optimizer steps whose result the run kept, over seconds since its start.
            Saves, restarts, and steps that were made again, count as lost.
lost_s      fault -> mean of the seconds that passed without a step that was kept, from this fault
            to the next, or that were made again because of it
memory_mib  of rank 0 and of the launcher, which lives through all restarts
files       of the run directory, at ten moments

Exit status 1: processes were left behind, or memory or files grow.
"""

import argparse
import bisect
import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "leave": signal.SIGTERM,
}
OF_LAUNCHER = {
    "kill launcher": signal.SIGKILL,
    "SIGTERM": signal.SIGTERM,
    "SIGUSR1": signal.SIGUSR1,
    "SIGHUP": signal.SIGHUP,
}
INSIDE = (
    *("raise", "no device memory", "hang", "nan", "tracker", "full disk", "writer"),
)  # fmt: skip
FAULTS = (
    *SIGNALS,
    *OF_LAUNCHER,
    *INSIDE,
    *("suspend", "STOP", "SAVE", "damage", "damage and kill", "lock", "metrics", "small files"),
    "store",
)
SAMPLE_S = 2.0
SUSPENDED_S = 7.0
NUM_MOMENTS = 10


class Soak:
    """A run, what is done to it, and what is seen of it."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.output = arguments, arguments.output
        self.rng = random.Random(arguments.seed)
        self.orders = self.output.with_name(self.output.name + "-orders")
        self.orders.mkdir(parents=True, exist_ok=True)
        self.log = self.output.with_name(self.output.name + ".log")
        self.events: list[tuple[float, str]] = []
        self.launcher: subprocess.Popen[bytes] | None = None
        self.family: list[psutil.Process] = []
        self.num_launches = self.orphans = 0
        self.memory: dict[str, list[tuple[int, float, int]]] = defaultdict(list)
        """Role -> (process, age in seconds, bytes)."""
        self.open_files: dict[str, list[int]] = defaultdict(list)
        self.files: list[int] = []

    def launch(self) -> None:
        command = [sys.executable, "-m", "sft_fast", "train", str(self.arguments.config)]
        command += ["--nproc-per-node", str(self.arguments.ranks), "--max-restarts", "1000"]
        plugin = Path(__file__).with_name("soak_plugin.py")
        command += [f"output_dir={self.output}", f"plugins=[{plugin}]", *self.arguments.overrides]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "SFT_FAST_SOAK": str(self.orders)}
        with self.log.open("ab") as log:
            self.launcher = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
        self.num_launches += 1

    def ranks(self) -> list[psutil.Process]:
        assert self.launcher is not None, "launch comes first"
        with contextlib.suppress(psutil.NoSuchProcess):
            return sorted(psutil.Process(self.launcher.pid).children(), key=lambda one: one.pid)
        return []

    def break_something(self, fault: str) -> None:
        """Does one of FAULTS."""
        assert self.launcher is not None, "launch comes first"
        rng, ranks, chosen = self.rng, self.ranks(), ""
        if fault in OF_LAUNCHER:
            self.launcher.send_signal(OF_LAUNCHER[fault])
        elif fault in INSIDE:
            chosen = f"rank{rng.randrange(self.arguments.ranks)}"
            (self.orders / f".{chosen}").write_text(fault)
            os.replace(self.orders / f".{chosen}", self.orders / chosen)
        elif fault in ("STOP", "SAVE"):
            (self.output / fault).touch()
        elif fault == "suspend":
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in ranks:
                    process.suspend()
                time.sleep(SUSPENDED_S)
                for process in ranks:
                    process.resume()
        elif fault.startswith("damage"):
            chosen = self.flip_in("checkpoints/step_*/*")
            if fault.endswith("kill") and ranks:
                ranks[0].kill()
        elif fault == "lock":
            (self.output / ".lock").unlink(missing_ok=True)
        elif fault == "metrics":
            with (self.output / "metrics.jsonl").open("ab") as file:
                file.write(b"\xff\xfe{")
        elif fault == "small files":
            for process in ranks:
                with contextlib.suppress(psutil.Error):
                    process.rlimit(psutil.RLIMIT_FSIZE, (1000, -1))
            time.sleep(2 * SAMPLE_S)
            for process in ranks:
                with contextlib.suppress(psutil.Error):
                    process.rlimit(psutil.RLIMIT_FSIZE, (-1, -1))
        elif fault == "store":
            chosen = self.cut_off("data/*/tokens.bin")
        elif ranks:
            process = rng.choice(ranks)
            chosen = str(process.pid)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(SIGNALS[fault])
        self.events.append((time.time(), fault))
        with self.output.with_name(self.output.name + ".jsonl").open("a") as file:
            record = {"time": self.events[-1][0], "fault": fault, "chosen": chosen}
            file.write(json.dumps(record | {"seed": self.arguments.seed}) + "\n")

    def flip_in(self, pattern: str) -> str:
        """Changes a byte of a file; returns its name."""
        found = sorted(self.output.glob(pattern))
        if not found:
            return ""
        path = self.rng.choice(found)
        with contextlib.suppress(OSError), path.open("r+b") as file:
            file.seek(self.rng.randrange(max(path.stat().st_size, 1)))
            file.write(b"\x5a")
        return str(path)

    def cut_off(self, pattern: str) -> str:
        """Empties a file; returns its name."""
        found = sorted(self.output.glob(pattern))
        if found:
            os.truncate(found[0], 0)
        return str(found[0]) if found else ""

    def look(self) -> None:
        """Takes the figures of one moment."""
        assert self.launcher is not None, "launch comes first"
        ranks = self.ranks()
        self.family = ranks or self.family
        roles = {"launcher": self.launcher.pid} | ({"rank 0": ranks[0].pid} if ranks else {})
        for role, pid in roles.items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                age = time.time() - process.create_time()
                self.memory[role].append((pid, age, process.memory_info().rss))
                self.open_files[role].append(process.num_fds())
        self.files.append(sum(len(names) for *_, names in os.walk(self.output)))

    def collect(self) -> None:
        """Waits for what an ended launcher has left."""
        _, alive = psutil.wait_procs(self.family, timeout=self.arguments.orphans_within)
        self.orphans += len(alive)
        for process in alive:
            process.kill()
        self.family = []

    def run(self) -> dict[str, Any]:
        """Breaks the run until the time is over, or it has finished."""
        began = time.time()
        ends = began + 60 * self.arguments.minutes
        next_fault = math.inf
        while time.time() < ends:
            if self.launcher is None or self.launcher.poll() is not None:
                self.collect()
                if read(self.output / "status.json").get("state") == "finished":
                    break
                self.launch()
            time.sleep(SAMPLE_S)
            self.look()
            if next_fault == math.inf and read(self.output / "status.json").get("step", 0):
                next_fault = time.time() + self.arguments.first
            if time.time() >= next_fault:
                next_fault = time.time() + self.rng.expovariate(1 / self.arguments.every)
                self.break_something(self.rng.choice(self.arguments.faults))
        wall_s = time.time() - began
        if self.launcher is not None and self.launcher.poll() is None:
            self.launcher.terminate()
            self.launcher.wait(60)
        self.collect()
        return self.report(began, wall_s)

    def report(self, began: float, wall_s: float) -> dict[str, Any]:
        """What is printed."""
        kept, again = steps_of(self.output / "metrics.jsonl")
        counts = {name: sum(name == fault for _, fault in self.events) for name in FAULTS}
        every = max(len(self.files) // NUM_MOMENTS, 1)
        return {
            "seed": self.arguments.seed,
            "minutes": round(wall_s / 60, 2),
            "state": read(self.output / "status.json").get("state", ""),
            "faults": {name: count for name, count in counts.items() if count},
            "launches": self.num_launches,
            "goodput": round(sum(end - begin for begin, end in kept) / wall_s, 4),
            "seconds_made_again": round(sum(end - begin for begin, end in again), 2),
            "lost_s": lost(self.events, kept, again, began, began + wall_s),
            "memory_mib": {role: growth(series) for role, series in self.memory.items()},
            "most_open_files": {role: max(found) for role, found in self.open_files.items()},
            "files": self.files[every - 1 :: every],
            "orphans": self.orphans,
            "shared_memory_files": len(os.listdir("/dev/shm")),
            "left_in_checkpoints": sorted(
                path.name for path in (self.output / "checkpoints").glob(".*")
            ),
        }


def read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {}


def steps_of(path: Path) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(begin, end) of the steps whose result was kept, and of those that were made again.

    Lines are of one step each (metrics.log_every_steps 1).
    """
    kept: list[tuple[int, float, float]] = []
    again = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        # A killed run leaves half a line.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            if record["kind"] != "step":
                continue
            step, end = record["step"], record["time"]
            # A run that resumes before this step makes all from there on again.
            while kept and kept[-1][0] >= step:
                again.append(kept.pop()[1:])
            kept.append((step, end - record["elapsed_s"], end))
    return [(begin, end) for _, begin, end in kept], sorted(again)


def lost(
    events: list[tuple[float, str]],
    kept: list[tuple[float, float]],
    again: list[tuple[float, float]],
    began: float,
    ended: float,
) -> dict[str, float]:
    """Fault -> mean seconds that it cost; "start" is what comes before the first."""
    times = [began, *(time for time, _ in events), ended]
    names = ["start", *(name for _, name in events)]
    seconds = [after - before for before, after in zip(times[:-1], times[1:], strict=True)]
    for begin, end in (*kept, *again):
        place = min(max(bisect.bisect(times, end) - 1, 0), len(names) - 1)
        seconds[place] -= end - begin
    for begin, end in again:
        # The fault that undid them came after them.
        seconds[min(bisect.bisect(times, end), len(names) - 1)] += end - begin
    found: dict[str, list[float]] = defaultdict(list)
    for name, value in zip(names, seconds, strict=True):
        found[name].append(value)
    return {name: round(sum(values) / len(values), 2) for name, values in found.items()}


def growth(series: list[tuple[int, float, int]]) -> dict[str, float]:
    """Of the process that lived longest: memory when it was a minute old and at its end."""
    pid = max(series, key=lambda entry: entry[1])[0]
    own = [(age, size / 2**20) for one, age, size in series if one == pid]
    settled = [size for age, size in own if age >= 60] or [own[-1][1]]
    return {
        "lived_s": round(own[-1][0]),
        "after_a_minute": round(settled[0], 1),
        "at_the_end": round(own[-1][1], 1),
        "largest_of_all": round(max(size for *_, size in series) / 2**20, 1),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=60.0, help="mean seconds between faults")
    parser.add_argument(
        "--first", type=float, default=60.0, help="seconds from the first step to it"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=lambda text: text.split(","), default=list(FAULTS))
    parser.add_argument("--orphans-within", type=float, default=5.0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    arguments = parser.parse_intermixed_args(argv)
    found = Soak(arguments).run()
    print(json.dumps(found, indent=1))
    rank, files = found["memory_mib"].get("rank 0"), found["files"]
    grows = rank is not None and rank["at_the_end"] > 1.05 * rank["after_a_minute"] + 16
    grows |= bool(files) and files[-1] > 2 * files[len(files) // 2] + 8
    return int(found["orphans"] > 0 or found["goodput"] == 0 or grows)


if __name__ == "__main__":
    sys.exit(main())
