"""The configuration: one YAML, `a.b=c` overrides, all checked before torch is imported."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationInfo, create_model, model_validator

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
    RouterConfig,
    Section,
    Text,
    TokenizerConfig,
    TrainConfig,
)
from sft_fast.config.validation import FIELDS_ONLY, Tree, apply_overrides, inspect, validate
from sft_fast.config.yaml_source import dump_yaml, read_yaml
from sft_fast.errors import ConfigError, Problem
from sft_fast.evaluation.choices import BUILT_IN_METRICS
from sft_fast.files import write_atomically
from sft_fast.registry import SFT, load_plugins, stages, trainers

logger = logging.getLogger(__name__)

DEFAULT_CONFIG = Path(__file__).parents[1] / "recipes" / "demo.yaml"


class Config(Section):
    """All of it. `load_config` makes one from a file; `Config.model_validate` from a mapping."""

    backend: Text = "megatron"
    """What computes it; with `stage` the key of a trainer that one of `plugins` registers."""
    stage: Text = "sft"
    """What is trained: sft, or a stage that one of `plugins` registers; its section, if it has one,
    is the key of its name."""
    plugins: list[PathText] = []
    """Python files imported at start, e.g. one that calls register_stage."""
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
    router: RouterConfig = RouterConfig()
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
    yield from checks.restart_problems(config.parallel, config.checkpoint)
    stage: Any = stages.entries.get(config.stage)
    reported = BUILT_IN_METRICS if stage is None else stage.reported()
    yield from checks.evaluation_problems(
        config.data, config.evaluation, config.checkpoint, config.export, reported
    )
    yield from checks.metrics_problems(config.metrics, config.export)
    if stage is not None:
        yield from stage.problems(config)


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
    tree = read_tree(path, overrides)
    for note in tree.notes:
        logger.warning("%s", note)
    return validate(config_class(tree), tree, OTHER_NAMES)


def inspect_config(path: Path, overrides: list[str]) -> tuple[Config | None, list[Problem], Tree]:
    """Returns what can be made of a file with every problem found, and the file itself.

    Keys with a problem of their own have their defaults; None: that makes no configuration.

    Raises:
        ConfigError: The file cannot be read at all.
    """
    tree = read_tree(path, overrides)
    return *inspect(config_class(tree), tree, OTHER_NAMES), tree


def config_class(tree: Tree) -> type[Config]:
    """Config, with the section of the stage that the tree names; runs its plugins to find it.

    What is wrong with plugins or stage goes into the tree's problems.
    """
    name, plugins = tree.data.get("stage", SFT), tree.data.get("plugins", [])
    if name == SFT or not isinstance(name, str) or not is_list_of_text(plugins):
        return Config
    try:
        load_plugins(plugins)
    except ValueError as error:
        where = tree.origin(("plugins",)).where
        if name not in Config.model_fields:
            # Whether its section is right, nobody can say.
            tree.data.pop(name, None)
        expected = "files that exist and can be run"
        tree.problems.append(Problem(("plugins",), str(error), expected, where=where))
        return Config
    where = tree.origin(("stage",)).where
    if name not in stages.entries:
        if not any(trainer.endswith(f", {name})") for trainer in trainers.entries):
            known = ", ".join((SFT, *stages.entries))
            expected = f"one of {known}; others are registered by a file named in plugins"
            tree.problems.append(Problem(("stage",), name, expected, where=where))
        return Config
    if name in Config.model_fields or hasattr(Config, name) or name in primus.TOP_KEYS:
        found = f"{name}, which is the name of something else in a configuration"
        tree.problems.append(Problem(("stage",), found, "a stage of another name", where=where))
        return Config
    stage: Any = stages.entries[name]
    section: type[BaseModel] | None = stage.section
    if section is None:
        return Config
    is_required = any(field.is_required() for field in section.model_fields.values())
    default: Any = ... if is_required else section()
    # A mapping, because pydantic's signature takes no names that are known at run time only.
    fields: dict[str, Any] = {name: (section, default)}
    return create_model("Config", __base__=Config, **fields)


def is_list_of_text(value: object) -> bool:
    """Whether it is one, so that the schema has nothing to say against it."""
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def read_tree(path: Path | None, overrides: list[str]) -> Tree:
    """Returns the unchecked values of a file with overrides applied, under our own keys."""
    document = read_yaml(DEFAULT_CONFIG if path is None else Path(path))
    is_primus = primus.is_primus(document)
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
        file.write(dump_yaml(config.model_dump()))
