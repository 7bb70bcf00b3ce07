"""A pass over the same rows with this trainer and with TRL's SFTTrainer, on a CPU in fp32.

    SFT_FAST_TEST_MODEL=smollm2_hf SFT_FAST_TEST_DATA=data pytest -s benchmarks/bench_trainers.py

Needs trl, the directory of a model (examples/README.md) and a folder with alpaca_en_demo.json. Each
trainer runs in a process of its own, in turns, and takes two passes; the second one is timed. The
seconds are those of the processor, so that a busy neighbour counts little. `supervised_per_s` has
the same tokens for everybody: those that this trainer supervises in the rows.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

NUM_ROWS, CAPACITY, NUM_ROUNDS = 32, 512, 2
# TRL's names; None = its default.
TRL_OPTIONS: dict[str, dict[str, Any]] = {
    "trl default": {"per_device_train_batch_size": 8},
    "trl default, nothing recomputed": {
        "per_device_train_batch_size": 8,
        "gradient_checkpointing": False,
    },
    "trl packed, chunked_nll": {
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "packing": True,
        "loss_type": "chunked_nll",
    },
}


def read_rows(path: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """The first rows that fit, as prompt and completion of chat messages."""
    rows = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        question = "\n".join(text for text in (row["instruction"], row["input"]) if text)
        chat = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": row["output"]},
        ]
        if len(tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"]) <= CAPACITY:
            rows.append({"prompt": chat[:1], "completion": chat[1:]})
    return rows[:NUM_ROWS]


def run_trl(model: str, rows: list[dict[str, Any]], options: dict[str, Any]) -> dict[str, float]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    marks: list[tuple[float, float]] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            marks.append((time.process_time(), time.perf_counter()))

        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append((time.process_time(), time.perf_counter()))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            num_train_epochs=2,
            learning_rate=1e-5,
            max_length=CAPACITY,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            **options,
        )
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=[Clock()],
        )
        trainer.train()
    return {
        "cpu_s": marks[3][0] - marks[2][0],
        "wall_s": marks[3][1] - marks[2][1],
        "first_loss": losses[0],
    }


def run_ours(model: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    from sft_fast.config.schema import Config
    from sft_fast.megatron.batches import open_batches
    from sft_fast.megatron.load_inputs import read_inputs
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.megatron.train_step import build_run, train_step
    from sft_fast.packing.from_config import make_training_plan

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        chats = [{"messages": row["prompt"] + row["completion"]} for row in rows]
        path.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
        config = Config.model_validate(
            {
                "output_dir": folder,
                "model": {"path": model, "dtype": "fp32"},
                "data": {"train": str(path)},
                "packing": {"capacity": CAPACITY},
                "train": {"epochs": 2, "global_batch_size": 4, "micro_batch_size": 2},
                "optim": {"lr": 1e-5},
            }
        )
        parallel = init_parallel(config.parallel, config.train, config.seed)
        inputs = read_inputs(config)
        architecture = inputs.model.architecture
        plan = make_training_plan(
            inputs.store, config.packing, config.train, config.seed, architecture
        )
        num_steps = plan.num_steps_per_epoch
        run = build_run(config, architecture, inputs.model.weights, 2 * num_steps, parallel)
        losses = []
        steps = range(2 * num_steps)
        with open_batches(inputs.store, plan, steps, run.shape, parallel) as batches:
            for step in steps:
                if step == num_steps:
                    began = time.process_time(), time.perf_counter()
                counts = plan.counts(step)
                losses.append(train_step(run, batches, counts).loss)
        return {
            "cpu_s": time.process_time() - began[0],
            "wall_s": time.perf_counter() - began[1],
            "first_loss": losses[0],
            "num_supervised": int(inputs.store.num_supervised.sum()),
        }


def measure(name: str, model: str, rows: Path) -> dict[str, float]:
    command = [sys.executable, __file__, name, model, str(rows)]
    # One thread: threads that wait for each other would count as work.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_a_pass_over_the_same_rows(tmp_path: Path) -> None:
    model, data = os.environ.get("SFT_FAST_TEST_MODEL"), os.environ.get("SFT_FAST_TEST_DATA")
    if not model or not data or importlib.util.find_spec("trl") is None:
        pytest.skip("SFT_FAST_TEST_MODEL, SFT_FAST_TEST_DATA or trl is missing")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(read_rows(Path(data) / "alpaca_en_demo.json", tokenizer)))
    names = ["ours", *TRL_OPTIONS]
    best: dict[str, dict[str, float]] = {}
    for number in range(NUM_ROUNDS):
        for name in names:
            found = measure(name, model, rows)
            print(f"round {number + 1}, load {os.getloadavg()[0]:.1f}, {name}: {found}", flush=True)
            if name not in best or found["cpu_s"] < best[name]["cpu_s"]:
                best[name] = found
    num_supervised = best["ours"]["num_supervised"]
    for name in names:
        speed = num_supervised / best[name]["cpu_s"]
        ratio = best[name]["cpu_s"] / best["ours"]["cpu_s"]
        print(f"{name}: supervised_per_s {speed:.1f}, times_ours {ratio:.2f}")
        # The first batches differ, the model and the kind of loss do not.
        assert best[name]["first_loss"] == pytest.approx(best["ours"]["first_loss"], rel=0.3)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    kind, model_folder, rows_file = sys.argv[1:]
    given = json.loads(Path(rows_file).read_text())
    if kind == "ours":
        print(json.dumps(run_ours(model_folder, given)))
    else:
        print(json.dumps(run_trl(model_folder, given, TRL_OPTIONS[kind])))
