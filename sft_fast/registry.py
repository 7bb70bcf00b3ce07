"""Which trainer runs for a (backend, stage) pair.

A new stage is one file and one decorator; name the file in the config's `plugins`:

    @register_trainer(backend="megatron", stage="dpo")
    def train(config: Config) -> int:
        ...
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, overload

if TYPE_CHECKING:
    from sft_fast.config.schema import Config

    Trainer = Callable[[Config], int]
    TrainerT = TypeVar("TrainerT", bound=Trainer)

Pair = tuple[str, str]

# "module:attribute", imported by get_trainer only, so that the registry itself costs nothing.
_BUILT_IN: dict[Pair, str] = {
    ("megatron", "sft"): "sft_fast.megatron.sft:train",
    ("megatron", "export"): "sft_fast.megatron.export.run:export",
}
_registered: dict[Pair, Trainer] = {}


@overload
def register_trainer(trainer: TrainerT, backend: str, stage: str) -> TrainerT: ...


@overload
def register_trainer(*, backend: str, stage: str) -> Callable[[TrainerT], TrainerT]: ...


def register_trainer(
    trainer: TrainerT | None = None, backend: str = "", stage: str = ""
) -> TrainerT | Callable[[TrainerT], TrainerT]:
    """Makes `trainer` the one for (backend, stage); without `trainer`, returns a decorator.

    Args:
        trainer: Called with the configuration; returns the process's exit code.
        backend: Config key `backend` of the runs it is for.
        stage: Config key `stage` of the runs it is for.

    Raises:
        ValueError: The pair has another trainer already, or a name is empty.
    """
    if trainer is None:
        return lambda decorated: register_trainer(decorated, backend, stage)
    pair = (backend, stage)
    if not callable(trainer):
        raise ValueError(f"trainer of {pair} is {trainer!r}; expected a callable train(config)")
    if not backend or not stage:
        raise ValueError(f"a trainer was registered for {pair}; expected a backend and a stage")
    name = _name(trainer)
    if pair in _registered and _registered[pair] is not trainer:
        raise ValueError(f"{pair} is already {_name(_registered[pair])}, not {name}")
    if pair in _BUILT_IN and _BUILT_IN[pair] != name:
        raise ValueError(f"{pair} is already {_BUILT_IN[pair]}, not {name}")
    _registered[pair] = trainer
    return trainer


def get_trainer(backend: str, stage: str) -> Trainer:
    """Returns the trainer of (backend, stage), importing it if it is built in.

    Raises:
        ValueError: There is none; the message lists all pairs.
    """
    pair = (backend, stage)
    if pair in _registered:
        return _registered[pair]
    if pair in _BUILT_IN:
        module_name, _, attribute = _BUILT_IN[pair].partition(":")
        trainer: Trainer = getattr(importlib.import_module(module_name), attribute)
        return trainer
    pairs = ", ".join(f"({b}, {s})" for b, s in registered_pairs())
    raise ValueError(
        f"backend, stage: no trainer for ({backend}, {stage}); there are: {pairs}. "
        "A file that calls register_trainer is loaded with plugins=[path.py]"
    )


def registered_pairs() -> list[Pair]:
    """Returns all (backend, stage) pairs, sorted."""
    return sorted({*_BUILT_IN, *_registered})


def load_plugins(config: Config) -> None:
    """Imports the Python files of `config.plugins`, each once per process.

    Raises:
        ValueError: A file does not exist or is not a .py file.
    """
    for index, name in enumerate(config.plugins):
        path = Path(name).resolve()
        if path.suffix != ".py" or not path.is_file():
            found = "is not a .py file" if path.exists() else "does not exist"
            raise ValueError(f"plugins[{index}]: {name} {found}; expected a Python file ({path})")
        _import_file(path)


def _import_file(path: Path) -> None:
    module_name = f"sft_fast_plugin:{path}"
    if module_name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        # A half-run module must not count as loaded.
        del sys.modules[module_name]
        raise


def _name(trainer: Trainer) -> str:
    qualified = getattr(trainer, "__qualname__", type(trainer).__qualname__)
    return f"{trainer.__module__}:{qualified}"
