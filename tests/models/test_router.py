"""What is said of the balance of experts, before anything starts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sft_fast.commands.recipes import router_lines
from sft_fast.config.sections import LoraConfig, RouterConfig
from sft_fast.models.architecture import Architecture
from sft_fast.models.router import router_note, router_problems

DENSE = Architecture(99, 96, 4, 6, 3, 258, 16, 4096)
MIXTRAL = replace(DENSE, num_experts=4, experts_per_token=2, family="MixtralForCausalLM")
MINIMAX = replace(MIXTRAL, family="MiniMaxM2ForCausalLM")
NO_LORA, LORA = LoraConfig(), LoraConfig(rank=2)


@pytest.mark.parametrize(
    ("architecture", "router", "lora", "expected"),
    [
        (DENSE, {}, NO_LORA, ()),
        (DENSE, {"aux_loss_coef": 0.1, "z_loss_coef": 0.1}, NO_LORA, ("without", "without")),
        (MIXTRAL, {"aux_loss_coef": 0.1, "z_loss_coef": 0.1}, LORA, ()),
        (MIXTRAL, {"bias_update_rate": 0.1}, NO_LORA, ("experts have no bias",)),
        (MINIMAX, {"bias_update_rate": 0.1}, NO_LORA, ()),
        (MINIMAX, {"bias_update_rate": 0.1}, LORA, ("with LoRA",)),
    ],
)
def test_options_that_a_model_cannot_have(
    architecture: Architecture, router: dict[str, float], lora: LoraConfig, expected: Any
) -> None:
    found = list(router_problems(architecture, RouterConfig(**router), lora))
    assert len(found) == len(expected)
    for problem, words in zip(found, expected, strict=True):
        assert words in str(problem)
        fixed = dict(fix.split("=") for fix in problem.fix.replace("router.", "").split())
        values = router | {name: float(value) for name, value in fixed.items()}
        left = list(router_problems(architecture, RouterConfig(**values), lora))
        assert problem not in left


def test_a_loss_that_transformers_would_add_is_named() -> None:
    config = {"output_router_logits": True, "router_aux_loss_coef": 0.001}
    off, on = RouterConfig(), RouterConfig(aux_loss_coef=0.5)
    assert "router.aux_loss_coef=0.001 turns it on" in router_note(config, off)
    assert router_note(config, on) == ""
    assert router_note(config | {"output_router_logits": False}, off) == ""
    assert router_note(config | {"router_aux_loss_coef": 0}, off) == ""
    assert router_note({"output_router_logits": True}, off) == ""


def test_init_writes_the_coefficient_of_the_model_down(tmp_path: Path) -> None:
    from sft_fast.cli import main
    from sft_fast.config.schema import load_config

    config = {"router_aux_loss_coef": 0.02, "max_position_embeddings": 512}
    assert router_lines({}) == ""
    for is_on in (False, True):
        folder, file = tmp_path / f"model{is_on}", tmp_path / f"{is_on}.yaml"
        folder.mkdir()
        values = config | {"output_router_logits": is_on}
        (folder / "config.json").write_text(json.dumps(values))
        assert main(["init", str(folder), "chats.jsonl", "-o", str(file)]) == 0
        assert "router: {aux_loss_coef: 0.02}" in file.read_text()
        assert load_config(file, []).router.aux_loss_coef == (0.02 if is_on else 0.0)
