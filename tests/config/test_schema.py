import functools
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from config_cases import BASE, line_of, load_text, only_problem, problems_of
from sft_fast.config.schema import (
    DEFAULT_CONFIG,
    Config,
    load_config,
    save_config,
)
from sft_fast.config.validation import dotted_keys
from sft_fast.errors import ConfigError, nearest_key

ROOT = Path(__file__).parents[2]
SHIPPED = [*sorted((ROOT / "sft_fast/recipes").glob("*.yaml")), *(ROOT / "examples").glob("*.yaml")]


@pytest.fixture
def load(tmp_path):
    return functools.partial(load_text, tmp_path)


def test_unknown_key_in_the_wrong_section_names_the_right_one(load):
    problem = only_problem(load, BASE + "lr: 1e-4\n")
    assert problem.keys == ("lr",)
    assert problem.fix == "did you mean optim.lr?"
    assert line_of(problem) == 8


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("optim.warmup", "optim.warmup_steps"),
        ("optm.lr", "optim"),
        ("train.learning_rate", "optim.lr"),
        ("max_seq_length", "packing.capacity"),
        ("train.num_train_epochs", "train.epochs"),
        ("tensor_model_parallel_size", "parallel.tensor"),
        ("model.optim", "optim"),
        ("data.capacity", "packing.capacity"),
        ("parallel.tensr", "parallel.tensor"),
    ],
)
def test_nearest_key(load, wrong, right):
    assert only_problem(load, BASE, f"{wrong}=1").fix == f"did you mean {right}?"


def test_every_key_is_found_again_after_any_single_typo():
    known = list(dotted_keys(Config))
    for key in known:
        section, _, name = key.rpartition(".")
        prefix = f"{section}." if section else ""
        swaps = [name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in range(len(name) - 1)]
        drops = [name[:i] + name[i + 1 :] for i in range(len(name))]
        # "beta" is as near to beta1 as to beta2.
        others = {k.rpartition(".")[2] for k in known} | {"beta"}
        for typo in {*swaps, *drops, name + "s"} - others:
            assert nearest_key(prefix + typo, known) == key, typo


def test_key_that_is_like_nothing_gets_no_suggestion(load):
    assert "did you mean" not in only_problem(load, BASE, "zzzzzz=1").fix


def test_all_errors_at_once_with_their_lines(load):
    text = """\
model:
  path: some/model
  dtype: bfloat16
data:
  train: train.jsonl
  frmat: alpaca
packing:
  capacity: 2048.5
train:
  steps: 10
  epochs: 1
  global_batch_size: 10
  micro_batch_size: 4
parallel:
  sequence: true
learning_rate: 1e-4
"""
    problems = problems_of(load, text, "optim.decay=cosin", "seed=one")
    expected = {
        ("model.dtype",): "3",
        ("data.frmat",): "6",
        ("packing.capacity",): "8",
        ("train.steps", "train.epochs"): "10",
        ("train.global_batch_size", "train.micro_batch_size"): "12",
        ("parallel.sequence", "parallel.tensor"): "15",
        ("learning_rate",): "16",
        ("optim.decay",): None,
        ("seed",): None,
    }
    assert {problem.keys for problem in problems} == set(expected)
    for problem in problems:
        line = expected[problem.keys]
        assert (f"run.yaml:{line}" if line else "command line: ") in problem.where
    by_keys = {problem.keys: problem for problem in problems}
    assert by_keys["train.steps", "train.epochs"].where.endswith(":11")
    assert by_keys["model.dtype",].fix == "did you mean bf16?"
    assert by_keys["optim.decay",].fix == "did you mean cosine?"


def test_error_is_one_clean_text_and_survives_pickling(load):
    with pytest.raises(ValueError) as caught:
        load(BASE + "lr: 1e-4\n")
    text = str(caught.value)
    assert text.splitlines()[0].startswith("1 problem in ")
    assert "Traceback" not in text and "pydantic" not in text
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


def test_overrides_win_and_are_read_as_yaml(load):
    config = load(
        BASE,
        "train.steps=null",
        "train.epochs=2",
        "data.fields={instruction: question}",
        "data.fields.response=answer",
        "data.train_split=train[:10%]",
        "output_dir=a=b",
        "--optim.lr=2e-5",
        "plugins=[a.py, b.py]",
        "seed=1",
        "seed=2",
    )
    assert (config.train.steps, config.train.epochs) == (None, 2)
    assert config.data.fields == {"instruction": "question", "response": "answer"}
    assert config.data.train_split == "train[:10%]"
    assert config.output_dir == "a=b"
    assert config.optim.lr == 2e-5
    assert config.plugins == ["a.py", "b.py"]
    assert config.seed == 2


