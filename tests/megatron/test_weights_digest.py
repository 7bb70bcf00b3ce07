"""Base weights are known by all of their numbers, whatever files they are in."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from sft_fast.megatron.exchange import Ranks
from sft_fast.megatron.hf import SafetensorsSource
from sft_fast.models.architecture import Architecture
from sft_fast.models.weights import hf_shapes

ARCHITECTURE = Architecture(
    vocab_size=11, hidden_size=8, num_layers=2, num_attention_heads=2, num_key_value_heads=1,
    ffn_hidden_size=16, head_dim=4, max_position_embeddings=16,
)  # fmt: skip


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    ranks = Ranks(dist.HashStore(), 0, 1)
    monkeypatch.setattr(Ranks, "of_process_group", lambda: ranks)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = hf_shapes(ARCHITECTURE)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def source(folder: Path, *files: dict[str, torch.Tensor]) -> SafetensorsSource:
    folder.mkdir()
    weight_map = {}
    for number, content in enumerate(files):
        name = "model.safetensors" if len(files) == 1 else f"{number}.safetensors"
        save_file(content, folder / name)
        weight_map |= dict.fromkeys(content, name)
    if len(files) > 1:
        text = json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
    return SafetensorsSource(folder, ARCHITECTURE)


@pytest.mark.fault("F36")
def test_every_tensor_counts_and_the_files_do_not(tmp_path: Path) -> None:
    whole = tensors()
    names = sorted(whole)
    expected = source(tmp_path / "whole", whole).digest()
    parts = [{name: whole[name] for name in names[half::2]} for half in (0, 1)]
    assert source(tmp_path / "parts", *parts).digest() == expected
    for number, name in enumerate(names):
        changed = whole[name].clone()
        changed.view(-1)[-1] += 1
        other = source(tmp_path / str(number), whole | {name: changed})
        assert other.digest() != expected, name


@pytest.mark.fault("F36")
def test_it_is_read_once_until_the_files_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = source(tmp_path / "model", tensors()).digest()
    monkeypatch.setattr(SafetensorsSource, "digest_of", lambda *_: pytest.fail("read again"))
    assert SafetensorsSource(tmp_path / "model", ARCHITECTURE).digest() == first
    monkeypatch.undo()
    changed = tensors()
    changed["model.norm.weight"][0] = 9.0
    save_file(changed, tmp_path / "model/model.safetensors")
    monkeypatch.setattr(Ranks, "of_process_group", lambda: Ranks(dist.HashStore(), 0, 1))
    assert SafetensorsSource(tmp_path / "model", ARCHITECTURE).digest() != first


@pytest.mark.fault("F36")
def test_one_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    whole = tensors()
    again = {"model.norm.weight": whole["model.norm.weight"] + 1}
    with pytest.raises(ValueError, match=r"model.norm.weight too, which .* be in 1.safetensors"):
        source(tmp_path / "twice", whole, again)


@pytest.mark.fault("F36")
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_what_is_no_number_by_itself_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(ValueError, match=f"{name} has type .*; expected one of F64"):
        source(tmp_path / "quantized", tensors() | {name: torch.ones(8, 16).to(dtype)})
