"""Weights in and out: a model imported at any layout computes what transformers computes."""

import functools
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rank_pool import RankPool
from tiny import VOCAB_SIZE, make_config, make_store, random_samples, save_tiny_llama

LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
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
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}},
    "yarn": {
        "model_type": "qwen3",
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
        },
    },
    "longrope": {
        "model_type": "phi3",
        "original_max_position_embeddings": 20,  # some of the samples are longer
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 500.0,
            "partial_rotary_factor": 0.5,
            "short_factor": [1.0, 1.5],
            "long_factor": [2.0, 5.0],
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    "qwen2moe": {
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 2,
    },
    "glm4": {
        "model_type": "glm4_moe",
        "head_dim": 16,
        "attention_bias": True,
        "use_qk_norm": True,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "routed_scaling_factor": 1.5,
    },
    "glm4lite": {
        "model_type": "glm4_moe_lite",
        **{key: value for key, value in LATENT.items() if key != "first_k_dense_replace"},
        "q_lora_rank": None,
        "n_routed_experts": 4,
        "mlp_layer_types": ["sparse", "dense", "sparse", "sparse"],
    },
    "deepseek3": {
        "model_type": "deepseek_v3",
        "q_lora_rank": 20,
        **LATENT,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
    },
    "deepseek2": {
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        **LATENT,
        "n_routed_experts": 8,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 3.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 8.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.7,
            "original_max_position_embeddings": 64,
        },
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "sliding_window": 9},
    "olmoe": {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2},
    "minimax": {
        "model_type": "minimax_m2",
        "head_dim": 16,
        "rotary_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 16,
        "sliding_window": 9,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "attn_implementation": "eager",
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 9,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 24,
    },
    "phi3": {
        "model_type": "phi3",
        "sliding_window": 9,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2},
}
MOE = ["qwen3moe", "qwen2moe", "glm4", "deepseek2", "deepseek3", "mixtral"]
SPLIT = [name for name in MODELS if name not in ("linear", "yarn")]  # the others differ in a layer
SEQUENCE = {"tensor": 2, "sequence": True, "distributed_optimizer": False}
Layout = tuple[int, dict[str, Any], list[str]]
LAYOUTS: dict[str, Layout] = {  # ranks, parallel section, models
    "one": (1, {}, list(MODELS)),
    "tp2": (2, {"tensor": 2}, ["tied", "untied", "qwen2"]),
    "tp2-sequence": (2, SEQUENCE, SPLIT),
    "tp2-sequence-etp2": (2, SEQUENCE | {"expert_tensor": 2}, MOE),
    "tp2-sequence-ep2": (2, SEQUENCE | {"expert": 2}, [*MOE, "minimax"]),
    "ep2": (2, {"expert": 2, "distributed_optimizer": False}, MOE),
    "pp2": (2, {"pipeline": 2}, SPLIT),
}
SLOW_LAYOUTS: dict[str, Layout] = {
    "tp2-pp2-sequence": (4, SEQUENCE | {"pipeline": 2}, list(MODELS)),
    "ep2-pp2": (4, {"expert": 2, "pipeline": 2, "distributed_optimizer": False}, MOE),
    "tp2-ep2-etp2": (
        4,
        SEQUENCE | {"expert": 2, "expert_tensor": 2},
        MOE,
    ),
}
Result = tuple[Any, float | None, dict[str, Any]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all the models."""
    folder = tmp_path_factory.mktemp("models")
    for name, options in MODELS.items():
        save_tiny_llama(folder / name, **options)
    carry_layer(folder / "deepseek3" / "model.safetensors")
    return folder


def carry_layer(file: Path) -> None:
    """Adds part of a layer for multi-token prediction, in another type than the rest."""
    tensors = load_file(file)
    tensors["model.layers.4.eh_proj.weight"] = torch.randn(32, 64).bfloat16()
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture(scope="module")
def truths(models: Path) -> Any:
    @functools.cache
    def truth(name: str) -> Any:
        return transformers_truth(models / name)

    return truth


@pytest.mark.parametrize("name", MODELS)
def test_the_table_has_the_parameters_that_transformers_counts(models: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    from sft_fast.models.architecture import architecture_from_hf, read_hf_config
    from sft_fast.models.flops import num_parameters

    expected = AutoModelForCausalLM.from_pretrained(models / name).num_parameters()
    assert num_parameters(architecture_from_hf(read_hf_config(models / name))) == expected


def make_batch() -> Any:
    from sft_fast.packing.micro_batch import fill_micro_batch

    return fill_micro_batch(make_store(random_samples(3, seed=5)), [0, 1, 2], seq_length=128)


def run_all(folder: str, parallel_section: dict[str, Any], names: list[str], out: str) -> Any:
    """On each rank: imports, runs one micro-batch, exports; for each of the models."""
    from sft_fast.megatron.parallel import init_parallel

    config = make_config(
        model={"path": folder, "shape": None}, tokenizer={"path": None}, parallel=parallel_section
    )
    parallel = init_parallel(config.parallel, config.train, config.seed)
    return {
        name: run_imported(Path(folder, name), config, parallel, Path(out, name)) for name in names
    }


def run_imported(folder: Path, config: Any, parallel: Any, export_to: Path) -> Result:
    """Returns (logits, loss, gradients)."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from sft_fast.megatron.export.weights import export_weights
    from sft_fast.megatron.forward_step import forward_step, packed_samples
    from sft_fast.megatron.hf import (
        SafetensorsSource,
        gather_shards,
        load_hf_weights,
        matrix_of,
        merge_shards,
        named_rules,
    )
    from sft_fast.megatron.model import build_model
    from sft_fast.megatron.optim import build_optimizer, connect_schedule, normalise_by, wrap_model
    from sft_fast.models.architecture import architecture_from_hf, read_hf_config

    architecture = architecture_from_hf(read_hf_config(folder))
    (model,) = build_model(
        architecture, config.model, config.parallel, config.lora, config.loss, parallel
    )
    load_hf_weights(model, SafetensorsSource(folder, architecture), architecture, parallel)
    chunks = wrap_model([model], config.model, config.parallel)
    connect_schedule(
        chunks, build_optimizer(chunks, config.model, config.parallel, config.optim, parallel)
    )
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
        if rule.is_buffer:
            continue
        own = matrix_of(rule, parameters[name].main_grad)
        shards = gather_shards(own, parallel, rule.is_expert)
        merged = merge_shards(rule, shards, architecture)
        for source, tensor in zip(rule.sources, merged, strict=True):
            gradients[source] = tensor.numpy() / parallel.dp_size  # they had the same batch
    export_to.mkdir(exist_ok=True)
    torch.distributed.barrier()
    export_weights([model], export_to, architecture, parallel, torch.float32, origin=folder)
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
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients.update(as_saved(name, parameter.grad, model.config.model_type))
    return torch.cat(logits).detach(), float(loss.detach()), gradients


def as_saved(name: str, tensor: torch.Tensor, model_type: str) -> dict[str, torch.Tensor]:
    """transformers has the experts of a layer in one tensor, but not in the files."""
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    if model_type in ("mixtral", "minimax_m2"):
        name = name.replace(".mlp.", ".block_sparse_moe.")
        names = {"gate": "w1", "up": "w3", "down": "w2"}
    head, is_expert, matrix = name.partition(".experts.")
    if not is_expert:
        return {name: tensor}
    parts = {"down": tensor}
    if matrix == "gate_up_proj":
        parts["gate"], parts["up"] = tensor.chunk(2, dim=1)
        del parts["down"]
    return {
        f"{head}.experts.{number}.{names[part]}.weight": expert
        for part, experts in parts.items()
        for number, expert in enumerate(experts)
    }


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_LAYOUTS)]
)
def test_import_computes_what_transformers_computes(
    rank_pool: RankPool, models: Path, truths: Any, tmp_path: Path, layout: str
) -> None:
    world_size, parallel_section, names = (LAYOUTS | SLOW_LAYOUTS)[layout]
    arguments = (str(models), parallel_section, names, str(tmp_path))
    results = rank_pool.run(world_size, run_all, *arguments)
    for name in names:
        check_results(name, [result[name] for result in results], truths(name))
        check_export(name, models / name, tmp_path / name)


