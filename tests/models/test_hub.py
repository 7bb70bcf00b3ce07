"""A model or tokenizer is a directory or a hub id; anything else is told apart at once."""

from pathlib import Path

import pytest

from sft_fast.models.hub import local_folder


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert local_folder(str(tmp_path), None, "model.path") == tmp_path


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "a/b/c", "~/nowhere", "a b"])
def test_what_cannot_be_a_hub_id_is_not_looked_up(path: str) -> None:
    with pytest.raises(ValueError, match=r"model\.path\n.* is not a directory"):
        local_folder(path, None, "model.path")


def test_a_file_is_not_a_directory(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ValueError, match=r"tokenizer\.path\n.* is not a directory"):
        local_folder(str(file), None, "tokenizer.path")


def test_an_unavailable_hub_id_names_key_and_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    from sft_fast.models import hub

    def unavailable(path: str, **options: object) -> str:
        assert "*.py" not in options["allow_patterns"]
        raise huggingface_hub.errors.LocalEntryNotFoundError("gone\nlong advice")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unavailable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"model\.path\n.*some/model is neither .*: gone\n"):
        hub.local_folder("some/model", None, "model.path")


def test_what_needs_no_weights_does_not_download_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    patterns: list[list[str]] = []

    def download(path: str, *, allow_patterns: list[str], **options: object) -> str:
        patterns.append(allow_patterns)
        assert options["ignore_patterns"] == ["consolidated*.safetensors"]
        return "somewhere"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    local_folder("some/model", None, "model.path", with_weights=False)
    local_folder("some/model", None, "model.path")
    assert ["*.safetensors" in names for names in patterns] == [False, True]
    assert all("*.json" in names for names in patterns)
