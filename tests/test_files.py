import os
import stat
from pathlib import Path

import pytest

from sft_fast.files import read_json, write_atomically, write_json


@pytest.mark.parametrize("text", ["", '{"a": 1', "[1]", "1", "null", "\xff"])
def test_what_holds_no_whole_object_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="latin-1")
    assert read_json(path) is None


def test_no_file_and_a_directory_are_none(tmp_path: Path) -> None:
    assert read_json(tmp_path / "gone.json") is None
    assert read_json(tmp_path) is None


def test_json_comes_back_and_is_readable_in_any_language(tmp_path: Path) -> None:
    value = {"name": "日本語", "file": "no utf-8: \udc80", "figures": [1, 2.5, None]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "日本語" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), write_atomically(path) as file:
        file.write("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with write_atomically(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_the_mode_is_that_of_the_first_byte(tmp_path: Path) -> None:
    with write_atomically(tmp_path / "secret", mode=0o600) as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600
