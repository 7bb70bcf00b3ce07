"""What users add in files of their own: stages, trainers, losses, evaluation metrics, by name.

The files are named in the config's `plugins`. Formats and row functions of data, which have the
same registry, are in sft_fast.data.format_registry.

    @register_stage("reward")
    class Reward(Stage):
        ...

    @register_trainer(backend="megatron", stage="score")
    def score(config: Config, phases: Phases) -> int:
        ...

    @register_loss("focal")
    def focal(logprobs: Tensor, labels: Tensor) -> Tensor:
        return -(1 - logprobs.exp()) ** 2 * logprobs

    @register_metric("whole_answer", greater_is_better=True)
    def whole_answer(sample: SampleOutputs) -> tuple[float, float]:
        return float(sample.correct.all()), 1.0
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from traceback import extract_tb
from types import CodeType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from sft_fast.errors import nearest
from sft_fast.evaluation.choices import BUILT_IN_METRICS

# (Config, Phases) -> exit code; both stand above this module, which finds the config's stage.
Trainer = Callable[[Any, Any], int]

if TYPE_CHECKING:
    from torch import Tensor

    CustomLoss = Callable[[Tensor, Tensor], Tensor]
    MetricFunction = Callable[["SampleOutputs"], tuple[float, float]]

T = TypeVar("T")
StageT = TypeVar("StageT", bound=type)
TrainerT = TypeVar("TrainerT", bound="Trainer")

PLUGIN_MODULE = "sft_fast_plugin:"
"""Before the full path of a plugin file: the name of its module, which is no package's."""


class Registry(Generic[T]):
    """Entries by name; a name belongs to the entry that had it first.

    Attributes:
        entries: name -> entry, in the order of registration.
        files: name -> full path of the plugin file that registered it.
    """

    every: ClassVar[list[Registry[Any]]] = []
    running: ClassVar[list[str]] = []
    """Plugin files that are being run, the innermost last."""

    def __init__(self, kind: str, key: str, reserved: Sequence[str] = ()) -> None:
        """Makes an empty one of entries that are a `kind`, which the config names in `key`."""
        self.kind, self.key, self.reserved = kind, key, reserved
        self.entries: dict[str, T] = {}
        self.files: dict[str, str] = {}
        Registry.every.append(self)

    def add(self, name: str, entry: T) -> None:
        """Raises ValueError where the name is empty, or that of another entry."""
        if not name:
            raise ValueError(f"a {self.kind} was registered without a name for {self.key}")
        if name in self.reserved or self.entries.get(name, entry) != entry:
            raise ValueError(f"the {self.kind} name {name!r} is taken; choose another")
        self.entries[name] = entry
        if Registry.running:
            self.files.setdefault(name, Registry.running[-1])

    def get(self, name: str) -> T:
        """The entry of that name; raises ValueError with all names where there is none."""
        if name in self.entries:
            return self.entries[name]
        near = nearest(name, self.entries)
        hint = f" Did you mean {near}?" if near else ""
        names = ", ".join(sorted((*self.reserved, *self.entries))) or "none"
        raise ValueError(f"{self.key}: no {self.kind} {name!r}; there are: {names}.{hint}")

    def names_of(self, file: str) -> list[str]:
        """Names that a plugin file, given by its full path, registered."""
        return [name for name, origin in self.files.items() if origin == file]


def load_plugins(plugins: Sequence[str]) -> None:
    """Runs the Python files of the config's `plugins`, each once per process.

    Raises:
        ValueError: A file does not exist or is not a .py file.
    """
    for index, name in enumerate(plugins):
        load_file(name, f"plugins[{index}]")


_distrusted: list[str] = []
"""The configuration whose code is not run; empty = any may be."""


def distrust(config: Path | None) -> None:
    """Refuses from now on to run Python files, which the configuration of a run may name.

    Args:
        config: the configuration, for the message; None = they may be run.
    """
    _distrusted[:] = [] if config is None else [str(config)]