@pytest.mark.parametrize(
    "override",
    ["optim.lr", "=3", ".lr=3", "optim..lr=1", "optim.lr.peak=1", "seed=[1", "seed=!x 1"],
)
def test_override_that_cannot_be_read_is_named(load, override):
    text = BASE + "optim:\n  lr: 1e-4\n"
    assert override in only_problem(load, text, override).where


def test_override_of_an_unknown_key_is_named(load):
    problem = only_problem(load, BASE, "train.stepz=3")
    assert problem.keys == ("train.stepz",)
    assert problem.where == "command line: train.stepz=3"
    assert problem.fix == "did you mean train.steps?"


def test_conflict_of_file_and_override_shows_both_places(load):
    problem = only_problem(load, BASE, "train.epochs=2")
    assert "run.yaml:7" in problem.where
    assert "command line: train.epochs=2" in problem.where


def test_override_of_one_key_in_the_demo_shape():
    assert load_config(None, ["model.shape.num_layers=2"]).model.shape.num_layers == 2


SHAPE = """\
model:
  shape: {hidden_size: 96, num_layers: 4, num_attention_heads: 6, num_key_value_heads: 3,
          ffn_hidden_size: 258}
tokenizer: {path: demo}
data: {train: demo}
train: {steps: 100}
"""


@pytest.mark.parametrize(
    "overrides, keys",
    [
        (["model.path=x", "tokenizer.path=null"], ("model.path", "model.shape")),
        (["model.random_init=true"], ("model.random_init", "model.path")),
        (["model.revision=main"], ("model.revision", "model.path")),
        (["tokenizer.path=null"], ("tokenizer.path",)),
        (["model.shape.num_layers=5", "parallel.pipeline=6"], None),
        (["parallel.tensor=2"], ("model.shape.num_key_value_heads", "parallel.tensor")),
        (["model.shape.ffn_hidden_size=257", "parallel.tensor=3"], None),
        (["model.shape.hidden_size=100"], None),
        (["model.shape.hidden_size=90"], None),
        (["model.shape.num_key_value_heads=4"], None),
        (["packing.capacity=8192"], ("packing.capacity", "model.shape.max_position_embeddings")),
        (["train.epochs=1"], ("train.steps", "train.epochs")),
        (["train.micro_batch_size=3"], ("train.global_batch_size", "train.micro_batch_size")),
        (["optim.min_lr=1"], ("optim.min_lr", "optim.lr")),
        (["optim.warmup_steps=100"], ("optim.warmup_steps", "train.steps")),
        (["optim.warmup_steps=9", "optim.decay_steps=9"], None),
        (["parallel.sequence=true"], ("parallel.sequence", "parallel.tensor")),
        (["parallel.sequence=true", "parallel.tensor=3"], ("packing.capacity", "parallel.tensor")),
        (["parallel.overlap_param_gather=true"], None),
        (["evaluation.every_steps=5"], ("evaluation.every_steps", "data.eval")),
        (["evaluation.exact_match_samples=5"], ("evaluation.exact_match_samples", "data.eval")),
        (["data.eval=demo", "evaluation.exact_match_samples=5", "export.enabled=false"], None),
    ],
)
def test_contradictions_name_their_keys(load, overrides, keys):
    load(SHAPE)
    problem = only_problem(load, SHAPE, *overrides)
    named = {override.split("=")[0] for override in overrides}
    assert named & set(problem.keys)
    if keys is not None:
        assert problem.keys == keys


def test_demo_tokenizer_does_not_fit_a_trained_model(load):
    assert only_problem(load, BASE, "tokenizer.path=demo").keys[0] == "tokenizer.path"


def test_a_config_made_in_python_is_checked_too():
    with pytest.raises(ValueError, match="train.steps"):
        Config.model_validate({"data": {"train": "demo"}, "model": {"path": "x"}})


def test_config_cannot_be_changed():
    config = load_config(None, [])
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 1.0


TOKEN = "hf_" + "aB3dE5gH7jK9" * 3


@pytest.mark.parametrize(
    "text, override",
    [
        (f"hub_token: {TOKEN}\n", ""),
        (f"model_api_key: x{TOKEN}x\n", ""),
        ("", f"data.hf_token={TOKEN}"),
        ("", f"model.path={TOKEN}"),
        ("", f"data.train=https://me:{TOKEN}@example.com/x"),
        (f"data: {TOKEN}\n", ""),
        ("", f"seed={TOKEN}"),
        ("", f"optim.lr.{TOKEN}=1"),
    ],
)
def test_secrets_are_refused_and_never_shown(load, text, override):
    base = (
        BASE if not text.startswith("data:") else BASE.replace("data:\n  train: train.jsonl\n", "")
    )
    with pytest.raises(ConfigError) as caught:
        load(base + text, *([override] if override else []))
    assert TOKEN not in str(caught.value)


