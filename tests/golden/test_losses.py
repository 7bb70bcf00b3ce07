"""The demo's first ten steps give the losses and gradient norms that are written down here.

On the kind of CPU that wrote them they are the same bits, whatever the number of threads. Another
CPU sums in another order: with AVX2 or SSE4 in the place of AVX-512 the loss differed by up to
1.7e-6 and the gradient norm by up to 1.8e-5 of its value in these ten steps, so five times that is
allowed; a wrong mask, weight or order of the data changes the first digits.

After a change that is meant to change them: PYTHONPATH=tests python tests/golden/test_losses.py
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

from rank_pool import RankPool, num_gpus

FILE = Path(__file__).with_name("demo.json")
NUM_STEPS = 10
LOSS_TOLERANCE, GRAD_NORM_TOLERANCE = 1e-5, 1e-4


def cpu_kind() -> str:
    """What decides the order of sums: the CPU's maker and model, and torch's vector width."""
    import torch

    names = ("vendor_id", "cpu family", "model")
    facts = {}
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    parts = [facts.get(name, "?") for name in names]
    return " ".join([*parts, torch.backends.cpu.get_cpu_capability()])


def first_steps(folder: str) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the demo's first steps."""
    from sft_fast.config.schema import load_config
    from sft_fast.megatron.batches import open_batches
    from sft_fast.megatron.load_inputs import read_inputs
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.megatron.train_step import build_run, train_step
    from sft_fast.packing.from_config import make_training_plan

    config = load_config(None, [f"output_dir={folder}"])
    parallel = init_parallel(config.parallel, config.train, config.seed)
    inputs = read_inputs(config)
    architecture, weights = inputs.model.architecture, inputs.model.weights
    run = build_run(config, architecture, weights, config.train.steps, parallel)
    plan = make_training_plan(inputs.store, config.packing, config.train, config.seed, architecture)
    steps = range(NUM_STEPS)
    with open_batches(inputs.store, plan, steps, run.shape, parallel) as batches:
        results = [train_step(run, batches, plan.counts(step)) for step in steps]
    return [result.loss for result in results], [result.grad_norm for result in results]


@pytest.mark.skipif(num_gpus() > 0, reason="written down on CPUs")
def test_the_demo_trains_as_written_down(rank_pool: RankPool, tmp_path: Path) -> None:
    by_version = json.loads(FILE.read_text())["megatron-core"]
    # A release that is not written down is compared with the newest one that is.
    golden = by_version.get(version("megatron-core")) or by_version[max(by_version)]
    ((losses, grad_norms),) = rank_pool.run(1, first_steps, str(tmp_path))
    if (golden["cpu"], golden["torch"]) == (cpu_kind(), version("torch")):
        assert (losses, grad_norms) == (golden["losses"], golden["grad_norms"])
    else:
        assert losses == pytest.approx(golden["losses"], rel=LOSS_TOLERANCE)
        assert grad_norms == pytest.approx(golden["grad_norms"], rel=GRAD_NORM_TOLERANCE)


def write() -> None:
    """Writes down what the installed megatron-core gives on this CPU."""
    with tempfile.TemporaryDirectory() as folder:
        ((losses, grad_norms),) = RankPool().run(1, first_steps, folder)
    document = json.loads(FILE.read_text()) if FILE.is_file() else {"megatron-core": {}}
    document["megatron-core"][version("megatron-core")] = {
        "cpu": cpu_kind(),
        "torch": version("torch"),
        "losses": losses,
        "grad_norms": grad_norms,
    }
    FILE.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    write()