class PluginLoader(SourceFileLoader):
    """Runs a file as it stands: bytecode counts as current while size and second are the same."""

    def get_code(self, fullname: str) -> CodeType:
        """Compiles the text of the file."""
        return self.source_to_code(self.get_data(self.path), self.path)


def load_file(name: str, key: str) -> str:
    """Runs a Python file, unless this process has; returns its full path.

    A file that fails is forgotten with everything it registered, so that the next try says the
    same again.

    Args:
        name: path as the user wrote it.
        key: config key that holds it, for the message.

    Raises:
        ValueError: it does not exist, is not a .py file, is named by a configuration that is not
            trusted, or fails when it is run.
    """
    path = Path(name).expanduser().resolve()
    file, module_name = str(path), f"{PLUGIN_MODULE}{path}"
    if module_name in sys.modules:
        return file
    if path.suffix != ".py" or not path.is_file():
        found = "is not a .py file" if path.exists() else "does not exist"
        raise ValueError(f"{key}: {name} {found}; expected a Python file ({path})")
    if _distrusted:
        raise ValueError(
            f"{key}: {path} would be run, because {_distrusted[-1]}, the configuration of a run, "
            "names it; look at it, and say --trust if it may"
        )
    loader = PluginLoader(module_name, file)
    spec = importlib.util.spec_from_file_location(module_name, path, loader=loader)
    assert spec is not None and spec.loader is not None, "it was given"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    Registry.running.append(file)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        forget(file)
        if not isinstance(error, Exception):
            raise
        raise ValueError(f"{key}: {place_of(error, file)}: {as_said(error)}") from error
    finally:
        Registry.running.pop()
    return file


def place_of(error: BaseException, file: str) -> str:
    """The line of the file, given by its full path, at which it failed."""
    lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno)
    return f"{file}:{lines[-1]}" if lines else file


def as_said(error: Exception) -> str:
    """What an error says; with its type, unless it is one that says what to do."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}"
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def forget(file: str) -> None:
    """Undoes what `load_file` did for the file with this full path."""
    sys.modules.pop(f"{PLUGIN_MODULE}{file}", None)
    for registry in Registry.every:
        for name in registry.names_of(file):
            del registry.entries[name], registry.files[name]


# --- stages

SFT = "sft"
"""The stage of a run that names none."""
stages: Registry[type] = Registry("stage", "stage", reserved=(SFT,))


def register_stage(name: str) -> Callable[[StageT], StageT]:
    """Returns a decorator that makes a subclass of `sft_fast.stages.Stage` the stage `name`.

    Args:
        name: Config key `stage` of the runs it is for, and the key of its section.

    Raises:
        ValueError: The name is taken, or no name of a section, or what has it is no stage.
    """
    if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
        raise ValueError(
            f"a stage was registered as {name!r}; expected letters, digits and _, as in "
            '@register_stage("mine")'
        )

    def register(stage: StageT) -> StageT:
        faults: Any = getattr(stage, "faults", None)
        if faults is None:
            raise ValueError(f"the stage {name!r} is no subclass of sft_fast.stages.Stage")
        for fault in faults():
            raise ValueError(f"the stage {name!r}: {fault}")
        stages.add(name, stage)
        return stage

    return register


# --- trainers; train.py adds those that come with sft_fast

trainers: Registry[Trainer] = Registry("trainer", "backend, stage")


@dataclass(frozen=True)
class LateTrainer:
    """A trainer that is imported when it runs, so that its name costs nothing."""

    target: str
    """"module:function"."""

    def __call__(self, config: Any, phases: Any) -> int:
        """Trains; returns the process's exit code."""
        return self.load()(config, phases)

    def load(self) -> Trainer:
        """The function, whose module is imported."""
        module, _, function = self.target.partition(":")
        trainer: Trainer = getattr(importlib.import_module(module), function)
        return trainer


