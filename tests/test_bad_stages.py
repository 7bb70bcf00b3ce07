"""Stages that cannot work: each is refused with one message that says where and why."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sft_fast.config.schema import load_config
from sft_fast.data.build import stage_parts
from sft_fast.data.sample_maker import StageOptions
from sft_fast.data.tokens import Sample
from sft_fast.errors import ConfigError
from sft_fast.megatron.attention.packed_samples import PackedSamples
from sft_fast.megatron.stage_head import token_losses
from sft_fast.registry import forget, load_plugins
from sft_fast.stages import ActiveTokens, Stage

IMPORTS = """\
from sft_fast.config.sections import Section
from sft_fast.registry import register_stage
from sft_fast.stages import Stage
"""
STAGE = IMPORTS + '@register_stage("mine")\nclass Mine(Stage):\n    {body}\n'
LOSS = "\n    def loss(self, outputs, tokens):\n        return -outputs"
MEASURE = "\n    def measure(self, outputs, tokens):\n        return {'m': outputs}"
BAD_PLUGINS = {
    "syntax": ("x = 1\ndef f(:\n", "mine.py:2: SyntaxError: invalid syntax"),
    "import": ("import nowhere_at_all\n", "mine.py:1: ModuleNotFoundError: No module named"),
    "name": (IMPORTS + "x = undefined\n", "mine.py:4: NameError: name 'undefined'"),
    "own message": ("raise ValueError('no GPU')\n", "mine.py:1: no GPU"),
    "a class alone": (STAGE.replace("(Stage)", "").format(body="pass"), "'mine' is no subclass"),
    "a function": (
        IMPORTS + '@register_stage("mine")\ndef mine(config, phases): ...\n',
        "'mine' is no subclass of sft_fast.stages.Stage",
    ),
    "no name": (
        IMPORTS + "@register_stage\nclass Mine(Stage): ...\n",
        'expected letters, digits and _, as in @register_stage("mine")',
    ),
    "twice": (STAGE.format(body="pass") + STAGE.format(body="pass"), "name 'mine' is taken"),
    "no outputs": (STAGE.format(body="num_outputs = 0" + LOSS), "num_outputs is 0; expected"),
    "outputs below 0": (STAGE.format(body="num_outputs = -1" + LOSS), "num_outputs is -1"),
    "half an output": (STAGE.format(body="num_outputs = 1.5" + LOSS), "num_outputs is 1.5"),
    "no group": (STAGE.format(body="group_size = 0"), "group_size is 0; expected"),
    "a group of truth": (STAGE.format(body="group_size = True"), "group_size is True"),
    "a head without loss": (STAGE.format(body="num_outputs = 1"), "needs a loss"),
    "a section that is none": (STAGE.format(body="section = {'k': 1}"), "section is {'k': 1}"),
    "measures in a list": (STAGE.format(body="measures = ['m']" + LOSS + MEASURE), "measures is"),
    "measures of nothing": (STAGE.format(body="measures = {'m': True}" + LOSS), "lists what"),
    "measures unlisted": (STAGE.format(body="x = 1" + LOSS + MEASURE), "lists what measure()"),
    "measures without loss": (
        STAGE.format(body="measures = {'m': True}" + MEASURE),
        "no effect without a loss",
    ),
    "a measure named step": (
        STAGE.format(body="measures = {'step': True}" + LOSS + MEASURE),
        "measures has 'step', which every evaluation has",
    ),
}


def problem_of(folder: Path, code: str, name: str = "mine", *overrides: str) -> str:
    """What the configuration says of a plugin and the stage `name`."""
    path = folder / "mine.py"
    path.write_text(code)
    try:
        with pytest.raises(ConfigError) as caught:
            load_config(None, [f"stage={name}", f"plugins=[{path}]", *overrides])
    finally:
        forget(str(path))
    assert len(caught.value.problems) == 1
    return str(caught.value)


@pytest.mark.parametrize(("code", "message"), BAD_PLUGINS.values(), ids=BAD_PLUGINS)
def test_a_plugin_that_cannot_work_is_one_problem(tmp_path: Path, code: str, message: str) -> None:
    assert message in problem_of(tmp_path, code)


def test_the_section_of_a_stage_that_cannot_be_run_is_no_second_problem(tmp_path: Path) -> None:
    assert "No module named" in problem_of(tmp_path, "import nowhere_at_all", "mine", "mine.rate=1")


def test_a_section_s_required_keys_are_asked_for(tmp_path: Path) -> None:
    section = "class MineConfig(Section):\n    rate: float\n"
    code = STAGE.replace("@", section + "@").format(body="section = MineConfig")
    assert "mine.rate" in problem_of(tmp_path, code)


@pytest.mark.parametrize("name", ["model", "seed", "model_dump", "copy", "modules"])
@pytest.mark.parametrize("body", ["pass", "section = MineConfig"])
def test_a_stage_takes_no_name_of_the_configuration(tmp_path: Path, name: str, body: str) -> None:
    code = STAGE.replace("@", "class MineConfig(Section): ...\n@").format(body=body)
    text = problem_of(tmp_path, code.replace('"mine"', f'"{name}"'), name)
    assert f"{name}, which is the name of something else" in text


def test_a_stage_has_no_private_name(tmp_path: Path) -> None:
    code = STAGE.format(body="pass").replace('"mine"', '"_mine"')
    assert "a stage was registered as '_mine'" in problem_of(tmp_path, code, "_mine")


class Answering(Stage):
    """A stage whose loss and measure are what a test says."""

    measures = {"m": True}

    def __init__(self, loss: Any, measured: Any = None) -> None:
        super().__init__(None)
        self.answers = loss, measured

    def loss(self, outputs: Tensor, tokens: ActiveTokens) -> Tensor:
        """The loss of the test."""
        made: Tensor = self.answers[0](outputs)
        return made

    def measure(self, outputs: Tensor, tokens: ActiveTokens) -> Any:
        """The measures of the test."""
        return self.answers[1](outputs)


def losses_of(stage: Stage, active: list[int], wants_outputs: bool = False) -> Tensor:
    """[1, 6] of two samples of three tokens."""
    outputs = torch.arange(1.0, 1 + len(active), requires_grad=True)
    samples = PackedSamples(seqlens=(3, 3), active_tokens=torch.tensor(active, dtype=torch.int64))
    samples.wants_outputs = wants_outputs
    return token_losses(stage, outputs, torch.zeros(1, 6, dtype=torch.int64), samples)


BAD_LOSSES = {
    "a sum": (lambda o: o.sum(), r"loss\(\) has shape \[\]; expected one number for each .*\[2\]"),
    "a column": (lambda o: o[:, None], r"has shape \[2, 1\]"),
    "nothing": (lambda o: None, "returned NoneType; expected one number"),
    "a list": (lambda o: [1.0, 2.0], "returned list"),
    "no gradient": (lambda o: o.detach(), "does not depend on the outputs"),
    "a constant": (lambda o: torch.ones_like(o), "does not depend on the outputs"),
}


@pytest.mark.parametrize(("loss", "message"), BAD_LOSSES.values(), ids=BAD_LOSSES)
def test_a_loss_is_a_number_a_token_that_depends_on_the_outputs(loss: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses_of(Answering(loss), [1, 4])


BAD_MEASURES = {
    "nothing": (lambda o: None, "measure.. returned NoneType, but measures lists m"),
    "others": (lambda o: {"n": o}, "returned n, but measures lists m"),
    "more": (lambda o: {"m": o, "n": o}, "returned m, n, but"),
    "a sum": (lambda o: {"m": o.sum()}, r"measure\(\) m has shape \[\]"),
}


@pytest.mark.parametrize(("measured", "message"), BAD_MEASURES.values(), ids=BAD_MEASURES)
@torch.no_grad()
def test_measures_are_those_that_are_listed(measured: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses_of(Answering(lambda o: -o, measured), [1, 4], wants_outputs=True)


def test_a_loss_of_another_number_format_is_made_fp32() -> None:
    for kind in (torch.float64, torch.bfloat16):
        losses = losses_of(Answering(lambda o, kind=kind: -o.to(kind)), [1, 4])
        assert losses.dtype == torch.float32 and losses.tolist() == [[0, -1, 0, 0, -2, 0]]


def test_a_micro_batch_without_active_tokens_asks_nothing() -> None:
    """Its loss is 0 and still gives the outputs a gradient, so no rank waits for another."""

    def refuse(outputs: Tensor) -> Any:
        raise AssertionError(outputs)

    stage = Answering(refuse, refuse)
    losses = losses_of(stage, [])
    assert losses.shape == (1, 6) and not losses.any() and losses.requires_grad
    losses.sum().backward()
    with torch.no_grad():
        assert losses_of(stage, [], wants_outputs=True).shape == (2, 1, 6)


def test_sums_by_sample_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = [3, 1, 7, 2]
    index = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    tokens = ActiveTokens.of(torch.arange(13), index)
    values = torch.randn(13, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([part.sum() for part in values.split(counts)])
    torch.testing.assert_close(tokens.sum_by_sample(values), expected)
    assert torch.autograd.gradcheck(tokens.sum_by_sample, (values,))


def sample(weights: list[float] | None = None) -> Sample:
    with np.errstate(over="ignore"):
        given = None if weights is None else np.array(weights, np.float16)
    supervised = np.array([True, False, True, True])
    return Sample(np.arange(4, dtype=np.uint32), supervised, 0, given)


def test_a_shared_weight_makes_samples_count_alike() -> None:
    assert sample().with_shared_weight(1).weights.tolist() == [0, 0, 0.5, 0.5]  # type: ignore[union-attr]
    weighted = sample([1, 0, 2, 4]).with_shared_weight(1)
    assert weighted.weights.tolist() == [0, 0, 1, 2]  # type: ignore[union-attr]
    assert weighted.supervised.tolist() == [False, False, True, True]
    long = Sample(np.zeros(10**5, np.uint32), np.ones(10**5, np.bool_), 0).with_shared_weight()
    assert long.weights is not None
    assert long.weights.astype(np.float64).sum() == pytest.approx(256, rel=2**-11)


BAD_SAMPLES = {
    "length": (Sample(np.arange(4, dtype=np.uint32), np.ones(3, np.bool_), 0), "supervised is"),
    "type": (Sample(np.arange(4), np.ones(4, np.bool_), 0), "input_ids is int64"),
    "no weight": (sample([1, 0, 0, 1]), "is 0.0 in float16"),
    "below 0": (sample([1, 0, -1, 1]), "is -1.0 in float16"),
    "too large": (sample([1, 0, 1e6, 1]), "is inf in float16"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_SAMPLES.values(), ids=BAD_SAMPLES)
def test_targets_are_checked(bad: Sample, message: str) -> None:
    sample([1, 0, 1, 1]).check()
    with pytest.raises(ValueError, match=message):
        bad.check()


def test_a_store_depends_on_targets_and_not_on_the_loss(tmp_path: Path) -> None:
    def parts(body: str, **section: float) -> list[Any]:
        path = tmp_path / "mine.py"
        config = "class MineConfig(Section):\n    beta: float = 1.0\n"
        path.write_text(STAGE.replace("@", config + "@").format(body=body))
        load_plugins([str(path)])
        try:
            return stage_parts(StageOptions("mine", (str(path),), section))
        finally:
            forget(str(path))

    plain = "section = MineConfig\n    group_size = 2" + LOSS
    assert parts(plain, beta=1.0) == parts(plain + " * self.options.beta", beta=2.0)
    assert parts(plain) != parts(plain.replace("2", "3"))
    own = plain + "\n    def targets(self, sample):\n        return sample"
    assert parts(own, beta=1.0) != parts(own, beta=2.0)


def test_an_export_is_told_where_the_plugin_of_a_stage_is() -> None:
    from sft_fast.commands.export import check_overrides

    check_overrides(["plugins=[elsewhere.py]"], "reward")
    for stage, key in (("sft", "plugins"), ("reward", "stage")):
        with pytest.raises(ValueError, match=f"{key}: an export sets it itself"):
            check_overrides([f"{key}=[x]"], stage)
