"""Options of the loss: their ranges, their place in the config, and the form that kernels take."""

from typing import Any

import pytest

from sft_fast.config.schema import load_config
from sft_fast.config.sections import LossConfig
from sft_fast.errors import ConfigError
from sft_fast.kernels.loss_options import OPTION_NAMES, LossOptions, options_of


def test_every_option_is_a_key_of_the_config_with_its_words() -> None:
    for name in OPTION_NAMES:
        key, option = LossConfig.model_fields[name], LossOptions.model_fields[name]
        assert key.description and key.description == option.description
        assert key.metadata == option.metadata and key.default == 0.0
    assert load_config(None, ["loss.z_loss=0.25"]).loss.z_loss == 0.25


def test_numbers_go_through_operators_and_back() -> None:
    numbers = [0.1 * (i + 1) for i in range(len(OPTION_NAMES))]
    options = options_of(tuple(numbers))
    assert options.values() == numbers
    assert options.model_dump() == dict(zip(OPTION_NAMES, numbers, strict=True))
    section = LossConfig(backend="torch", **options.model_dump())
    assert section.values() == numbers, "the config's other keys are no options"


def test_penalties_are_what_a_custom_loss_must_not_have() -> None:
    options = LossOptions(label_smoothing=0.1, logit_softcap=3.0)
    assert options.penalties() == ["label_smoothing"]
    assert options.without_penalties() == LossOptions(logit_softcap=3.0)
    assert not options.without_penalties().penalties()


def test_statistics_are_collected_when_asked_for() -> None:
    smooth = LossOptions(label_smoothing=0.1)
    counts = [o.num_statistics(w) for o in (LossOptions(), smooth) for w in (False, True)]
    assert counts == [3, 5, 4, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing\n.* less than 1 .*input_value=1.0"),
        ({"z_loss": -1.0}, "z_loss\n.* greater than or equal to 0 .*input_value=-1.0"),
        ({"logit_softcap": float("inf")}, "logit_softcap\n.* a finite number .*input_value=inf"),
        ({"z_los": 0.1}, "z_los\n.* not permitted"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossOptions(**options)


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss.custom=a", "loss.z_loss=0.1"],
        ["loss.custom=a", "loss.policy=gradient_in_forward"],
        ["loss.label_smoothing=1.0"],
        ["loss.memory_budget_gib=0.0"],
    ],
)
def test_contradictions_in_the_config(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match="loss"):
        load_config(None, overrides)
