"""The recipes load, fit their nodes, and hold for every kind of data that they name."""

import re
from itertools import product
from pathlib import Path

import pytest

from sft_fast.config.layout import check_world_size, layout_problems
from sft_fast.config.schema import load_config
from sft_fast.models.architecture import Architecture
from sft_fast.models.estimate import estimate_memory

CONFIGS = Path(__file__).parents[2] / "sft_fast/recipes"
NODES = {"MI300X": 192e9, "MI355X": 288e9, "H200": 141e9}
DATA = ("single-turn", "multi-turn", "offline")
# From the models' config.json.
MODELS = {
    "alpaca_smollm2": Architecture(
        49152, 576, 30, 9, 3, 1536, 64, 8192, tie_word_embeddings=True
    ),
    "llama3_8b": Architecture(128256, 4096, 32, 32, 8, 14336, 128, 8192),
    "llama3_70b_lora": Architecture(128256, 8192, 80, 64, 8, 28672, 128, 8192),
    "qwen3_30b_a3b": Architecture(
        151936, 2048, 48, 32, 4, 768, 128, 40960, num_experts=128, experts_per_token=8,
        family="Qwen3MoeForCausalLM",
    ),
    "qwen3_8b": Architecture(
        151936, 4096, 36, 32, 8, 12288, 128, 40960, family="Qwen3ForCausalLM"
    ),
}  # fmt: skip


def overrides(recipe: str, name: str) -> list[str]:
    """What the recipe's head says to add for `name`."""
    text = (CONFIGS / f"{recipe}.yaml").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^#   {name}: (.*)$", text, re.M)
    return [] if line == "(nothing)" else line.split()


@pytest.mark.parametrize("recipe", MODELS)
def test_every_variant_of_a_recipe_loads_and_fits_its_node(recipe: str) -> None:
    seen, model = set(), MODELS[recipe]
    for node, kind in product(NODES, DATA):
        given = [*overrides(recipe, node), *overrides(recipe, kind)]
        config = load_config(CONFIGS / f"{recipe}.yaml", given)
        assert check_world_size(config.parallel, config.train, 8) * config.parallel.tensor == 8
        sections = config.model, config.packing, config.parallel, config.lora
        assert not list(layout_problems(model, *sections))
        if not model.num_experts:  # the estimate knows dense models only
            memory = estimate_memory(model, config, 8)
            assert 0.02 * NODES[node] < memory.total < 0.85 * NODES[node], (node, memory)
        seen.add(str(config.data.train))
    assert len(seen) == len(DATA)