def check_results(name: str, results: list[Result], truth: Any) -> None:
    logits, loss, gradients = truth
    last_stage = [result for result in results if result[0] is not None]
    assert last_stage
    for got_logits, got_loss, _ in last_stage:
        got = torch.from_numpy(got_logits)[: len(logits)]
        torch.testing.assert_close(got, logits, atol=1e-4, rtol=0, msg=name)
        assert got_loss == pytest.approx(loss, rel=1e-5), name
    seen = set()
    for _, _, got_gradients in results:
        for key, value in got_gradients.items():
            seen.add(key)
            got, expected = torch.from_numpy(value), gradients[key]
            torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4, msg=f"{name} {key}")
    assert seen == gradients.keys(), name


def check_export(name: str, source: Path, folder: Path) -> None:
    """Bit for bit what was imported."""
    exported: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        assert tensors.keys().isdisjoint(exported), name
        exported.update(tensors)
    original = load_file(source / "model.safetensors")
    assert exported.keys() == original.keys(), name
    for key, tensor in original.items():
        assert exported[key].dtype == tensor.dtype, f"{name} {key}"
        assert torch.equal(exported[key], tensor), f"{name} {key}"


def peak_of_import(folder: str, parallel_section: dict[str, Any]) -> tuple[int, int, int]:
    """(most bytes alive that were read, bytes of this rank's parameters, of its largest)."""
    import weakref

    from sft_fast.megatron.hf import SafetensorsSource, load_hf_weights
    from sft_fast.megatron.model import build_model
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.models.architecture import architecture_from_hf, read_hf_config

    config = make_config(parallel=parallel_section)
    parallel = init_parallel(config.parallel, config.train, config.seed)
    architecture = architecture_from_hf(read_hf_config(Path(folder)))
    (model,) = build_model(
        architecture, config.model, config.parallel, config.lora, config.loss, parallel
    )
    source = SafetensorsSource(Path(folder), architecture)
    alive, peak = 0, 0

    class Counting:
        def read(self, *arguments: Any) -> torch.Tensor:
            nonlocal alive, peak
            tensor = source.read(*arguments)
            num_bytes = tensor.nbytes

            def free() -> None:
                nonlocal alive
                alive -= num_bytes

            weakref.finalize(tensor, free)
            alive += num_bytes
            peak = max(peak, alive)
            return tensor

    load_hf_weights(model, Counting(), architecture, parallel)
    sizes = [parameter.nbytes for parameter in model.parameters()]
    return peak, sum(sizes), max(sizes)


