"""One answer to whether a model, a batch and ranks fit together, whoever asks."""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from config_cases import BASE, load_text, only_problem
from sft_fast.cli import main
from sft_fast.config.layout import (
    adapted_projections,
    check_layout,
    check_world_size,
    layout_problems,
    mistaken_for_experts,
    stage_layers,
)
from sft_fast.config.schema import Config
from sft_fast.config.sections import LLAMA_PROJECTIONS
from sft_fast.errors import ConfigError, Problem
from sft_fast.models.architecture import Architecture
from sft_fast.models.families import FAMILIES

LLAMA = Architecture(
    vocab_size=99,
    hidden_size=96,
    num_layers=4,
    num_attention_heads=6,
    num_key_value_heads=3,
    ffn_hidden_size=258,
    head_dim=16,
    max_position_embeddings=4096,
)
MIXTURE = replace(LLAMA, num_experts=4, experts_per_token=2, family="MixtralForCausalLM")
FUSED = replace(LLAMA, family="Phi3ForCausalLM")
SHAPE = """\
model:
  shape: {hidden_size: 96, num_layers: 4, num_attention_heads: 6, num_key_value_heads: 3,
          ffn_hidden_size: 258}
tokenizer: {path: demo}
data: {train: demo}
train: {steps: 100}
"""
Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return functools.partial(load_text, tmp_path)


def problems(architecture: Architecture, config: Config) -> list[Problem]:
    sections = config.model, config.packing, config.parallel, config.lora
    return list(layout_problems(architecture, *sections))


def data_parallel_size(config: Config, world_size: int) -> int:
    return check_world_size(config.parallel, config.train, world_size)


DENSE_LAYOUTS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "heads": (["parallel.tensor=4"], ("num_attention_heads", "num_key_value_heads")),
    "key heads": (["parallel.tensor=2"], ("num_key_value_heads",)),
    "layers": (["parallel.pipeline=5"], ("num_layers",)),
    "list of layers": (
        ["parallel.pipeline=2", "parallel.stage_layers=[2,3]"],
        ("2 stages with 5 layers",),
    ),
    "list of stages": (["parallel.stage_layers=[2,2]"], ("2 stages with 4 layers",)),
    "interleaved": (["parallel.pipeline=4", "parallel.virtual_pipeline=2"], ("num_layers",)),
    "capacity": (["packing.capacity=8192"], ("max_position_embeddings",)),
    "experts": (["parallel.expert=2"], ("without experts",)),
    "targets": (["lora.rank=2", "lora.targets=[query]"], ("selects no projection",)),
    "stages": (
        ["lora.rank=2", "lora.targets=[model.layers.0.*]", "parallel.pipeline=2"],
        ("layers 2 to 3, which pipeline stage 1",),
    ),
    "8 bits": (["model.fp8=hybrid"], ("tensorwise with 258 columns",)),
    "fits": (["parallel.tensor=3", "parallel.pipeline=2"], ()),
}


@pytest.mark.parametrize("name", DENSE_LAYOUTS)
def test_the_schema_says_of_a_shape_what_is_said_of_its_architecture(load: Load, name: str) -> None:
    overrides, expected = DENSE_LAYOUTS[name]
    with_path = load(SHAPE, *overrides, "model.shape=null", "model.path=x", "tokenizer.path=null")
    found = problems(LLAMA, with_path)
    for problem, text in zip(found, expected, strict=False):
        assert text in str(problem)
    if not expected:
        assert not found
        load(SHAPE, *overrides)
        return
    with pytest.raises(ConfigError) as caught:
        load(SHAPE, *overrides)
    assert [p.expected for p in caught.value.problems] == [p.expected for p in found]
    assert [p.fix for p in caught.value.problems] == [p.fix for p in found]


