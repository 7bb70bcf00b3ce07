"""What runs inside a rank of a fault test. Importing this imports all that a rank needs."""

import errno
import gc
import io
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers  # noqa: F401
from transformers import PreTrainedTokenizerFast  # noqa: F401

from sft_fast.data import (
    build,
    demo,  # noqa: F401
)
from sft_fast.megatron import evaluation, finish, hf, job, train_step, training
from sft_fast.megatron.checkpoint import host_snapshot, save
from sft_fast.megatron.export import weights
from sft_fast.runtime import hang, launch_files, manifest, watchdog

# megatron collects garbage in every save: not what was imported, over and over.
gc.freeze()


def run_rank(arguments: list[str], environment: dict[str, str], log: str, hook: str) -> None:
    """One rank, as a process of its own; never returns."""
    os.environ.update(environment, TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    # Pictures take longer than these runs.
    sys.modules["matplotlib"] = None  # type: ignore[assignment]
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from sft_fast.train import main

    if hook:
        name, _, argument = hook.partition(":")
        globals()[name](argument)
    try:
        code = main(arguments)
    except Exception as error:  # as the interpreter would end
        print(f"{type(error).__name__}: {error}", flush=True)
        code = 1
    sys.stdout.flush()
    os._exit(code)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(module: Any, name: str, action: Callable[[], None], number: int = 1) -> None:
    """Runs `action` before the `number`-th call of module.name."""
    original, calls = getattr(module, name), [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            action()
        return original(*args, **kwargs)

    setattr(module, name, call)


def die_deleting(folder: pathlib.Path, **options: Any) -> None:
    for path in folder.glob("*"):
        path.unlink()
        die()


def kill_at(point: str) -> None:
    """Dies in the second save, just before it goes on to `point`; or in the third, which is the
    first to delete an older checkpoint, when a file of that is gone."""
    if point == "delete":
        before(save.CheckpointWriter, "prune", lambda: setattr(shutil, "rmtree", die_deleting), 3)
        return
    module, name, number = {
        "directory": (manifest, "prepare", 1),
        "shards": (manifest.HashedFile, "write", 3),
        "fsync": (manifest.os, "fsync", 1),
        "manifest": (manifest, "manifest_text", 1),
        "rename": (manifest.os, "rename", 1),
        "sync": (manifest, "sync", 2),
        "prune": (save.CheckpointWriter, "prune", 1),
    }[point]
    before(save.CheckpointWriter, "write", lambda: before(module, name, die, number), 2)


def fail_in_step(number: str) -> None:
    def fail() -> None:
        raise RuntimeError("the device gave up")

    before(training, "train_step", fail, int(number))


def die_in_step(number: str) -> None:
    before(training, "train_step", die, int(number))


def hang_in_step(number: str) -> None:
    before(training, "train_step", lambda: time.sleep(3600), int(number))


def hang_while(doing: str) -> None:
    """In the second tensor; from then on there is no time to wait for one."""
    module, name = {
        "loading": (hf.RandomSource, "read"),
        "exporting": (weights, "merge_shards"),
    }[doing]

    def hang_at_once() -> None:
        hang.LOADING_FACTOR = 0
        time.sleep(3600)

    before(module, name, hang_at_once, 2)


def wrong_export(factor: str) -> None:
    """What is exported of the first tensor is not what was trained."""
    original, calls = weights.merge_shards, [0]

    def merge(*args: Any) -> Any:
        calls[0] += 1
        return [t * float(factor) if calls[0] == 1 else t for t in original(*args)]

    weights.merge_shards = merge


def stop_in_step(number: str) -> None:
    before(training, "train_step", lambda: os.kill(os.getpid(), signal.SIGSTOP), int(number))


def say_step(number: str) -> None:
    before(training, "train_step", lambda: print("in the step", flush=True), int(number))


def cut_off_in_step(folder: str) -> None:
    """In the third step the token store loses its tokens."""

    def cut_off() -> None:
        for path in pathlib.Path(folder).glob("*/tokens.bin"):
            os.truncate(path, 0)

    before(training, "train_step", cut_off, 3)


def slow(where: str) -> None:
    """Makes a phase last two seconds, and says when it begins."""

    def linger() -> None:
        print(f"slow {where}", flush=True)
        for _ in range(200):
            time.sleep(0.01)

    module, name, number = {
        "start": (job, "init_parallel", 1),
        "data": (job, "read_inputs", 1),
        "tokenise": (build, "prepare_store", 1),
        "model": (training, "build_run", 1),
        "first step": (training, "train_step", 1),
        "step": (training, "train_step", 3),
        "evaluate": (evaluation, "divide", 1),
        "save": (save, "write_snapshot", 2),
        "export": (finish, "export_model", 1),
    }[where]
    before(module, name, linger, number)


def full_disk(numbers: str) -> None:
    """The saves with these numbers find no room."""
    original, calls = save.write_snapshot, [0]

    def write(*args: Any) -> None:
        calls[0] += 1
        if str(calls[0]) in numbers.split(","):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[1].path / "x"))
        original(*args)

    save.write_snapshot = write


