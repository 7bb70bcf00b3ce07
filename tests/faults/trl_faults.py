"""Does to TRL's SFTTrainer what the fault tests do to a run, and prints what comes of it.

    pip install trl && python tests/faults/trl_faults.py WORK

Needs no GPU and nothing of this package. The trainer is used as its documentation says: it saves
every step, keeps two checkpoints, and is started again with the newest one that
transformers.trainer_utils.get_last_checkpoint finds. Every job is a forked process.
"""

import argparse
import contextlib
import errno
import json
import os
import pickle
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset, load_dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_utils import get_last_checkpoint

STEPS = 12
NUM_KILLS = 20
Hook = Callable[[Any], None]


def make_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def write_rows(path: Path, first: int = 0) -> None:
    numbers = range(first, first + 64)
    path.write_text("".join(json.dumps({"text": f"next of {n}: {n + 1}"}) + "\n" for n in numbers))


def train(output: Path, rows: Path, hook: Hook | None, **options: Any) -> None:
    torch.manual_seed(7)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {"vocab_size": 257, "intermediate_size": 16, "max_position_embeddings": 64}
    arguments: dict[str, Any] = {
        "output_dir": str(output), "max_steps": STEPS, "per_device_train_batch_size": 4,
        "save_steps": 1, "save_total_limit": 2, "logging_steps": 1, "learning_rate": 1e-2,
        "report_to": "none", "use_cpu": True, "max_length": 64, "seed": 7,
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    dataset = load_dataset("json", data_files=str(rows), split="train")
    assert isinstance(dataset, Dataset)
    trainer = trl.SFTTrainer(
        model=LlamaForCausalLM(LlamaConfig(**shape, **sizes)),
        args=trl.SFTConfig(**{**arguments, **options}),
        train_dataset=dataset,
        processing_class=make_tokenizer(),
    )
    if hook is not None:
        hook(trainer)
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    print(f"resumes from {last}", flush=True)
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(output / "final"))


