import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sft_fast.cli import main
from sft_fast.config.schema import Config
from sft_fast.models.architecture import architecture_from_hf
from sft_fast.models.weights import hf_shapes

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    save_weights(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(CHAT) + "\n")
    return path


def save_weights(folder: Path, **changed: NDArray[Any]) -> None:
    """The weights that LLAMA describes, with some of them changed."""
    from safetensors.numpy import save_file

    shapes = hf_shapes(architecture_from_hf(LLAMA))
    weights = {name: np.full(shape, 0.5, np.float16) for name, shape in shapes.items()}
    save_file(weights | changed, folder / "model.safetensors")


def run(tmp_path: Path, text: str, *arguments: str) -> int:
    (tmp_path / "x.yaml").write_text(text)
    return main(["check", str(tmp_path / "x.yaml"), *arguments])


def problems_of(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Key -> what is said of it; each starts with file:line."""
    blocks: dict[str, str] = {}
    for line in capsys.readouterr().err.splitlines()[1:]:
        if not line.startswith(" "):
            key = line.split("  ", 1)[1]
            blocks[key] = line
        else:
            blocks[key] += "\n" + line
    return blocks


def good(model: Path, chats: Path, tmp_path: Path) -> str:
    return (
        f"output_dir: {tmp_path}/out\nmodel:\n  path: {model}\ndata:\n  train: {chats}\n"
        "packing:\n  capacity: 512\ntrain:\n  epochs: 1\n"
    )


def test_a_good_configuration_says_what_was_seen(
    model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, good(model, chats, tmp_path), "--ranks", "2") == 0
    text = capsys.readouterr().out
    assert "no problems found" in text and "the first 1 records" in text and "messages" in text
    assert "2 ranks give data parallel size 2" in text and "are free" in text


def test_transformer_engine_is_missed_where_it_is_wanted(
    model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, is_told in (("local", False), ("te", True)):
        text = good(model, chats, tmp_path)
        assert run(tmp_path, text, f"model.transformer_impl={kind}") == 0
        assert ("need Transformer Engine" in capsys.readouterr().out) == is_told


def test_random_models_too_are_held_to_their_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "demo", "parallel.expert=2"]) == 1
    key = "parallel.expert, parallel.expert_tensor"
    assert "without experts" in problems_of(capsys)[key]
    eight_bits = ["model.fp8=hybrid", "model.dtype=bf16", "model.shape.ffn_hidden_size=380"]
    assert main(["check", "demo", *eight_bits]) == 1
    assert "tensorwise with 380 columns" in problems_of(capsys)["model.fp8_recipe, parallel.tensor"]


def test_wrong_keys_paths_and_layouts_are_told_at_once_with_their_lines(
    model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        good(model, chats, tmp_path).replace("512", "8192").replace("chats.jsonl", "chat.jsonl")
        + "  batch_sze: 3\nparallel:\n  tensor: 4\n  pipeline: 8\nplugins: [missing.py]\n"
        "tokenizer:\n  chat_template: chatm\n"
    )
    assert run(tmp_path, text) == 1
    found = problems_of(capsys)
    expected = {
        "train.batch_sze": (10, "unknown key"),
        "data.train": (5, "nearest names there: chats.jsonl"),
        "packing.capacity": (7, "max_position_embeddings"),
        "parallel.tensor": (12, "num_key_value_heads"),
        "parallel.pipeline": (13, "at most 6 stages"),
        "plugins[0]": (14, "missing.py does not exist"),
        "tokenizer.chat_template": (16, "did you mean chatml?"),
    }
    assert set(found) == set(expected)
    for key, (line, words) in expected.items():
        assert f"x.yaml:{line}" in found[key] and words in found[key], found[key]


def test_bad_rows_in_the_head_are_shown_with_their_lines(
    model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps(CHAT), '{"messages": [', json.dumps(CHAT), '{"messages": []}']
    chats.write_text("\n".join(lines))
    assert run(tmp_path, good(model, chats, tmp_path)) == 1
    text = capsys.readouterr().err
    assert "chats.jsonl:2:" in text and "chats.jsonl:4" in text and "chats.jsonl:3" not in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_an_unsupported_model_is_named(
    change: dict[str, Any],
    words: str,
    model: Path,
    chats: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (model / "config.json").write_text(json.dumps(LLAMA | change))
    assert run(tmp_path, good(model, chats, tmp_path)) == 1
    assert words in problems_of(capsys)["model.path"]


def test_missing_shards_and_tokenizer_are_named(
    model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    (model / "tokenizer.json").unlink()
    assert run(tmp_path, good(model, chats, tmp_path)) == 1
    text = capsys.readouterr().err
    assert "lacks model-2.safetensors" in text and "has no tokenizer.json" in text


def test_quantised_fresh_and_damaged_weights_are_problems(
    model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantised = LLAMA | {"quantization_config": {"quant_method": "fp8"}}
    (model / "config.json").write_text(json.dumps(quantised))
    assert run(tmp_path, good(model, chats, tmp_path)) == 1
    assert "is quantised (quantization_config of config.json: fp8)" in capsys.readouterr().err
    (model / "config.json").write_text(json.dumps(LLAMA))

    save_weights(model, **{"lm_head.weight_scale_inv": np.ones(1, np.float32)})
    assert run(tmp_path, good(model, chats, tmp_path)) == 1
    assert "such as lm_head.weight_scale_inv" in capsys.readouterr().err

    assert run(tmp_path, good(model, chats, tmp_path), "model.random_init=true") == 0
    (model / "model.safetensors").write_bytes(b"")
    assert run(tmp_path, good(model, chats, tmp_path)) == 1
    assert "found 0 bytes with damage" in problems_of(capsys)["model.path"]


def test_a_full_disk_is_seen(
    model: Path,
    chats: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sft_fast.models.flops import num_parameters
    from sft_fast.preflight.machine_checks import check_machine, shutil

    config = Config.model_validate(
        {
            "model": {"path": str(model)},
            "data": {"train": str(chats)},
            "train": {"epochs": 1},
            "output_dir": str(tmp_path / "deep" / "down"),
        }
    )
    architecture = check_machine(config).architecture
    assert architecture is not None
    # Two checkpoints and the one being written, 14 bytes a parameter; the export has 2.
    needed = num_parameters(architecture) * (14 * 3 + 2)
    for free, count in ((needed - 1, 1), (needed, 0)):
        usage = shutil._ntuple_diskusage(0, 0, free)  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        keys = [p.keys for p in check_machine(config).problems]
        assert keys == [("output_dir", "checkpoint.keep_last")] * count


def test_the_layout_of_ranks_is_a_problem_among_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "data: {train: demo}\ntrain: {steps: 1}\nparallel: {tensor: 2}\nlorra: {rank: 2}\n"
    shape = "model: {shape: {hidden_size: 8, num_layers: 2, num_attention_heads: 2, "
    shape += "num_key_value_heads: 2, ffn_hidden_size: 8}}\ntokenizer: {path: demo}\n"
    assert run(tmp_path, text + shape, "--ranks", "3") == 1
    found = problems_of(capsys)
    assert "did you mean lora" in found["lorra"]
    assert "3 ranks" in found["parallel.tensor, parallel.pipeline"]


def test_the_schema_describes_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    lr = schema["$defs"]["OptimConfig"]["properties"]["lr"]
    assert lr["description"] == "Peak learning rate." and lr["exclusiveMinimum"] == 0
    assert schema["additionalProperties"] is False
    kinds = {
        entry.get("type") for entry in schema["$defs"]["DataConfig"]["properties"]["train"]["anyOf"]
    }
    assert kinds == {"string", "array"}


PRIMUS = """\
modules:
  post_trainer:
    framework: megatron
    overrides:
      hf_path: some/model
      sft_dataset_name: a.jsonl
      lora: {enabled: true}
"""


def test_a_folder_has_a_line_for_each_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "configs"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.yaml").write_text(PRIMUS)
    (folder / "deep" / "b.yaml").write_text(PRIMUS + "      moe_router_dtype: bf16\n")
    (folder / "c.yaml").write_text("a: [")
    assert main(["check", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a.yaml: accepted, ") and lines[0].endswith(" notes")
    assert lines[1].startswith("c.yaml: refused: ")
    assert lines[2] == (
        "deep/b.yaml: refused: moe_router_dtype is the string 'bf16'; expected the string 'fp32', "
        "because routers compute in fp32"
    )
    assert lines[3] == "1 of 3 accepted; `sft_fast check FILE` says more"
    (folder / "c.yaml").unlink()
    assert main(["check", str(folder / "deep"), "model.random_init=true"]) == 1
    (folder / "deep" / "b.yaml").unlink()
    assert main(["check", str(folder)]) == 0
    assert main(["check", str(folder), "--ranks", "3"]) == 1
    assert "expected a multiple of 3" in capsys.readouterr().out


def test_a_folder_without_configurations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(tmp_path)]) == 2
    assert "has no *.yaml" in capsys.readouterr().err