def full_for_json(step: str) -> None:
    """The rank fails in a step, when no small file can be written any more."""

    def fill() -> None:
        def write(*args: Any, **options: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        watchdog.write_json = launch_files.write_json = write

    fail_in_step(step)
    before(training, "train_step", fill, int(step))


def broken_writer(numbers: str) -> None:
    """The saves with these numbers meet an error that is not of the file system."""
    original, calls = save.write_snapshot, [0]

    def write(*args: Any) -> None:
        calls[0] += 1
        if str(calls[0]) in numbers.split(","):
            raise RuntimeError("the writer broke")
        original(*args)

    save.write_snapshot = write


def hung_writer(number: str) -> None:
    before(save, "write_snapshot", lambda: time.sleep(3600), int(number))


def spoil(what: str) -> None:
    """Spoils some steps on this rank: "loss nan 3 4", "grad inf 3", "loss 1000 30"."""
    kind, value, *steps = what.split()
    original, calls = train_step.run_schedule, [0]

    def run_schedule(model: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        reports = original(model, *args, **kwargs)
        if str(calls[0]) not in steps:
            return reports
        if kind == "loss":
            return [{"lm loss": report["lm loss"] * torch.tensor([float(value), 1.0])}
                    for report in reports]  # fmt: skip
        for buffer in model[0].buffers:
            buffer.grad_data.mul_(float(value))
        return reports

    train_step.run_schedule = run_schedule


def record_pickles(path: str) -> None:
    """Writes what is unpickled, by whom, to a file."""
    import pickle
    import traceback

    def find_class(self: Any, module: str, name: str) -> Any:
        frames = [frame.filename for frame in traceback.extract_stack()]
        with open(path, "a") as file:
            file.write(f"{module}.{name} {[f for f in frames if 'sft_fast' in f]}\n")
        return original(self, module, name)

    class Recording(pickle._Unpickler):  # type: ignore[name-defined]
        pass

    original = Recording.find_class
    Recording.find_class = find_class
    pickle.Unpickler = Recording
    pickle.load = lambda file, **options: Recording(file, **options).load()
    pickle.loads = lambda data, **options: Recording(io.BytesIO(data), **options).load()
    pickle.loads(pickle.dumps(pathlib.PurePath()))


def record_connections(path: str) -> None:
    """Writes every address that Python connects to, and no local one, to a file."""
    import socket

    original = socket.socket.connect

    def connect(self: Any, address: Any) -> Any:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            with open(path, "a") as file:
                file.write(f"{address}\n")
        return original(self, address)

    socket.socket.connect = connect  # type: ignore[method-assign]


def record_listeners(path: str) -> None:
    """Writes the addresses that this process listens at in its second step to a file."""
    import psutil

    def write() -> None:
        found = psutil.Process().net_connections(kind="inet")
        listening = [one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN]
        pathlib.Path(path).write_text("\n".join(["looked", *listening]))

    before(training, "train_step", write, 2)


def leak(values: str) -> None:
    """Puts secrets into the environment, and into an error."""
    pairs = dict(pair.split("=", 1) for pair in values.split(";"))
    os.environ.update(pairs)
    print_all = " ".join(pairs.values())
    original = job.read_inputs

    def read_inputs(config: Any, *args: Any) -> Any:
        try:
            return original(config, *args)
        except (ValueError, OSError) as error:
            raise ValueError(f"{error} {print_all}") from None

    job.read_inputs = read_inputs


def no_room(numbers: str) -> None:
    """The host has no memory for the copies of the saves with these numbers."""
    original, calls = host_snapshot.HostCopier.copy, [0]

    def copy(*args: Any) -> Any:
        calls[0] += 1
        if str(calls[0]) in numbers.split(","):
            raise MemoryError("5.0 GB of host memory: Cannot allocate memory")
        return original(*args)

    host_snapshot.HostCopier.copy = copy  # type: ignore[method-assign]


def save_waits_for_step(number: str) -> None:
    """The second save is not written before a later step begins."""
    reached = threading.Event()
    before(training, "train_step", reached.set, int(number))

    def wait() -> None:
        if not reached.wait(20):
            raise RuntimeError("training waits for the disk")

    before(save, "write_snapshot", wait, 2)


def no_memory(number: str) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    before(training, "train_step", fail, int(number))


def delete_before_export(path: str) -> None:
    before(finish, "export_model", pathlib.Path(path).unlink)


def draw_forever(_: str) -> None:
    """Pictures that take longer than any time limit."""

    def draw() -> None:
        print("drawing", flush=True)
        time.sleep(3600)

    before(finish, "draw", draw)


def other_setting(override: str) -> None:
    """This rank's machine has another configuration."""
    from sft_fast import train

    original = train.load_config
    train.load_config = lambda path, overrides: original(path, [*overrides, override])


def die_before_export(_: str) -> None:
    before(finish, "export_model", die)
