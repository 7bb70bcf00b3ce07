"""The files of an export beside the weights: as the source has them, read by transformers 4 and 5.

What 4.57 reads is written down here, from its configuration classes.
"""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_fast.data.demo import demo_tokenizer
from sft_fast.data.tokenizer import load_tokenizer, tokenizer_digest
from sft_fast.megatron.export.configs import with_old_keys
from sft_fast.megatron.export.tokenizer import export_tokenizer

TEMPLATE = "{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}"
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "model_max_length": 100,
    "chat_template": TEMPLATE,
}
FLAT = {"rope_type": "default", "rope_theta": 7.0}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tokenizer as transformers 4 saves it, with files that 5 does not write."""
    folder = tmp_path / "source"
    demo_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def test_files_of_an_unchanged_tokenizer_are_copied(source: Path, out: Path) -> None:
    export_tokenizer(load_tokenizer(str(source)), out)
    expected = contents(source)
    del expected["model.safetensors"]
    assert contents(out) == expected


def test_another_template_is_the_only_one(source: Path, out: Path) -> None:
    template = TEMPLATE + "\n"
    tokenizer = load_tokenizer(str(source))
    tokenizer.chat_template = template
    export_tokenizer(tokenizer, out)
    assert load_tokenizer(str(out)).chat_template == template
    config = read_json(out / "tokenizer_config.json")
    assert config == {key: value for key, value in CONFIG.items() if key != "chat_template"}
    assert contents(out)["tokenizer.json"] == contents(source)["tokenizer.json"]


def test_a_tokenizer_without_a_template_gets_the_one_it_was_trained_with(
    source: Path, out: Path
) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "chat_template"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(source))
    export_tokenizer(tokenizer, out)
    assert (out / "chat_template.jinja").read_text() == tokenizer.chat_template


def test_a_tokenizer_with_more_tokens_keeps_its_class_and_files(source: Path, out: Path) -> None:
    (source / "added_tokens.json").write_text("{}")  # it would be wrong then
    tokenizer = load_tokenizer(str(source), add_tokens=["<call>"])
    export_tokenizer(tokenizer, out)
    again = load_tokenizer(str(out))
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer)
    assert tokenizer_digest(again) != tokenizer_digest(load_tokenizer(str(source)))
    assert again.chat_template == TEMPLATE
    config = read_json(out / "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    number = tokenizer.convert_tokens_to_ids("<call>")
    assert config["added_tokens_decoder"][str(number)]["content"] == "<call>"
    assert (out / "tokenizer.model").read_bytes() == b"pieces"
    assert not (out / "added_tokens.json").exists()


def test_what_transformers_5_saved_is_spelled_so_that_4_reads_it(source: Path, out: Path) -> None:
    config = CONFIG | {
        "tokenizer_class": "TokenizersBackend",
        "extra_special_tokens": ["<|im_start|>"],
        "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]},
    }
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(source))
    export_tokenizer(tokenizer, out)
    expected = CONFIG | {"additional_special_tokens": ["<|im_start|>"]}
    assert read_json(out / "tokenizer_config.json") == expected
    again = load_tokenizer(str(out))
    assert again.extra_special_tokens == tokenizer.extra_special_tokens == ["<|im_start|>"]
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer)


def test_the_embedded_tokenizer_is_read_by_both(out: Path) -> None:
    tokenizer = load_tokenizer("demo")
    export_tokenizer(tokenizer, out)
    config = read_json(out / "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = load_tokenizer(str(out))
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer)
    assert again.chat_template == tokenizer.chat_template


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_files_have_the_modes_of_new_files(source: Path, out: Path, umask: int) -> None:
    import torch

    from sft_fast.files import write_json
    from sft_fast.megatron.export.weights import save_tensors

    for path in source.iterdir():
        path.chmod(0o600)
    export_tokenizer(load_tokenizer(str(source)), out)
    write_json(out / "config.json", {})
    save_tensors({"w": torch.ones(2)}, out / "w.safetensors")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()}
    assert modes == dict.fromkeys(modes, 0o640) and "w.safetensors" in modes


@pytest.mark.parametrize(
    ("model_type", "options", "read_by_4"),
    [
        ("llama", {"rope_parameters": FLAT}, {"rope_theta": 7.0, "rope_scaling": None}),
        (
            "llama",
            {"rope_parameters": FLAT | {"rope_type": "linear", "factor": 3.0}},
            {"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        ),
        (
            "qwen3",
            {
                "rope_parameters": FLAT
                | {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
            },
            {
                "rope_theta": 7.0,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 8.0,
                    "original_max_position_embeddings": 64,
                },
            },
        ),
        ("qwen3_moe", {"num_experts": 6}, {"num_experts": 6, "rope_theta": 10000.0}),
        ("mixtral", {"num_local_experts": 6}, {"num_local_experts": 6, "rope_theta": 1e6}),
        ("smollm3", {}, {"rope_theta": 2e6, "rope_scaling": None}),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": FLAT | {"rope_type": "linear", "factor": 8.0},
                    "sliding_attention": FLAT | {"rope_theta": 5.0},
                }
            },
            {
                "rope_theta": 7.0,
                "rope_local_base_freq": 5.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        (
            "phi3",
            {
                "hidden_size": 32,
                "num_attention_heads": 4,
                "original_max_position_embeddings": 20,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 7.0,
                    "partial_rotary_factor": 0.5,
                    "short_factor": [1.0, 1.5],
                    "long_factor": [2.0, 5.0],
                },
            },
            {
                "rope_theta": 7.0,
                "partial_rotary_factor": 0.5,
                "original_max_position_embeddings": 20,
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1.0, 1.5],
                    "long_factor": [2.0, 5.0],
                },
            },
        ),
    ],
)
def test_old_keys_stand_beside_the_new_ones(
    model_type: str, options: dict[str, Any], read_by_4: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoConfig

    made = AutoConfig.for_model(model_type, **options)
    made.save_pretrained(tmp_path)
    saved = read_json(tmp_path / "config.json")
    both = with_old_keys(saved)
    assert {key: both[key] for key in read_by_4} == read_by_4
    assert {key: both[key] for key in saved} == saved
    (tmp_path / "config.json").write_text(json.dumps(both))
    again, expected = AutoConfig.from_pretrained(tmp_path).to_dict(), made.to_dict()
    again["rope_parameters"].pop("type", None)  # as 4 spells rope_type
    differing = {key for key, value in expected.items() if again[key] != value}
    assert differing <= {"_name_or_path"}
    assert with_old_keys(read_by_4) == read_by_4