@pytest.mark.parametrize("name", ["untied", "phi3", "qwen3moe"])
def test_import_has_one_tensor_in_memory_beside_the_parameters(
    rank_pool: RankPool, models: Path, name: str
) -> None:
    for peak, share, largest in rank_pool.run(2, peak_of_import, str(models / name), SEQUENCE):
        assert 0 < peak <= largest
        assert share + peak <= 1.2 * share + largest


def error_of_import(folder: str) -> str:
    try:
        peak_of_import(folder, {})
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.fault("F36")
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_damaged_base_is_not_blamed_on_samples(
    rank_pool: RankPool, models: Path, tmp_path: Path, value: float
) -> None:
    folder, name = tmp_path / "model", "model.layers.1.mlp.down_proj.weight"
    shutil.copytree(models / "untied", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][1, 2] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (said,) = rank_pool.run(1, error_of_import, str(folder))
    assert said.startswith(f"model.path: {name}: NaN or infinity among the weights, as torch.")


def test_new_tokens_get_the_mean_of_the_old(models: Path) -> None:
    from sft_fast.megatron import hf
    from sft_fast.models.architecture import architecture_from_hf, read_hf_config

    folder = models / "untied"
    source = hf.SafetensorsSource(folder, architecture_from_hf(read_hf_config(folder)))
    grown = hf.GrownSource(source, VOCAB_SIZE, range(VOCAB_SIZE, VOCAB_SIZE + 5))
    original = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = original[name]
        expected = torch.cat([old, old.mean(0, keepdim=True).expand(5, -1)])
        for rows in (slice(None), slice(0, 70), slice(100, 136), slice(133, 136), slice(7, 7)):
            torch.testing.assert_close(grown.read(name, rows, slice(None)), expected[rows])
        assert torch.equal(grown.read(name, slice(0, VOCAB_SIZE), slice(None)), old)
    other = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(grown.read(other, slice(3, 9), slice(None)), original[other][3:9])


def test_new_tokens_take_rows_that_were_never_used(models: Path) -> None:
    """Of a vocabulary that was rounded up: those beyond the new ones stay as they are."""
    from sft_fast.megatron import hf
    from sft_fast.models.architecture import architecture_from_hf, read_hf_config

    folder = models / "untied"
    source = hf.SafetensorsSource(folder, architecture_from_hf(read_hf_config(folder)))
    grown = hf.GrownSource(source, VOCAB_SIZE, range(120, 124))
    old = load_file(folder / "model.safetensors")["lm_head.weight"]
    mean = old[:120].mean(0, keepdim=True).expand(4, -1)
    expected = torch.cat([old[:120], mean, old[124:]])
    for rows in (slice(None), slice(100, 122), slice(121, 131), slice(121, 122), slice(125, 131)):
        torch.testing.assert_close(grown.read("lm_head.weight", rows, slice(None)), expected[rows])


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    from sft_fast.megatron.hf import SafetensorsSource
    from sft_fast.models.architecture import architecture_from_hf, read_hf_config

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
    from sft_fast.models.weight_files import tensor_records

    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"lm_head.weight": "../../secret.safetensors"}}')
    with pytest.raises(ValueError, match="secret"):
        tensor_records(tmp_path)


def test_weights_that_cannot_be_written_are_an_os_error(tmp_path: Path) -> None:
    from sft_fast.megatron.export.weights import save_tensors

    with pytest.raises(OSError, match=r"No such file.*nowhere/w"):
        save_tensors({"a": torch.zeros(1)}, tmp_path / "nowhere/w")
