"""Transformer Engine's linear layers: where they stand, and what is refused; stand-ins for them."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rank_pool import RankPool
from tiny import make_config, make_store, random_samples, save_tiny_llama

GPU: Any = SimpleNamespace(device=torch.device("cuda"))


def step_with_stand_ins(folder: str, transformer_impl: str) -> tuple[float, float, set[str]]:
    """(loss, gradient norm, kinds of the linear layers) of a step."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from sft_fast.megatron import transformer_engine
    from sft_fast.megatron.batches import open_batches
    from sft_fast.megatron.hf import SafetensorsSource
    from sft_fast.megatron.model import unwrap
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.megatron.train_step import build_run, train_step
    from sft_fast.models.architecture import architecture_from_hf, read_hf_config
    from sft_fast.packing.from_config import make_plan

    class EngineColumn(ColumnParallelLinear):
        pass

    class EngineRow(RowParallelLinear):
        pass

    original = transformer_engine.linear_classes, transformer_engine.require
    transformer_engine.linear_classes = lambda: (EngineColumn, EngineRow)
    transformer_engine.require = lambda *arguments: None
    try:
        config = make_config(
            model={"path": folder, "shape": None, "transformer_impl": transformer_impl},
            tokenizer={"path": None},
            parallel={"tensor": 2, "sequence": True},
        )
        parallel = init_parallel(config.parallel, config.train, config.seed)
        architecture = architecture_from_hf(read_hf_config(Path(folder)))
        weights = SafetensorsSource(Path(folder), architecture)
        run = build_run(config, architecture, weights, 1, parallel)
        store = make_store(random_samples(4, seed=3))
        plan = make_plan(store, config.packing, config.train, config.seed)
        with open_batches(store, plan, range(1), run.shape, parallel) as batches:
            result = train_step(run, batches, plan.counts(0))
    finally:
        transformer_engine.linear_classes, transformer_engine.require = original
    kinds = {
        type(module).__name__
        for module in unwrap(run.model[0]).decoder.modules()
        if isinstance(module, ColumnParallelLinear | RowParallelLinear)
    }
    return result.loss, result.grad_norm, kinds


def test_every_linear_layer_is_the_engine_s_and_the_step_is_the_same(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    save_tiny_llama(tmp_path, "qwen2")
    for local, engine in zip(
        rank_pool.run(2, step_with_stand_ins, str(tmp_path), "auto"),
        rank_pool.run(2, step_with_stand_ins, str(tmp_path), "te"),
        strict=True,
    ):
        assert local[2] == {"ColumnParallelLinear", "RowParallelLinear"}
        assert engine[2] == {"EngineColumn", "EngineRow"}
        assert engine[:2] == local[:2]


def test_without_the_engine_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from sft_fast.megatron import memory, transformer_engine

    monkeypatch.setattr(memory, "is_installed", lambda module: False)
    for key, value in (("transformer_impl", "te"), ("fp8", "hybrid")):
        config = make_config(model={key: value, "dtype": "bf16"})
        with pytest.raises(ValueError, match=f"model.{key} is {value}.*not installed"):
            transformer_engine.transformer_engine_options(config.model, GPU)
    monkeypatch.setattr(memory, "is_installed", lambda module: True)
    shape = {
        "hidden_size": 256,
        "num_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "ffn_hidden_size": 512,
        "max_position_embeddings": 128,
    }
    eight_bits = {"fp8": "hybrid", "fp8_recipe": "mxfp8", "dtype": "bf16", "shape": shape}
    config = make_config(model=eight_bits)
    options = transformer_engine.transformer_engine_options(config.model, GPU)
    assert options == {
        "transformer_impl": "transformer_engine",
        "fp8": "hybrid",
        "fp8_recipe": "mxfp8",
    }
    assert set(options) <= {field.name for field in dataclasses.fields(TransformerConfig)}
    assert transformer_engine.transformer_engine_options(make_config().model, GPU) == {
        "transformer_impl": "local"
    }


class Stateful(torch.nn.Linear):
    """Saves more than its parameters, as Transformer Engine's do."""

    def get_extra_state(self) -> bytes:
        return b"pickle"

    def set_extra_state(self, state: bytes) -> None:
        raise AssertionError("loaded")


def test_checkpoints_get_parameters_only() -> None:
    from sft_fast.megatron.transformer_engine import without_extra_state

    assert "_extra_state" in Stateful(2, 2).state_dict()
    plain = without_extra_state(Stateful)(2, 2)
    assert set(plain.state_dict()) == {"weight", "bias"}
    plain.load_state_dict(plain.state_dict())


def test_fp8_is_switched_off_and_on_again() -> None:
    from sft_fast.megatron.transformer_engine import without_fp8

    model: Any = SimpleNamespace(config=SimpleNamespace(fp8="hybrid"))
    with pytest.raises(RuntimeError), without_fp8([model, model]):
        assert model.config.fp8 is None
        raise RuntimeError
    assert model.config.fp8 == "hybrid"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"fp8": "hybrid", "transformer_impl": "local"}}, "no 8-bit products"),
        ({"model": {"fp8": "hybrid", "dtype": "fp16"}}, "hybrid with fp16"),
        ({"model": {"transformer_impl": "te"}, "lora": {"rank": 4}}, "adapters beside"),
        ({"model": {"fp8": "e4m3"}, "parallel": {"pipeline": 2}}, "packing.capacity=64"),
    ],
)
def test_what_does_not_fit_together_is_refused(sections: Any, message: str) -> None:
    model = {"dtype": "bf16", **sections["model"]}
    with pytest.raises(ValueError, match=message):
        make_config(**sections | {"model": model, "packing": {"capacity": 56}})


def test_rows_are_padded_to_what_fp8_needs() -> None:
    from sft_fast.megatron.batches import batch_shape, planned_sequences

    parallel: Any = SimpleNamespace(tp_size=2, cp_size=1, pp_size=1, dp_rank=0, dp_size=1)
    store = make_store(random_samples(9, seed=1))
    config = make_config(model={"fp8": "hybrid", "dtype": "bf16"})
    from sft_fast.packing.from_config import make_plan

    plan = make_plan(store, config.packing, config.train, config.seed)
    shape = batch_shape(config.train, config.packing, config.model, parallel)
    planned = planned_sequences(store, plan, range(1), shape, parallel)
    lengths = [sequence.seq_length for sequence in planned]
    assert lengths and all(length % 32 == 0 for length in lengths)