def test_layers_are_spread_by_cost_where_stages_do_not_divide_them(load: Load) -> None:
    """Qwen3 235B has 94 layers, each of which costs a third of its head."""
    qwen = replace(
        MIXTURE,
        vocab_size=151936,
        hidden_size=4096,
        num_layers=94,
        num_attention_heads=64,
        num_key_value_heads=4,
        head_dim=128,
        ffn_hidden_size=1536,
        experts_per_token=8,
    )

    def layers(*overrides: str) -> list[int]:
        parallel = load(BASE, *(f"parallel.{text}" for text in overrides)).parallel
        counts = stage_layers(qwen, parallel)
        costs = [*counts[:-1], counts[-1] + qwen.head_cost]
        assert sum(counts) == 94 and max(costs) < min(costs) + 1.5
        return counts

    assert 2.5 < qwen.head_cost < 3
    assert layers("pipeline=4") == [24, 24, 24, 22]
    assert layers("pipeline=8") == [12, 12, 12, 12, 12, 12, 12, 10]
    assert layers("pipeline=4", "virtual_pipeline=3") == [8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 6]
    assert layers("pipeline=2", "stage_layers=balanced") == [48, 46]
    even = load(BASE, "parallel.pipeline=2").parallel
    assert stage_layers(qwen, even) == [47, 47]
    # Without a head to count, the first stages are the short ones.
    assert stage_layers(
        replace(LLAMA, vocab_size=0), load(BASE, "parallel.pipeline=3").parallel
    ) == [*(1, 1, 2)]


@pytest.mark.parametrize("size", ["tensor", "pipeline", "expert", "expert_tensor"])
def test_a_size_that_the_message_names_works(load: Load, size: str) -> None:
    config = load(BASE, f"parallel.{size}=64", *(["parallel.sequence=true"] * (size == "tensor")))
    for problem in problems(MIXTURE, config):
        for number in re.findall(r"\d+", problem.fix.removeprefix("one of ")):
            parallel = config.parallel.model_copy(update={size: int(number)})
            changed = config.model_copy(update={"parallel": parallel})
            assert problem.found not in [p.found for p in problems(MIXTURE, changed)]


def test_a_mixture_needs_sequence_parallel_with_tensor_parallel(load: Load) -> None:
    (problem,) = problems(MIXTURE, load(BASE, "parallel.tensor=3"))
    assert problem.fix == "parallel.sequence=true"
    assert not problems(
        MIXTURE, load(BASE, "parallel.tensor=3", problem.fix, "packing.capacity=96")
    )


def test_models_that_transformer_engine_cannot_compute(load: Load) -> None:
    config = load(BASE, "model.fp8=hybrid", "model.fp8_recipe=blockwise")
    smollm = replace(
        LLAMA, hidden_size=576, num_attention_heads=9, ffn_hidden_size=1536, head_dim=64
    )
    found = [str(problem) for problem in problems(smollm, config)]
    assert len(found) == 3 and "blockwise with 576 columns" in found[0], found
    sizes = {"hidden_size": 512, "num_attention_heads": 4, "head_dim": 128}
    (problem,) = problems(replace(MIXTURE, ffn_hidden_size=512, **sizes), config)
    assert "experts" in str(problem)


def test_a_fused_matrix_has_one_adapter(load: Load) -> None:
    assert not problems(FUSED, load(BASE, "lora.rank=2"))
    (problem,) = problems(FUSED, load(BASE, "lora.rank=2", "lora.targets=[q_proj, o_proj]"))
    assert problem.keys == ("lora.targets",) and problem.found.startswith("q_proj: selects no")
    assert "qkv_proj, o_proj, gate_up_proj, down_proj" in problem.expected


def test_dora_goes_beside_no_experts(load: Load) -> None:
    config = load(BASE, "lora.rank=2", "lora.dora=true")
    assert not problems(LLAMA, config) and not problems(FUSED, config)
    (problem,) = problems(MIXTURE, config)
    plain, others = problem.fix.split(", or ")
    assert not problems(MIXTURE, load(BASE, "lora.rank=2", "lora.dora=true", others))
    assert not problems(MIXTURE, load(BASE, "lora.rank=2", "lora.dora=true", plain))


