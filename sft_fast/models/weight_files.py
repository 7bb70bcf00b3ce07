"""The *.safetensors of a model directory, from their headers: which tensors, where, of what type.

Nothing here imports torch, so `check` says of weights what the trainer says.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sft_fast.errors import DamageError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LENGTH_BYTES = 8


@dataclass(frozen=True)
class TensorRecord:
    """Where a tensor lies."""

    path: Path
    dtype: str
    """As safetensors spells it: BF16, F8_E4M3, ..."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    num_bytes: int

    def read(self, start: int = 0, num_bytes: int | None = None) -> bytes:
        """Bytes of the tensor from `start`; None = to its end."""
        rest = self.num_bytes - start
        with self.path.open("rb") as file:
            file.seek(self.start + start)
            return file.read(rest if num_bytes is None else min(num_bytes, rest))


def tensor_records(folder: Path) -> dict[str, TensorRecord]:
    """Every tensor of the weights in `folder`, by name; the files that transformers would read.

    Raises:
        ValueError: there are none, or the index names a file or tensor that is not there.
        DamageError: a file is not whole.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return header(folder / WEIGHTS_FILE)
    if not (folder / INDEX_FILE).is_file():
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        if not others:
            raise ValueError(
                f"model.path: {folder} holds no *.safetensors; convert the model first"
            )
        raise ValueError(
            f"model.path: {folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}, but "
            f"{shorten(others, 3)}; expected weights as transformers saves them"
        )
    file_of = read_index(folder)
    records: dict[str, TensorRecord] = {}
    for file in sorted(set(file_of.values())):
        found = header(folder / file)
        if lost := [name for name in file_of if file_of[name] == file and name not in found]:
            raise DamageError(
                f"{folder / file}: expected the tensors that {INDEX_FILE} names, found none of "
                f"{shorten(lost)}; copy or download it again"
            )
        if twice := [name for name in found if file_of.get(name, file) != file]:
            raise ValueError(
                f"model.path: {folder / file} holds {shorten(twice)} too, which {INDEX_FILE} says "
                f"to be in {file_of[twice[0]]}; which is right? Remove the file that is wrong"
            )
        records |= found
    return records


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file of `folder`, as the index of a model in several files says."""
    index = folder / INDEX_FILE
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{index}: expected a weight_map, found damage ({error!r})") from None
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise ValueError(f"{index}: weight_map names {file!r}, not a file of {folder}")
    if missing := [file for file in set(weight_map.values()) if not (folder / file).is_file()]:
        raise ValueError(
            f"model.path: {folder} lacks {shorten(missing, 3)}, which weight_map of {INDEX_FILE} "
            "names; copy or download it again"
        )
    return weight_map


def header(path: Path) -> dict[str, TensorRecord]:
    """Every tensor of one file, by name; DamageError if it is not whole."""
    with open_safetensors(path):  # which looks whether the header is right
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        entries: dict[str, Any] = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    records = {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        shape, start = tuple(entry["shape"]), LENGTH_BYTES + length + begin
        records[name] = TensorRecord(path, entry["dtype"], shape, start, end - begin)
    return records


def open_safetensors(path: Path, framework: str = "numpy") -> Any:
    """safe_open, with an error that users can read.

    Args:
        path: the file.
        framework: what its tensors become, pt or numpy.

    Raises:
        ValueError: the file is missing.
        DamageError: it is cut short, or no safetensors file.
    """
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        if not path.is_file():
            raise ValueError(f"{path}: expected a safetensors file, found none") from None
        raise DamageError(
            f"{path}: expected a whole safetensors file, found {path.stat().st_size:,} bytes with "
            f"damage ({error}); copy or download it again"
        ) from None


def shorten(names: Iterable[str], limit: int = 5) -> str:
    """The first names, and how many there are beyond them."""
    names = sorted(names)
    listed = ", ".join(names[:limit]) or "none"
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"