def register_trainer(*, backend: str, stage: str) -> Callable[[TrainerT], TrainerT]:
    """Returns a decorator that makes a function the trainer of the runs of a backend and stage.

    The function gets the `Config` and the `Phases` that the watchdog reads on every rank, and
    returns the process's exit code. It shares nothing with other stages; what wants the data, the
    loop, the checkpoints and the export of sft_fast is a stage, see `register_stage`.

    Args:
        backend: Config key `backend` of the runs it is for.
        stage: Config key `stage` of the runs it is for.

    Raises:
        ValueError: The pair has another trainer, or a name is empty.
    """
    if not backend or not stage:
        raise ValueError(
            f"a trainer was registered for {(backend, stage)}; expected a backend and a stage"
        )

    def register(trainer: TrainerT) -> TrainerT:
        trainers.add(f"({backend}, {stage})", trainer)
        return trainer

    return register


def get_trainer(backend: str, stage: str) -> Trainer:
    """The trainer of a backend and stage.

    Raises:
        ValueError: There is none; the message lists all pairs.
    """
    return trainers.get(f"({backend}, {stage})")


# --- losses

losses: Registry[CustomLoss] = Registry("loss", "loss.custom")


def register_loss(name: str) -> Callable[[CustomLoss], CustomLoss]:
    """Returns a decorator that makes a function the loss `name`.

    The function gets logprobs [b, s] fp32, log p(label) of each token and 0 where masked, and
    labels [b, s] int64, IGNORE_INDEX where masked. It returns the loss of each token [b, s],
    which is summed and divided by the supervised tokens of the global batch. It runs on every
    tensor-parallel rank alike, so it must not draw random numbers; masked tokens are cut out
    of its result.

    Raises:
        ValueError: The name is empty, or another function has it.
    """

    def register(loss: CustomLoss) -> CustomLoss:
        losses.add(name, loss)
        return loss

    return register


def get_loss(name: str) -> CustomLoss:
    """The loss `name`.

    Raises:
        ValueError: There is none; the message lists all names.
    """
    return losses.get(name)


# --- evaluation metrics


@dataclass(frozen=True)
class SampleOutputs:
    """What the model says of one sample's supervised tokens, in their order, on the CPU."""

    labels: Tensor
    """int64 [n]: the expected tokens."""
    logprobs: Tensor
    """fp32 [n]: log p(label), nats."""
    entropies: Tensor
    """fp32 [n]: entropy of the prediction, nats."""
    correct: Tensor
    """bool [n]: the label is the most likely token."""


@dataclass(frozen=True)
class Metric:
    """A registered metric."""

    name: str
    function: MetricFunction
    greater_is_better: bool


metrics: Registry[Metric] = Registry(
    "metric", "evaluation.metrics", reserved=tuple(BUILT_IN_METRICS)
)


def register_metric(
    name: str, *, greater_is_better: bool
) -> Callable[[MetricFunction], MetricFunction]:
    """Returns a decorator that makes a function the metric `name`.

    The function gets the SampleOutputs of one sample with at least one supervised token and
    returns (numerator, denominator). The metric is the sum of the numerators over the samples
    divided by the sum of the denominators.

    Args:
        name: Value in `evaluation.metrics`.
        greater_is_better: What early stopping and the best checkpoint go by.

    Raises:
        ValueError: The name is empty or taken.
    """

    def register(function: MetricFunction) -> MetricFunction:
        metrics.add(name, Metric(name, function, greater_is_better))
        return function

    return register


def get_metric(name: str) -> Metric:
    """The metric `name`.

    Raises:
        ValueError: There is none; the message lists all names.
    """
    return metrics.get(name)


def is_greater_better(name: str) -> bool:
    """Direction of a built-in or registered metric."""
    if name in BUILT_IN_METRICS:
        return BUILT_IN_METRICS[name]
    return get_metric(name).greater_is_better