def test_projections_are_those_of_the_weights() -> None:
    assert FAMILIES["LlamaForCausalLM"].projections == LLAMA_PROJECTIONS
    experts = [f"block_sparse_moe.experts.*.{name}" for name in ("w1", "w3", "w2")]
    assert FAMILIES["MixtralForCausalLM"].projections == (*LLAMA_PROJECTIONS[:4], *experts)
    fused = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert FAMILIES["Phi3ForCausalLM"].projections == fused


def test_layers_that_differ_have_projections_of_their_own(load: Load) -> None:
    sizes = {"num_experts": 4, "dense_layers": frozenset([0])}
    mixture = replace(LLAMA, family="Qwen2MoeForCausalLM", num_layers=2, **sizes)
    assert set(adapted_projections(mixture, ["gate_proj", "model.layers.1.*shared*.up_proj"])) == {
        "model.layers.0.mlp.gate_proj",
        "model.layers.1.mlp.experts.*.gate_proj",
        "model.layers.1.mlp.shared_expert.gate_proj",
        "model.layers.1.mlp.shared_expert.up_proj",
    }
    shared = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.shared_expert.down_proj"]
    assert mistaken_for_experts(mixture, ["[qd]*_proj"]) == shared
    assert not mistaken_for_experts(LLAMA, "all-linear")
    assert not mistaken_for_experts(MIXTURE, "all-linear")
    # No experts are meant by a last part that others have, too.
    (problem,) = problems(mixture, load(BASE, "lora.rank=2", "lora.dora=true"))
    dora = load(BASE, "lora.rank=2", "lora.dora=true", problem.fix.split(", or ")[1])
    assert not problems(mixture, dora) and dora.lora.targets[-1] == "o_proj"
    widths = {"dense_ffn_size": 6, "shared_ffn_size": 9}
    config = load(BASE, "parallel.tensor=4", "parallel.sequence=true")
    uneven = [str(problem) for problem in problems(replace(mixture, **widths), config)]
    assert any("dense_ffn_size of the model is 6" in text for text in uneven)
    assert any("shared_ffn_size of the model is 9" in text for text in uneven)


