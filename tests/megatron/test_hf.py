"""Weights in and out: a model imported at any layout computes what transformers computes."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rank_pool import RankPool
from tiny import VOCAB_SIZE, make_config, make_store, random_samples, save_tiny_llama

MODELS = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "llama31": {
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}
LAYOUTS = [(1, 1, False), (2, 1, False), (2, 1, True), (1, 2, False), (2, 2, False)]


@pytest.fixture(scope="module", params=list(MODELS))
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_llama(folder, **MODELS[request.param])
    return folder


def make_batch() -> Any:
    from sft_fast.batch import fill_micro_batch

    return fill_micro_batch(make_store(random_samples(3, seed=5)), [0, 1, 2], num_rows=128)


def run_imported(folder: str, tp: int, pp: int, sequence: bool, export_to: str) -> Any:
    """On each rank: imports, runs one micro-batch, exports. Returns (logits, loss, gradients)."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from sft_fast.architecture import architecture_from_hf, read_hf_config
    from sft_fast.megatron.forward_step import forward_step, packed_samples
    from sft_fast.megatron.hf import (
        SafetensorsSource,
        export_weights,
        gather_shards,
        load_weights,
        merge_shards,
        named_rules,
    )
    from sft_fast.megatron.model import build_model
    from sft_fast.megatron.optim import (
        build_optimizer,
        connect_schedule,
        normalise_by,
        wrap_model,
    )
    from sft_fast.megatron.parallel import init_parallel

    parallel_section = {"tensor": tp, "pipeline": pp, "sequence": sequence}
    config = make_config(parallel=parallel_section)
    parallel = init_parallel(config)
    architecture = architecture_from_hf(read_hf_config(Path(folder)))
    (model,) = build_model(architecture, config, parallel)
    load_weights(model, SafetensorsSource(Path(folder), architecture), architecture, parallel)
    chunks = wrap_model([model], config)
    connect_schedule(chunks, build_optimizer(chunks, config, parallel))
    batch = make_batch()
    run = partial(
        get_forward_backward_func(),
        model=list(chunks),
        num_microbatches=1,
        seq_length=batch.tokens.shape[1],
        micro_batch_size=1,
    )

    def logits_step(data_iterator: Any, model: Any) -> Any:
        batch = next(data_iterator)
        samples = packed_samples(batch)
        logits = model(batch.tokens, batch.position_ids, None, packed_seq_params=samples)
        return logits, lambda output: (output.sum(), {"logits": output.detach()})

    reports = run(forward_step_func=logits_step, data_iterator=iter([batch]), forward_only=True)
    logits = None
    if parallel.is_last_stage:
        shards = gather_shards(reports[0]["logits"], parallel)
        logits = torch.cat(shards, dim=-1)[0, :, :VOCAB_SIZE].numpy()

    chunks[0].zero_grad_buffer()
    normalise_by(chunks, 1)
    reports = run(forward_step_func=forward_step, data_iterator=iter([batch]), forward_only=False)
    loss = float(reports[0]["lm loss"][0]) if parallel.is_last_stage else None
    gradients = {}
    parameters = dict(model.named_parameters())
    for name, rule in named_rules(model, architecture):
        merged = merge_shards(
            rule, gather_shards(parameters[name].main_grad, parallel), architecture
        )
        gradients.update(
            {name: tensor.numpy() for name, tensor in zip(rule.sources, merged, strict=True)}
        )
    export_weights([model], Path(export_to), architecture, parallel, torch.float32)
    return logits, loss, gradients


def transformers_truth(folder: Path) -> tuple[torch.Tensor, float, dict[str, torch.Tensor]]:
    """Each sample alone through transformers; gradients of the summed loss."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = make_batch()
    logits, loss = [], torch.zeros(())
    for start, stop in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        sample = model(batch.tokens[:, start:stop]).logits[0]
        loss = loss + torch.nn.functional.cross_entropy(
            sample, batch.labels[0, start:stop], reduction="sum", ignore_index=-100
        )
        logits.append(sample)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return torch.cat(logits).detach(), float(loss), gradients


@pytest.mark.parametrize(("tp", "pp", "sequence"), LAYOUTS)
def test_import_computes_what_transformers_computes(
    rank_pool: RankPool, llama: Path, tmp_path: Path, tp: int, pp: int, sequence: bool
) -> None:
    results = rank_pool.run(tp * pp, run_imported, str(llama), tp, pp, sequence, str(tmp_path))
    logits, loss, gradients = transformers_truth(llama)
    last_stage = [result for result in results if result[0] is not None]
    assert len(last_stage) == tp
    for got_logits, got_loss, _ in last_stage:
        torch.testing.assert_close(
            torch.from_numpy(got_logits)[: len(logits)], logits, atol=1e-4, rtol=0
        )
        assert got_loss == pytest.approx(loss, rel=1e-5)
    seen = set()
    for _, _, got_gradients in results:
        for name, got in got_gradients.items():
            seen.add(name)
            torch.testing.assert_close(
                torch.from_numpy(got), gradients[name], atol=1e-3, rtol=1e-4, msg=name
            )
    assert seen == gradients.keys()

    exported = {}
    for path in tmp_path.glob("*.safetensors"):
        exported.update(load_file(path))
    original = load_file(llama / "model.safetensors")
    assert exported.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(exported[name], tensor), name


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    from sft_fast.architecture import architecture_from_hf, read_hf_config
    from sft_fast.megatron.hf import SafetensorsSource

    save_tiny_llama(tmp_path, tie_word_embeddings=False)
    architecture = architecture_from_hf(read_hf_config(tmp_path))
    file = tmp_path / "model.safetensors"
    weights = load_file(file)

    lost = weights.pop("model.layers.3.mlp.up_proj.weight")
    weights["model.layers.3.mlp.up_proj.bias"] = torch.zeros(48)
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"missing model.layers.3.mlp.up_proj.weight; unexpected"):
        SafetensorsSource(tmp_path, architecture)

    del weights["model.layers.3.mlp.up_proj.bias"]
    save_file(weights | {"model.layers.3.mlp.up_proj.weight": lost.T.contiguous()}, file)
    with pytest.raises(ValueError, match=r"up_proj.weight has shape \(32, 48\)"):
        SafetensorsSource(tmp_path, architecture)


def test_an_index_cannot_point_outside_the_directory(tmp_path: Path) -> None:
    from sft_fast.megatron.hf import tensor_files

    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"lm_head.weight": "../../secret.safetensors"}}')
    with pytest.raises(ValueError, match="secret"):
        tensor_files(tmp_path)
