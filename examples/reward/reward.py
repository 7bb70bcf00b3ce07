"""A reward model: a number for each answer, greater for the better one of two.

    python examples/reward/make_comparisons.py
    sft_fast train examples/reward/reward.yaml

Source: Ouyang et al. 2022 (arXiv 2203.02155), equation 1, after Bradley and Terry 1952; the
centring of rewards: Eisenstein et al. 2023 (arXiv 2312.09244), section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeFloat

from sft_fast.config.sections import Section
from sft_fast.data.conversation import Conversation, Message
from sft_fast.data.format_registry import Record, register_format
from sft_fast.registry import register_stage
from sft_fast.stages import ActiveTokens, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from sft_fast.data.tokens import Sample


class RewardConfig(Section):
    """The section `reward`."""

    margin: NonNegativeFloat = 0.0
    """By how much the better answer's reward is to exceed the other's."""
    centre: NonNegativeFloat = 0.0
    """Factor of the square of the two rewards' sum, which keeps rewards around 0."""


@register_format(
    "comparison",
    fields={
        "prompt": ("prompt", "question", "instruction"),
        "chosen": ("chosen",),
        "rejected": ("rejected",),
    },
    detect=lambda record: {"chosen", "rejected"} <= record.keys(),
)
def comparison(record: Record) -> tuple[Conversation, Conversation]:
    """Two answers to `prompt`, or two whole chats; the better one comes first."""
    prompt: tuple[Message, ...] = ()
    if record.get("prompt"):
        prompt = (Message("user", record.text("prompt")),)
    chosen, rejected = (answers(record, name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same, so neither is better")
    return Conversation(prompt + chosen), Conversation(prompt + rejected)


def answers(record: Record, name: str) -> tuple[Message, ...]:
    """The turns of a chat that ends with an answer, or the one turn of a text."""
    found = record.require(name)
    if isinstance(found, str):
        return (Message("assistant", record.text(name)),)
    try:
        turns = tuple(Message(turn["role"], turn["content"]) for turn in found)
    except (KeyError, TypeError):
        raise ValueError(
            f"{record.label(name)}: expected a text, or turns of role and content"
        ) from None
    if not turns or turns[-1].role != "assistant":
        raise ValueError(f"{record.label(name)} does not end with an answer of the assistant")
    return turns


@register_stage("reward")
class Reward(Stage):
    """Bradley-Terry: the probability that an answer is better is sigmoid(difference of rewards)."""

    section = RewardConfig
    group_size = 2
    trains_answers = False
    num_outputs = 1
    measures = {"accuracy": True, "reward_margin": True}
    options: RewardConfig

    def targets(self, sample: Sample) -> Sample:
        """The reward is read at the answer's last token; two halves count as one comparison."""
        return sample.with_target_behind(weight=0.5)

    def loss(self, outputs: Tensor, tokens: ActiveTokens) -> Tensor:
        """-log sigmoid(chosen - rejected - margin) of each pair, for both of its tokens."""
        from torch.nn.functional import softplus

        chosen, rejected = outputs.view(-1, 2).unbind(dim=1)  # [pairs]
        losses = softplus(self.options.margin - (chosen - rejected))
        losses = losses + self.options.centre * (chosen + rejected).square()
        return losses.repeat_interleave(2)

    def measure(self, outputs: Tensor, tokens: ActiveTokens) -> Mapping[str, Any]:
        """How often the better answer has the greater reward, and by how much on average."""
        chosen, rejected = outputs.view(-1, 2).unbind(dim=1)  # [pairs]
        margin = chosen - rejected
        measured = {"accuracy": (margin > 0).float(), "reward_margin": margin}
        return {name: values.repeat_interleave(2) for name, values in measured.items()}
