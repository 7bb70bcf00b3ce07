"""The layer with Triton's kernels is the layer with PyTorch's, in every form that it has."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from kernel_pool import KernelPool
from rank_pool import RankPool
from tiny import TWO_KINDS_OF_LAYERS, make_config, make_store, random_samples, save_tiny_llama

pytest.importorskip("triton")

Sections = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    ranks = KernelPool()
    yield ranks
    ranks.close()


MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3": TWO_KINDS_OF_LAYERS,
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    "phi3": {"model_type": "phi3", "partial_rotary_factor": 0.5},
}
RECOMPUTED = {"recompute": "selective", "recompute_modules": ["norm", "activation"]}
# model, world size, sections of the configuration
CASES: dict[str, tuple[str, int, Sections]] = {
    "llama": ("llama", 1, {}),
    "llama-recomputed": ("llama", 1, {"model": RECOMPUTED}),
    "llama-tp2-sequence": ("llama", 2, {"parallel": {"tensor": 2, "sequence": True}}),
    "gemma3": ("gemma3", 1, {"model": {"recompute": "full"}}),
    "qwen3_moe": ("qwen3_moe", 1, {"model": RECOMPUTED}),
    "phi3": ("phi3", 1, {}),
    "llama-lora": (
        "llama",
        1,
        {"lora": {"rank": 2, "targets": ["v_proj", "down_proj"]}, "model": RECOMPUTED},
    ),
}


def run_step(folder: str, sections: Sections) -> tuple[str, float, dict[str, Any]]:
    """(kernels, loss, gradients by name) of one micro-batch of a few tokens."""
    import torch

    from sft_fast.kernels import block_backends
    from sft_fast.megatron.batches import open_batches
    from sft_fast.megatron.hf import SafetensorsSource
    from sft_fast.megatron.model import unwrap
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.megatron.train_step import build_run, train_step
    from sft_fast.models.architecture import architecture_from_hf, read_hf_config
    from sft_fast.packing.from_config import make_plan

    source = {"model": {"path": folder, "shape": None}, "tokenizer": {"path": None}}
    values = {
        name: {**source.get(name, {}), **sections.get(name, {})} for name in sections | source
    }
    config = make_config(**values, train={"global_batch_size": 1})
    parallel = init_parallel(config.parallel, config.train, config.seed)
    architecture = architecture_from_hf(read_hf_config(Path(folder)))
    weights = SafetensorsSource(Path(folder), architecture)
    # The interpreter is slow, and the self-test has tests of its own.
    with mock.patch.object(block_backends, "NUM_TEST_TOKENS", 1):
        run = build_run(config, architecture, weights, 2, parallel)
    model = unwrap(run.model[0])
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora" in name and "_b_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    store = make_store(random_samples(2, seed=3, longest=7))
    plan = make_plan(store, config.packing, config.train, config.seed)
    with open_batches(store, plan, range(1), run.shape, parallel) as batches:
        result = train_step(run, batches, plan.counts(0))
    gradients = {
        name: parameter.main_grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return str(model.kernels), result.loss, gradients


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    paths = {}
    for name, options in MODELS.items():
        paths[name] = str(tmp_path_factory.mktemp(name))
        save_tiny_llama(Path(paths[name]), num_hidden_layers=2, **options)
    return paths


@pytest.mark.parametrize("name", CASES)
def test_gradients_do_not_depend_on_the_kernels(
    pool: RankPool, folders: dict[str, str], name: str
) -> None:

    model, world_size, sections = CASES[name]
    results = []
    for kernels in ("torch", "triton"):
        section = {**sections.get("model", {}), "kernels": kernels}
        results.append(
            pool.run(world_size, run_step, folders[model], sections | {"model": section})
        )
    for (_, loss, gradients), (kernels, found_loss, found) in zip(*results, strict=True):
        assert kernels == "triton"
        assert found_loss == pytest.approx(loss, rel=1e-6)
        assert gradients.keys() == found.keys() and gradients
        for key, gradient in gradients.items():
            # A tensor-parallel rank may have none of the tokens.
            assert gradient.any() or "embedding" in key, f"{key} has no gradient to compare"
            error = (found[key] - gradient).norm()
            assert error <= 1e-5 * gradient.norm(), (key, float(error))
