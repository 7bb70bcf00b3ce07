"""Ten steps of a published model on public data, step by step against transformers and torch.

Needs SFT_FAST_TEST_MODEL, the directory of a Llama-shaped model such as examples/convert_gguf.py
writes, and SFT_FAST_TEST_DATA, a folder with alpaca_en_demo.json.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rank_pool import RankPool

NUM_STEPS, CLIP = 10, 1.0
OPTIM = {"lr": 5e-5, "warmup_steps": 2, "weight_decay": 0.1, "clip_grad": CLIP}


def run_steps(
    model: str, data: str, folder: str
) -> tuple[list[tuple[float, float, float]], list[Any]]:
    """(loss, gradient norm, learning rate) of each step, and the sample ids of each step."""
    from sft_fast.config.schema import Config
    from sft_fast.megatron.batches import open_batches
    from sft_fast.megatron.load_inputs import read_inputs
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.megatron.train_step import build_run, train_step
    from sft_fast.packing.from_config import make_training_plan

    config = Config.model_validate(
        {
            "output_dir": folder,
            "model": {"path": model, "dtype": "fp32"},
            "data": {"train": data, "over_length": "drop", "max_rejected": 1.0},
            "packing": {"capacity": 512},
            "train": {"steps": NUM_STEPS, "global_batch_size": 4},
            "parallel": {"pipeline": 2},
            "optim": OPTIM,
        }
    )
    parallel = init_parallel(config.parallel, config.train, config.seed)
    inputs = read_inputs(config)
    architecture = inputs.model.architecture
    plan = make_training_plan(inputs.store, config.packing, config.train, config.seed, architecture)
    run = build_run(config, architecture, inputs.model.weights, NUM_STEPS, parallel)
    results, ids = [], []
    with open_batches(inputs.store, plan, range(NUM_STEPS), run.shape, parallel) as batches:
        for step in range(NUM_STEPS):
            result = train_step(run, batches, plan.counts(step))
            results.append((result.loss, result.grad_norm, result.lr))
            ids.append(np.concatenate(plan.step_bins(*plan.locate(step))).tolist())
    return results, [str(inputs.store.path), ids]


def reference_steps(
    folder: str, store_path: str, ids: list[list[int]], lrs: list[float]
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of transformers with torch's AdamW, each sample alone."""
    from transformers import AutoModelForCausalLM

    from sft_fast.data.store import open_store

    store = open_store(store_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    matrices = [value for value in model.parameters() if value.dim() > 1]
    vectors = [value for value in model.parameters() if value.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": OPTIM["weight_decay"]},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    results = []
    for step_ids, lr in zip(ids, lrs, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        num_supervised = int(store.num_supervised[step_ids].sum())
        loss_sum = 0.0
        for sample in step_ids:
            tokens, supervised = store.sample(sample)
            inputs = torch.from_numpy(tokens.astype(np.int64))[None]
            labels = torch.where(torch.from_numpy(supervised), inputs[0], -100)
            logits = model(inputs).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
            (loss / num_supervised).backward()
            loss_sum += float(loss.detach())
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        results.append((loss_sum / num_supervised, float(grad_norm)))
    return results


@pytest.mark.slow
def test_ten_steps_are_those_of_transformers(rank_pool: RankPool, tmp_path: Path) -> None:
    model, data = os.environ.get("SFT_FAST_TEST_MODEL"), os.environ.get("SFT_FAST_TEST_DATA")
    if not model or not data:
        pytest.skip("SFT_FAST_TEST_MODEL and SFT_FAST_TEST_DATA are not set")
    rows = str(Path(data) / "alpaca_en_demo.json")
    results = rank_pool.run(4, run_steps, model, rows, str(tmp_path))
    ours, (store_path, ids) = results[0]
    assert all(steps == ours for steps, _ in results)
    truth = reference_steps(model, store_path, ids, [lr for _, _, lr in ours])
    for step in zip(ours, truth, strict=True):
        print(step)  # shown by pytest -s
    for (loss, norm, _), (true_loss, true_norm) in zip(ours, truth, strict=True):
        assert loss == pytest.approx(true_loss, abs=1e-4)
        assert norm == pytest.approx(true_norm, rel=1e-3)
    assert truth[-1][0] < truth[0][0]
