"""What a run trains: the stage `sft`, and the base of custom stages.

A stage says how a record becomes samples, what stands on the hidden states, the loss of the tokens
that train, and what an evaluation reports. Everything else is the same for all of them: the store,
packing, the schedule, the guard, checkpoints, layouts, LoRA, the export.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sft_fast.config.sections import LossConfig, Section
from sft_fast.errors import Problem
from sft_fast.evaluation.choices import BUILT_IN_METRICS
from sft_fast.registry import SFT, stages

if TYPE_CHECKING:
    from torch import Tensor

    from sft_fast.config.schema import Config
    from sft_fast.data.tokens import Sample


RESERVED_MEASURES = frozenset(("loss", "kind", "time", "step", "by_source"))
"""Of the record of an evaluation."""


@dataclass(frozen=True)
class ActiveTokens:
    """The A tokens of a micro-batch that train, in order, sample after sample."""

    labels: Tensor
    """int64 [A]: the supervised token that follows each of them."""
    sample_index: Tensor
    """int64 [A], ascending: which sample of the micro-batch each belongs to. The samples of a group
    are neighbours."""
    num_samples: int
    """Samples up to the last that has an active token here: without context parallelism all."""
    longest: int
    """Active tokens of the sample that has most of them."""
    places: Tensor
    """int64 [A]: where each stands in a table [num_samples, longest]."""

    @classmethod
    def of(cls, labels: Tensor, sample_index: Tensor) -> ActiveTokens:
        """Those with these labels [A], A at least 1, on their device.

        sample_index [A] is on the CPU, so that the sizes are known without asking a device.
        """
        import torch

        counts = torch.bincount(sample_index)  # [num_samples]
        longest = int(counts.max())
        places = torch.arange(len(sample_index)) - (counts.cumsum(0) - counts)[sample_index]
        both = torch.stack([sample_index, sample_index * longest + places])
        index, places = both.to(labels.device, non_blocking=True)
        return cls(labels, index, len(counts), longest, places)

    def sum_by_sample(self, values: Tensor) -> Tensor:
        """[num_samples]: sums of [A], the same bits in every run."""
        # No index_add, whose order of additions a GPU does not keep.
        table = values.new_zeros(self.num_samples * self.longest)
        return table.index_copy(0, self.places, values).view(self.num_samples, -1).sum(dim=1)


class Stage:
    """Supervised fine-tuning, and the base of all other stages.

    A subclass that is decorated with `register_stage` is the stage of the runs that name it. What
    it leaves alone is as in supervised fine-tuning. One is made in every process.
    """

    section: ClassVar[type[Section] | None] = None
    """Its keys in the configuration, under the stage's name."""
    group_size: ClassVar[int] = 1
    """Samples of a record, which always share a micro-batch. Above 1 the format returns a tuple of
    as many conversations."""
    trains_answers: ClassVar[bool] = True
    """The targets are the tokens of answers. False: they are others, so chats are stored to the end
    that the template gives them, unless `data.trim_tail` says otherwise."""
    num_outputs: ClassVar[int | None] = None
    """Outputs of a linear head in place of the LM head; None = the LM head."""
    measures: ClassVar[Mapping[str, bool]] = {}
    """What `measure` returns: name -> whether a greater value is better."""

    def __init__(self, options: Any) -> None:
        """`options`: the section of the configuration; None without one."""
        self.options = options

    @property
    def writes_text(self) -> bool:
        """Whether the exported model answers in words, and not with numbers."""
        return self.num_outputs is None

    @property
    def has_loss(self) -> bool:
        """Whether it has a loss of its own."""
        return type(self).loss is not Stage.loss

    @classmethod
    def faults(cls) -> Iterator[str]:
        """Yields what the class says that no stage can be."""
        if not is_count(cls.group_size):
            yield f"group_size is {cls.group_size!r}; expected a number of 1 or more"
        if cls.num_outputs is not None and not is_count(cls.num_outputs):
            yield f"num_outputs is {cls.num_outputs!r}; expected None or a number of 1 or more"
        section: object = cls.section
        if section is not None and not (isinstance(section, type) and issubclass(section, Section)):
            yield f"section is {section!r}; expected a subclass of sft_fast.config.sections.Section"
        measures: object = cls.measures
        if not isinstance(measures, Mapping):
            yield f"measures is {measures!r}; expected names, and whether a greater value is better"
            return
        for name in sorted(RESERVED_MEASURES.intersection(measures)):
            yield f"measures has {name!r}, which every evaluation has; choose another name"
        if cls.num_outputs is not None and cls.loss is Stage.loss:
            yield "num_outputs is a head of its own, which needs a loss"
        if bool(measures) != (cls.measure is not Stage.measure):
            yield "measures lists what measure() returns; there is only one of them"
        elif measures and cls.loss is Stage.loss:
            yield "measures have no effect without a loss"

    @classmethod
    def reported(cls) -> Mapping[str, bool]:
        """Names that an evaluation reports -> whether a greater value is better."""
        if cls.loss is Stage.loss:
            return BUILT_IN_METRICS
        return {"loss": False, **cls.measures}

    @classmethod
    def problems(cls, config: Config) -> Iterator[Problem]:
        """Yields what a configuration asks for in vain, or wrongly, of this stage."""
        stage = config.stage
        if cls.group_size > 1 and config.data.streaming:
            found = f"true, but the samples that {stage} compares must share a micro-batch"
            yield Problem(("data.streaming",), found, "false", "data.streaming=false")
        if cls.group_size > 1 and config.parallel.context > 1:
            found = (
                f"{config.parallel.context}, which would divide the samples that {stage} compares"
            )
            yield Problem(("parallel.context",), found, "1", "parallel.context=1")
        if cls.loss is Stage.loss:
            return
        idle: dict[str, object] = {"evaluation.metrics": config.evaluation.metrics}
        of_lm_head = ("backend", "policy", "memory_budget_gib")
        for name, field in LossConfig.model_fields.items():
            value = getattr(config.loss, name)
            if value != field.default and (cls.num_outputs is not None or name not in of_lm_head):
                idle[f"loss.{name}"] = value
        if cls.num_outputs is not None:
            idle["evaluation.exact_match_samples"] = config.evaluation.exact_match_samples
            idle["metrics.samples"] = config.metrics.samples
        for key, value in idle.items():
            if value:
                yield Problem(
                    (key,), f"{value}, which has no effect in the stage {stage}", "its default"
                )

    def targets(self, sample: Sample) -> Sample:
        """The sample with the tokens that this stage trains marked as supervised.

        It is given the sample of supervised fine-tuning, with the answers' tokens. The head reads
        the hidden state of the token before a supervised one: see `Sample.with_target_behind`.
        """
        return sample

    def loss(self, outputs: Tensor, tokens: ActiveTokens) -> Tensor:
        """The loss of each active token.

        A step's loss is their sum, each times the weight that `targets` gave, over the sum of these
        weights in the global batch. Tensor-parallel ranks compute it alike.

        Args:
            outputs: fp32 [A, num_outputs] of the head; with the LM head fp32 [A], the log
                probabilities of the labels. A is at least 1.
            tokens: the A tokens.

        Returns: fp32 [A].
        """
        raise AssertionError("only a stage with a loss of its own is asked for it")

    def measure(self, outputs: Tensor, tokens: ActiveTokens) -> Mapping[str, Tensor]:
        """What an evaluation reports beside the loss: the mean of [A] for each of `measures`.

        The arguments are those of `loss`; the mean has the weights that `targets` gave.
        """
        return {}


SFT_STAGE = Stage(None)


def is_count(value: object) -> bool:
    """Whether it is an integer from 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def stage_of(config: Config) -> Stage:
    """The stage that the configuration names.

    Raises:
        ValueError: there is none of that name; the message lists all.
    """
    if config.stage == SFT:
        return SFT_STAGE
    made: Stage = stages.get(config.stage)(getattr(config, config.stage, None))
    return made
