"""Weights that a run may start from: whole, float, trained, and as transformers reads them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sft_fast.errors import DamageError
from sft_fast.models.architecture import architecture_from_hf, read_hf_config
from sft_fast.models.weight_files import INDEX_FILE, WEIGHTS_FILE, tensor_records
from sft_fast.models.weights import check_weights, values
from tiny import save_tiny_llama

QUERIES = "model.layers.1.self_attn.q_proj.weight"


def check(folder: Path) -> None:
    config = read_hf_config(folder)
    check_weights(folder, config, architecture_from_hf(config))


def change(folder: Path, weights: dict[str, torch.Tensor], **config: Any) -> None:
    save_file(weights, folder / WEIGHTS_FILE)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    save_tiny_llama(tmp_path, tie_word_embeddings=True)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_numbers_are_those_of_torch(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(5, 7).to(dtype)
    save_file({"other": torch.ones(3), "w": weight}, tmp_path / WEIGHTS_FILE)
    record = tensor_records(tmp_path)["w"]
    assert np.array_equal(values(record), weight.double().flatten().numpy())
    assert np.array_equal(values(record, 2), weight[:2].double().flatten().numpy())


@pytest.mark.parametrize(
    ("dtype", "told"),
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.float4_e2m1fn_x2, "F4"),  # whose slices safetensors cannot read
        (torch.uint8, "U8"),  # bitsandbytes, MXFP4
        (torch.int8, "I8"),
        (torch.int32, "I32"),  # AWQ, GPTQ
    ],
)
def test_quantised_types_are_named_whatever_their_shape(
    tied: Path, dtype: torch.dtype, told: str
) -> None:
    weights = load_file(tied / WEIGHTS_FILE)
    weights[QUERIES] = torch.zeros(32, 32, dtype=torch.uint8).view(dtype)
    change(tied, weights)
    with pytest.raises(ValueError, match=rf"quantised \(1 tensors of type {told} such as .*q_proj"):
        check(tied)


@pytest.mark.parametrize(
    "name", ["weight_scale_inv", "weight_scale", "weight.absmax", "qzeros", "weight_packed", "SCB"]
)
def test_scales_beside_float_weights_are_named(tied: Path, name: str) -> None:
    name = f"model.layers.1.mlp.up_proj.{name}"
    change(tied, load_file(tied / WEIGHTS_FILE) | {name: torch.ones(1)})
    with pytest.raises(ValueError, match=rf"quantised \(1 tensors such as {name}"):
        check(tied)


@pytest.mark.parametrize(
    ("entry", "told"),
    [({"quant_method": "fp8"}, "fp8"), ({"load_in_4bit": True}, "quantised"), (None, None)],
)
def test_a_quantised_config_is_named(tied: Path, entry: Any, told: str | None) -> None:
    change(tied, load_file(tied / WEIGHTS_FILE), quantization_config=entry)
    if told is None:
        check(tied)
        return
    with pytest.raises(ValueError, match=rf"quantization_config of config.json: {told}\)"):
        check(tied)


def test_a_tied_model_with_a_head_of_its_own_is_refused(tied: Path) -> None:
    weights = load_file(tied / WEIGHTS_FILE)
    head = weights["model.embed_tokens.weight"].clone()
    change(tied, weights | {"lm_head.weight": head})
    check(tied)  # a copy is none of its own
    head[-1, -1] += 1.0
    change(tied, weights | {"lm_head.weight": head})
    with pytest.raises(ValueError, match="tie_word_embeddings, but lm_head.weight is there"):
        check(tied)
    change(tied, weights | {"lm_head.weight": head}, tie_word_embeddings=False)
    check(tied)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [("llama", {}), ("qwen2", {"initializer_range": 0.05}), ("gemma2", {"head_dim": 16})],
)
def test_weights_as_transformers_initialises_them_are_refused(
    tmp_path: Path, model_type: str, options: dict[str, Any]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        model_type,
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        dtype="bfloat16",
        **options,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="look freshly initialised"):
        check(tmp_path)
    weights = load_file(tmp_path / WEIGHTS_FILE)
    # Norms that are folded into the matrices are 1 in trained models too.
    change(tmp_path, weights | {"model.embed_tokens.weight": torch.randn(300, 32) * 0.03})
    check(tmp_path)
    name = "model.layers.1.input_layernorm.weight"
    change(tmp_path, weights | {name: weights[name] + 0.01})
    check(tmp_path)


def test_the_text_model_of_a_multimodal_checkpoint_is_refused_if_it_is_random(
    tmp_path: Path,
) -> None:
    """What from_pretrained of the text class makes of it."""
    from transformers import AutoConfig, AutoModelForImageTextToText, Gemma3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision = {**sizes, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = {**sizes, "vocab_size": 262145, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        "gemma3", text_config=text | {"head_dim": 8}, vision_config=vision
    )
    whole = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(0.3, 0.1)  # as if it were trained
    whole.save_pretrained(tmp_path / "whole")
    Gemma3ForCausalLM.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="look freshly initialised"):
        check(tmp_path / "text")


def test_the_files_are_those_that_transformers_reads(tied: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights = load_file(tied / WEIGHTS_FILE)
    other = {name: tensor + 1 for name, tensor in weights.items()}
    # Mistral's own form beside transformers', with other names.
    save_file({"layers.0.wq": torch.ones(3)}, tied / "consolidated.safetensors")
    check(tied)
    save_file(other, tied / "model-00001-of-00001.safetensors")
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors"),
    }
    (tied / INDEX_FILE).write_text(json.dumps(index))
    for expected in (weights, other):
        theirs = AutoModelForCausalLM.from_pretrained(tied).model.norm.weight
        assert torch.equal(theirs, expected["model.norm.weight"])
        ours = values(tensor_records(tied)["model.norm.weight"])
        assert np.array_equal(ours, theirs.detach().double().numpy())
        (tied / WEIGHTS_FILE).unlink(missing_ok=True)
    (tied / INDEX_FILE).unlink()
    with pytest.raises(ValueError, match=r"neither model.safetensors nor .*but consolidated"):
        check(tied)


def test_an_index_that_names_what_is_not_there(tied: Path) -> None:
    (tied / WEIGHTS_FILE).rename(tied / "model-1.safetensors")
    for weight_map, error, told in (
        ({"a": "model-2.safetensors"}, ValueError, "lacks model-2.safetensors"),
        ({"a": "../x.safetensors"}, ValueError, "not a file of"),
        ({"a": "model-1.safetensors"}, DamageError, "found none of a"),
    ):
        (tied / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(error, match=told):
            check(tied)