def test_secret_key_says_where_secrets_belong(load):
    problem = only_problem(load, BASE + "wandb_api_key: 0123456789\n")
    assert "0123456789" not in str(problem)
    assert "environment" in problem.fix


def test_token_counts_are_no_secrets(load):
    assert load(BASE, "evaluation.max_new_tokens=8").evaluation.max_new_tokens == 8
    problem = only_problem(load, BASE, "model.num_experts_per_token=8")
    assert "environment" not in problem.fix and "=8" in problem.where


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_load_and_survive_saving(path, tmp_path):
    config = load_config(path, [])
    save_config(config, tmp_path / "run" / "config.yaml")
    assert load_config(tmp_path / "run" / "config.yaml", []) == config
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_shipped_files_are_found():
    names = {"demo", "alpaca_smollm2", "multi_turn_messages", "llama3_8b", "primus_style"}
    assert {path.stem for path in SHIPPED} >= names
    assert DEFAULT_CONFIG in SHIPPED


@pytest.mark.parametrize(
    "text",
    ["no", "1e-5", "010", "null", "~~", "1:30", "2024-01-01", "- a", "a: b", "# x", "ä\n b", "*a"],
)
def test_strings_that_look_like_something_else_survive_saving(load, tmp_path, text):
    config = load(BASE).model_copy(update={"output_dir": text})
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml", []).output_dir == text


def test_home_directory_is_expanded(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert load(BASE, "output_dir=~/runs").output_dir == "/home/someone/runs"


def test_every_key_has_a_description():
    for model in [Config, *(type(section) for _, section in load_config(None, []))]:
        for name, info in getattr(model, "model_fields", {}).items():
            is_section = hasattr(info.annotation, "model_fields")
            assert is_section or info.description, f"{model.__name__}.{name}"


def test_import_brings_in_nothing_heavy():
    code = (
        "import sys, sft_fast.registry; from sft_fast.config.schema import load_config;"
        "load_config(None, []);"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'megatron', 'triton'};"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "[]"


def test_alignment_divides_the_row():
    with pytest.raises(ConfigError, match="packing.alignment divides packing.capacity"):
        load_config(None, ["packing.alignment=24"])
    assert load_config(None, ["packing.alignment=32"]).packing.alignment == 32


@pytest.mark.parametrize(
    "overrides, keys",
    [
        (["parallel.context=2"], ("packing.alignment", "parallel.context")),
        (["parallel.context=2", "packing.alignment=2"], ("packing.alignment", "parallel.context")),
        (["parallel.virtual_pipeline=2"], ("parallel.virtual_pipeline", "parallel.pipeline")),
        (["model.recompute=block"], ("model.recompute", "model.recompute_layers")),
        (["model.recompute_layers=2"], ("model.recompute", "model.recompute_layers")),
        (
            ["model.recompute=selective", "model.recompute_layers=2"],
            ("model.recompute", "model.recompute_layers"),
        ),
        (
            ["model.offload_layers=2", "model.recompute=full"],
            ("model.offload_layers", "model.recompute"),
        ),
        (
            ["model.offload_layers=2", "parallel.pipeline=2"],
            ("model.offload_layers", "parallel.pipeline"),
        ),
        (
            ["optim.offload_fraction=0.5", "parallel.distributed_optimizer=false"],
            ("optim.offload_fraction", "parallel.distributed_optimizer"),
        ),
        (
            ["optim.offload_fraction=0.5", "model.dtype=fp32"],
            ("optim.offload_fraction", "model.dtype"),
        ),
        (["evaluation.patience=2"], ("evaluation.patience", "data.eval")),
        (["parallel.warm_restarts=2"], ("parallel.warm_restarts", "checkpoint.every_steps")),
        (
            ["evaluation.best_by=rouge", "data.eval=x.jsonl"],
            ("evaluation.best_by", "evaluation.metrics"),
        ),
        (["export.best=true"], ("export.best", "checkpoint.keep_best")),
        (
            ["checkpoint.keep_best=true", "data.eval=x.jsonl"],
            ("checkpoint.keep_best", "evaluation.every_steps"),
        ),
    ],
)
def test_features_that_exclude_each_other_are_named(load, overrides, keys):
    assert keys in [problem.keys for problem in problems_of(load, BASE, *overrides)]


@pytest.mark.fault("F37")
@pytest.mark.parametrize("value", ["1e12", ".inf"])
@pytest.mark.parametrize(
    "key", ["parallel.hang_timeout_s", "parallel.timeout_minutes", "checkpoint.timeout_minutes"]
)
def test_time_limits_that_no_timer_can_take_are_refused(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=key):
        load_config(None, [f"{key}={value}"])