def test_targets_are_patterns_of_last_parts_or_of_full_names() -> None:
    names = adapted_projections(LLAMA, ["model.layers.[01].*.q_proj", "down_*"])
    layers = [name for name in names if name.endswith("down_proj")]
    assert layers == [f"model.layers.{layer}.mlp.down_proj" for layer in range(4)]
    assert set(names) - set(layers) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    }
    of_experts = adapted_projections(MIXTURE, ["model.layers.2.*.experts.*", "k_proj"])
    assert [name for name in of_experts if "k_proj" not in name] == [
        f"model.layers.2.block_sparse_moe.experts.*.{name}" for name in ("w1", "w3", "w2")
    ]
    # The experts of a layer have adapters together.
    assert not adapted_projections(MIXTURE, ["model.layers.2.block_sparse_moe.experts.0.w1"])
    assert adapted_projections(LLAMA, "all-linear") == adapted_projections(LLAMA, ["*_proj"])


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A directory with the config.json of a small mixture."""
    folder = tmp_path / "mixture"
    folder.mkdir()
    values = {
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 99,
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 258,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 4096,
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_check_plan_and_the_trainer_give_one_answer(
    mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], load: Load
) -> None:
    """Adapters beside projections that a mixture calls otherwise."""
    from sft_fast.models.locate import read_architecture

    overrides = [f"model.path={mixture}", "model.random_init=true", "lora.rank=4"]
    overrides += ["lora.targets=[q_proj, gate_proj, up_proj]"]
    overrides += ["data.train=demo", f"output_dir={tmp_path / 'out'}"]
    answers = []
    (tmp_path / "run.yaml").write_text(BASE)
    for command in (["check"], ["plan", "--no-data"]):
        assert main([*command, str(tmp_path / "run.yaml"), *overrides]) != 0
        answers.append(capsys.readouterr().err)
    config = load(BASE, *overrides)
    with pytest.raises(ConfigError) as caught:
        architecture = read_architecture(config.model, mixture, 99)
        check_layout(architecture, config.model, config.packing, config.parallel, config.lora)
    answers.append(str(caught.value))
    problem = "gate_proj, up_proj: selects no projection"
    fix = "lora.targets=all-linear, or lora.targets=[q_proj,k_proj,v_proj,o_proj,w1,w3,w2]"
    for answer in answers:
        text = " ".join(answer.split())
        assert problem in text and fix in text, answer
    for one in fix.split(", or "):
        lora = load(BASE, "lora.rank=4", one).lora
        check_layout(MIXTURE, config.model, config.packing, config.parallel, lora)


def test_plan_prints_the_problems_that_check_prints(
    mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(BASE)
    overrides = [f"model.path={mixture}", "model.random_init=true", "data.train=demo"]
    overrides += [f"output_dir={tmp_path / 'out'}", "parallel.expert=8", "parallel.tensor=4"]
    overrides += ["packing.capacity=8192"]
    (mixture / "tokenizer.json").touch()
    printed = []
    for command in (["check"], ["plan", "--no-data"]):
        assert main([*command, str(tmp_path / "run.yaml"), *overrides, "--ranks", "3"]) != 0
        lines = capsys.readouterr().err.splitlines()
        printed.append(sorted(line for line in lines if line.startswith("  ")))
    assert printed[0] == printed[1]
    text = "\n".join(printed[0])
    for found in ("3 ranks", "num_key_value_heads", "num_experts", "sequence parallel", "8192"):
        assert found in text


@pytest.mark.parametrize(
    "world_size, overrides, expected",
    [
        (1, [], 1),
        (8, [], 8),
        (8, ["parallel.tensor=3", "parallel.pipeline=2"], None),
        (12, ["parallel.tensor=3", "parallel.pipeline=2"], 2),
        (3, ["parallel.tensor=3", "parallel.pipeline=2"], None),
        (0, [], None),
        (3, [], None),
        (4, ["train.micro_batch_size=4"], None),
        (4, ["train.micro_batch_size=2"], 4),
    ],
)
def test_world_size(
    load: Load, world_size: int, overrides: list[str], expected: int | None
) -> None:
    config = load(SHAPE, *overrides)
    if expected is not None:
        assert data_parallel_size(config, world_size) == expected
        return
    problem = only_problem(data_parallel_size, config, world_size)
    assert "--nproc-per-node" in problem.fix
    is_layout = problem.keys == ("parallel.tensor", "parallel.pipeline")
    assert is_layout or problem.keys == ("train.global_batch_size", "train.micro_batch_size")


def test_batch_size_that_the_message_names_works(load: Load) -> None:
    config = load(SHAPE, "train.global_batch_size=10")
    fix = only_problem(data_parallel_size, config, 4).fix
    assert data_parallel_size(load(SHAPE, override_in(fix)), 4) == 4


def override_in(fix: str) -> str:
    found = re.search(r"train\.global_batch_size=\d+", fix)
    assert found is not None
    return found.group()


@pytest.mark.parametrize("batch, fits", [(8, True), (12, False), (4, False), (16, True)])
def test_interleaved_stages_need_a_multiple_of_micro_batches(
    load: Load, batch: int, fits: bool
) -> None:
    layout = ("parallel.pipeline=4", "parallel.virtual_pipeline=2", "train.micro_batch_size=2")
    config = load(BASE, *layout, f"train.global_batch_size={batch}")
    if fits:
        assert data_parallel_size(config, 4) == 1
        return
    better = override_in(only_problem(data_parallel_size, config, 4).fix)
    assert data_parallel_size(load(BASE, *layout, better), 4) == 1


def test_plan_suggests_adapters_that_a_mixture_can_have(load: Load) -> None:
    from sft_fast.models.estimate import best_suggestions
    from sft_fast.models.flops import Workload

    config = load(BASE)
    given: Any = (MIXTURE, config, Workload(1000, 10**6, 500), 1)
    found = [s.overrides for s in best_suggestions(*given, memory_bytes=1e6, tflops=1.0, count=99)]
    (lora,) = [text for text in found if "lora.rank" in text]
    assert not problems(MIXTURE, load(BASE, *lora.split()))
