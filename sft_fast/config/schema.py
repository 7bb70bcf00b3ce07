"""The configuration: one YAML, `a.b=c` overrides, all checked before torch is imported."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationInfo, model_validator

from sft_fast.config import checks, primus
from sft_fast.config.aliases import OTHER_NAMES
from sft_fast.config.layout import layout_problems
from sft_fast.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ExportConfig,
    GuardConfig,
    LoraConfig,
    LossConfig,
    MetricsConfig,
    ModelConfig,
    NotNegative,
    OptimConfig,
    PackingConfig,
    ParallelConfig,
    PathText,
    Section,
    Text,
    TokenizerConfig,
    TrainConfig,
)
from sft_fast.config.validation import FIELDS_ONLY, Tree, apply_overrides, inspect, validate
from sft_fast.config.yaml_source import dump_yaml, read_yaml
from sft_fast.errors import ConfigError, Problem
from sft_fast.files import write_atomically
from sft_fast.redact import redact_values

DEFAULT_CONFIG = Path(__file__).parents[1] / "recipes" / "demo.yaml"


class Config(Section):
    """All of it. `load_config` makes one from a file; `Config.model_validate` from a mapping."""

    backend: Text = "megatron"
    """First half of the registry's (backend, stage) pair."""
    stage: Text = "sft"
    """Second half of the registry's (backend, stage) pair."""
    plugins: list[PathText] = []
    """Python files imported at start, e.g. one that calls register_trainer."""
    output_dir: PathText = "outputs/run"
    """Run directory: config.yaml, metrics.jsonl, checkpoints/, export/, with LoRA adapter/."""
    seed: NotNegative = 1234
    """Seed of the weights and of the data order."""
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    packing: PackingConfig = PackingConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    loss: LossConfig = LossConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    metrics: MetricsConfig = MetricsConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> "Config":
        if info.context == FIELDS_ONLY:
            return self
        problems = list(cross_field_problems(self))
        if problems:
            raise ConfigError(problems)
        return self


def cross_field_problems(config: Config) -> Iterator[Problem]:
    """Yields every contradiction between the keys of a configuration."""
    yield from checks.model_problems(config.model, config.tokenizer)
    yield from checks.memory_problems(config.model, config.parallel, config.optim)
    yield from checks.transformer_engine_problems(
        config.model, config.packing, config.parallel, config.lora
    )
    if config.model.shape is not None:
        of_shape = list(checks.shape_problems(config.model.shape))
        # The sizes of a shape that contradicts itself say nothing of its layout.
        yield from of_shape or layout_problems(
            config.model.shape, config.model, config.packing, config.parallel, config.lora
        )
    yield from checks.train_problems(config.train)
    yield from checks.packing_problems(config.packing)
    yield from checks.stream_problems(config.data, config.packing, config.train)
    yield from checks.lora_problems(config.lora)
    yield from checks.optim_problems(config.train, config.optim)
    yield from checks.parallel_problems(config.packing, config.parallel)
    yield from checks.evaluation_problems(
        config.data, config.evaluation, config.checkpoint, config.export
    )
    yield from checks.metrics_problems(config.metrics, config.export)


def load_config(path: Path | None, overrides: list[str]) -> Config:
    """Returns the checked configuration of a YAML file with overrides applied.

    Args:
        path: A file in our own keys, or a Primus experiment file (top-level key `modules`);
            None = the embedded demo.
        overrides: Items `a.b=value`; the value is YAML. Always our own keys, also for a
            Primus file.

    Raises:
        ConfigError: Names everything that is wrong, each with its file and line.
    """
    return validate(Config, read_tree(path, overrides), OTHER_NAMES)


def inspect_config(path: Path, overrides: list[str]) -> tuple[Config | None, list[Problem], Tree]:
    """Returns what can be made of a file with every problem found, and the file itself.

    Keys with a problem of their own have their defaults; None: that makes no configuration.

    Raises:
        ConfigError: The file cannot be read at all.
    """
    tree = read_tree(path, overrides)
    return *inspect(Config, tree, OTHER_NAMES), tree


def read_tree(path: Path | None, overrides: list[str]) -> Tree:
    """Returns the unchecked values of a file with overrides applied, under our own keys."""
    document = read_yaml(DEFAULT_CONFIG if path is None else Path(path))
    is_primus = "modules" in document.data
    tree = primus.translate(document) if is_primus else Tree.from_document(document)
    apply_overrides(tree, overrides)
    if is_primus:
        primus.drop_idle_evaluation(tree)
    return tree


def save_config(config: Config, path: Path) -> None:
    """Writes every key of `config` to `path`; `load_config(path, [])` gives an equal one, but for
    passwords in URLs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        file.write(dump_yaml(redact_values(config.model_dump())))