class Lab:
    """Starts jobs in forks of this process."""

    def __init__(self, folder: Path):
        self.folder, self.rows, self.num_jobs = folder, folder / "rows.jsonl", 0
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(self.rows)

    def start(
        self, name: str, hook: Hook | None = None, rows: Path | None = None, **options: Any
    ) -> int:
        """The process id of a job that writes to the directory `name`."""
        self.num_jobs += 1
        child = os.fork()
        if child:
            return child
        log = os.open(self.log(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["HF_DATASETS_CACHE"] = str(self.folder / "cache")
        try:
            train(self.folder / name, rows or self.rows, hook, **options)
        except BaseException as error:
            print(f"ended by {type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)

    def run(self, name: str, hook: Hook | None = None, **options: Any) -> str:
        """As `start`, to the end; says in a line how it ended."""
        return self.outcome(name, self.start(name, hook, **options))

    def outcome(self, name: str, job: int) -> str:
        _, status = os.waitpid(job, 0)
        if os.WIFSIGNALED(status):
            return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
        ended = re.search(r"ended by .*", self.said(name))
        return " ".join(ended[0].split())[:160] if ended else "finished"

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def said(self, name: str) -> str:
        return self.log(name).read_text(errors="replace") if self.log(name).exists() else ""

    def wait_for(self, name: str, text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in self.said(name):
            assert time.monotonic() < deadline, self.said(name)
            time.sleep(0.01)

    def checkpoints(self, name: str) -> list[str]:
        return sorted(path.name for path in (self.folder / name).glob("checkpoint-*"))

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "final/model.safetensors")

    def is_same(self, first: str, second: str) -> bool:
        a, b = self.weights(first), self.weights(second)
        return all(torch.equal(a[key], b[key]) for key in a)


def at_step(step: int, action: Callable[[], None]) -> Hook:
    """Runs `action` in the trainer before its `step`-th step, from 1."""

    def install(trainer: Any) -> None:
        original, calls = trainer.training_step, [0]

        def training_step(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == step:
                action()
            return original(*args, **kwargs)

        trainer.training_step = training_step

    return install


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at_random(lab: Lab) -> str:
    rng, kills, failures = random.Random(0), 0, []
    while kills < NUM_KILLS:
        name = f"killed{kills}"
        while kills < NUM_KILLS:
            job = lab.start(name)
            lab.wait_for(name, "resumes from")
            time.sleep(rng.uniform(0.0, 1.2))
            done, _ = os.waitpid(job, os.WNOHANG)
            if done:
                break
            os.kill(job, signal.SIGKILL)
            os.waitpid(job, 0)
            kills += 1
        end = lab.run(name)
        if end != "finished":
            failures.append(end)
        elif not lab.is_same("unbroken", name):
            failures.append("other weights than the unbroken run")
    return f"{kills} kills; runs that did not end as the unbroken one: {failures or 'none'}"


def killed_in_save(lab: Lab) -> str:
    def install(trainer: Any) -> None:
        original, calls = torch.save, [0]

        def save(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            # Two or three files a checkpoint: the third save, between its files.
            if trainer.state.global_step == 3:
                die()
            return original(*args, **kwargs)

        torch.save = save

    first = lab.run("in-save", install)
    left = lab.checkpoints("in-save")
    again = lab.run("in-save")
    same = again == "finished" and lab.is_same("unbroken", "in-save")
    source = re.search(r"resumes from .*?(checkpoint-\d+|None)", lab.said("in-save"))
    found = source[1] if source else "?"
    return f"{first}; left {left}; started again from {found}: {again}, same weights: {same}"


def damaged_files(lab: Lab) -> Iterator[str]:
    lab.run("whole", at_step(4, die))
    last = get_last_checkpoint(str(lab.folder / "whole"))
    assert last is not None
    for file in sorted(path.name for path in Path(last).iterdir()):
        for harm in (truncate, flip, Path.unlink):
            shutil.rmtree(lab.folder / "harmed", ignore_errors=True)
            shutil.copytree(lab.folder / "whole", lab.folder / "harmed")
            harm(lab.folder / "harmed" / Path(last).name / file)
            end = lab.run("harmed")
            if end == "finished":
                end += f", same weights: {lab.is_same('unbroken', 'harmed')}"
            is_named = file in end
            yield f"{file}, {harm.__name__}: {end}; file named: {is_named}"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 4
    path.write_bytes(data)


def disk_full(lab: Lab) -> str:
    def install(trainer: Any) -> None:
        original = torch.save

        def save(value: Any, file: Any, *args: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
            return original(value, file, *args, **kwargs)

        torch.save = save

    end = lab.run("full", install)
    left = lab.checkpoints("full")
    return f"{end}; left {left}; started again: {lab.run('full')}"


def terminated(lab: Lab) -> Iterator[str]:
    hook = at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    for name, options in (("default", {}), ("jit", {"enable_jit_checkpoint": True})):
        steps = {"save_steps": 1000, "max_steps": 2000}
        end = lab.run(f"terminated-{name}", hook, **steps, **options)
        yield f"{options or 'default options'}: {end}; {lab.checkpoints(f'terminated-{name}')}"


def not_a_number(lab: Lab) -> str:
    def install(trainer: Any) -> None:
        original, calls = trainer.compute_loss, [0]

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            loss = original(*args, **kwargs)
            scale = float("nan") if calls[0] == 3 else 1.0
            return (loss[0] * scale, *loss[1:]) if isinstance(loss, tuple) else loss * scale

        trainer.compute_loss = compute_loss

    end = lab.run("nan", install)
    bad = sum(not tensor.isfinite().all() for tensor in lab.weights("nan").values())
    return f"{end}; weights that are not finite at the end: {bad} of {len(lab.weights('nan'))}"


def other_data(lab: Lab) -> str:
    lab.run("other", at_step(4, die))
    rows = lab.folder / "other.jsonl"
    write_rows(rows, first=1000)
    end = lab.run("other", rows=rows, seed=8)
    return f"started again with other rows and another seed: {end}"


def two_jobs(lab: Lab) -> str:
    first = lab.start("shared", max_steps=200)
    lab.wait_for("shared", "resumes from")
    time.sleep(1)
    second = lab.run("shared", max_steps=20)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    return f"the second job in the same directory: {second}"


def pickled_payload(lab: Lab) -> Iterator[str]:
    class Payload:
        def __reduce__(self) -> Any:
            return (Path.touch, (lab.folder / "harm",))

    lab.run("payload", at_step(4, die))
    last = get_last_checkpoint(str(lab.folder / "payload"))
    assert last is not None
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (lab.folder / "harm").unlink(missing_ok=True)
        shutil.rmtree(lab.folder / "poisoned", ignore_errors=True)
        shutil.copytree(lab.folder / "payload", lab.folder / "poisoned")
        path = lab.folder / "poisoned" / Path(last).name / name
        path.write_bytes(pickle.dumps(Payload()))
        end = lab.run("poisoned")
        yield f"{name}: {end}; payload run: {(lab.folder / 'harm').exists()}"


def bad_line(lab: Lab) -> str:
    rows = lab.folder / "bad.jsonl"
    lines = lab.rows.read_text().splitlines()
    rows.write_text("\n".join([*lines[:40], '{"text": "cut off', *lines[40:]]) + "\n")
    end = lab.run("bad", rows=rows)
    return f"{end}; says line 41: {'41' in end}; names the file: {'bad.jsonl' in end}"


FAULTS: dict[str, Callable[[Lab], str | Iterator[str]]] = {
    "F1": killed_at_random,
    "F2": killed_in_save,
    "F3": damaged_files,
    "F4": disk_full,
    "F9": terminated,
    "F13": bad_line,
    "F18": not_a_number,
    "F23": other_data,
    "F24": two_jobs,
    "S1": pickled_payload,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("faults", nargs="*", help=f"of {', '.join(FAULTS)}; default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"trl {trl.__version__}, transformers {transformers.__version__}, "
          f"torch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)  # fmt: skip
    if arguments.work.exists():
        parser.error(f"{arguments.work} exists; name a new directory")
    lab = Lab(arguments.work)
    print(f"unbroken: {lab.run('unbroken')}", flush=True)
    lab.run("again", at_step(5, die))
    print(f"F20 killed in step 5, started again: {lab.run('again')}, "
          f"same weights: {lab.is_same('unbroken', 'again')}", flush=True)  # fmt: skip
    for name in arguments.faults or FAULTS:
        found = FAULTS[name](lab)
        for line in [found] if isinstance(found, str) else found:
            print(f"{name} {line}", flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
