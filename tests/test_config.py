import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_fast.config import (
    DEFAULT_CONFIG,
    Config,
    check_world_size,
    load_config,
    save_config,
)
from sft_fast.config_source import dotted_keys
from sft_fast.errors import ConfigError, nearest_key
from sft_fast.yaml_source import dump_yaml, parse_value, read_yaml

ROOT = Path(__file__).parent.parent
SHIPPED = [*sorted((ROOT / "sft_fast/configs").glob("*.yaml")), *(ROOT / "examples").glob("*.yaml")]

BASE = """\
output_dir: out
model:
  path: some/model
data:
  train: train.jsonl
train:
  steps: 100
"""


@pytest.fixture
def load(tmp_path):
    def load_text(text: str, *overrides: str) -> Config:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, list(overrides))

    return load_text


def problems_of(call, *args):
    with pytest.raises(ConfigError) as caught:
        call(*args)
    return caught.value.problems


def only_problem(call, *args):
    problems = problems_of(call, *args)
    assert len(problems) == 1, [str(problem) for problem in problems]
    return problems[0]


def line_of(problem) -> int:
    return int(re.search(r":(\d+)$", problem.where).group(1))


# YAML: what plain YAML parsers get wrong or let through.


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "0.00001", ".00001", "+1e-05"])
def test_every_spelling_of_a_float_is_a_float(load, text):
    assert load(BASE + f"optim: {{lr: {text}}}").optim.lr == 1e-5
    assert load(BASE, f"optim.lr={text}").optim.lr == 1e-5


def test_quoted_number_is_refused_with_the_unquoted_one_as_fix(load):
    problem = only_problem(load, BASE + 'optim:\n  lr: "1e-5"\n')
    assert problem.keys == ("optim.lr",)
    assert problem.fix == "write 1e-05, without quotes"
    assert line_of(problem) == 9


@pytest.mark.parametrize("word, right", [("yes", "true"), ("off", "false"), ("No", "false")])
def test_yes_and_no_are_words_not_booleans(load, word, right):
    problem = only_problem(load, BASE + f"export: {{enabled: {word}}}")
    assert problem.fix == f"write {right}"
    assert load(BASE, f"data.train_split={word}").data.train_split == word


@pytest.mark.parametrize(
    "value", ["true", "1.0", "1e2", "010", "0x10", "1_000", "1:30", "2024-01-01", "''", "-3", "0"]
)
def test_what_is_no_positive_integer_is_refused(load, value):
    assert only_problem(load, BASE, f"packing.capacity={value}").keys == ("packing.capacity",)


@pytest.mark.parametrize("value", ["true", ".nan", ".inf", "1e999", "0", "-1e-5", "fast"])
def test_what_is_no_learning_rate_is_refused(load, value):
    assert only_problem(load, BASE, f"optim.lr={value}").keys == ("optim.lr",)


def test_integer_stands_for_a_float(load):
    config = load(BASE, "optim.lr=1")
    assert config.optim.lr == 1.0
    assert isinstance(config.optim.lr, float)


def test_duplicate_keys_are_all_reported_with_both_lines(load):
    text = BASE + "seed: 1\nseed: 2\noptim:\n  lr: 1e-3\n  lr: 1e-4\n"
    first, second = problems_of(load, text)
    assert (first.keys, line_of(first)) == (("seed",), 9)
    assert "line 8" in first.found
    assert (second.keys, line_of(second)) == (("optim.lr",), 12)


def test_billion_laughs_is_refused_quickly(load):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi")]
    problem = only_problem(load, "\n".join(lines))
    assert "alias *a" in problem.found
    assert line_of(problem) == 2


def test_merge_keys_and_self_references_are_refused(load):
    for text in ("a: &a {b: *a}", "a: &a {b: 1}\nc:\n  <<: *a\n"):
        assert "alias" in only_problem(load, text).found


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch pwned']",
        "!!python/name:os.system",
        "!!python/object/new:tuple [[1]]",
        "!custom x",
        "!!binary aGk=",
        "!!set {a}",
        "!!timestamp 2024-01-01",
    ],
)
def test_tags_are_refused_and_run_nothing(load, tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    problem = problems_of(load, BASE + f"seed: {value}\n")[0]
    assert "tag" in problem.found
    assert line_of(problem) == 8
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("opening, closing", [("[", "]"), ("{a: ", "}")])
def test_depth_limit(load, opening, closing):
    problem = only_problem(load, f"data: {opening * 10_000}1{closing * 10_000}")
    assert "nested deeper than 20" in problem.found


def test_size_limit(tmp_path):
    path = tmp_path / "big.yaml"
    path.write_text(BASE + "#" * 1_000_000)
    assert "more than 1 MB" in only_problem(load_config, path, []).found


@pytest.mark.parametrize(
    "text, found",
    [
        ("a: [1, 2\nb: 3\n", "parsing a flow sequence"),
        ("a: 1\n\tb: 2\n", "cannot start any token"),
        ("- a\n- b\n", "a list of 2 items"),
        ("just words\n", "the string 'just words'"),
        ("a: 1\n---\nb: 2\n", "document"),
        ("a: \x00\n", "special characters"),
        ("? [a]\n: 1\n", "a key that is a mapping or a list"),
    ],
)
def test_what_is_no_yaml_mapping_is_refused(load, text, found):
    assert found in problems_of(load, text)[0].found


def test_unreadable_files(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"output_dir: caf\xe9\n")
    assert "UTF-8" in only_problem(load_config, tmp_path / "latin.yaml", []).found
    assert "No such file" in only_problem(load_config, tmp_path / "missing.yaml", []).found
    assert "directory" in only_problem(load_config, tmp_path, []).found


def test_empty_file_names_what_is_missing(load):
    keys = {problem.keys for problem in problems_of(load, "# nothing\n")}
    assert keys == {
        ("data.train",),
        ("model.path", "model.shape"),
        ("tokenizer.path",),
        ("train.steps", "train.epochs"),
    }


def test_section_with_all_its_lines_commented_out_has_its_defaults(load):
    assert load(BASE + "optim:\n  # lr: 1e-3\n").optim.lr == 1e-5


@pytest.mark.parametrize("text", ["optim: 3", "optim: [1]", "data: null", "model: tiny"])
def test_section_that_is_no_mapping(load, text):
    section = text.split(":")[0]
    base = re.sub(rf"{section}:\n  .*\n", "", BASE)
    assert any(problem.keys[0].startswith(section) for problem in problems_of(load, base + text))


# Keys.


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
        for typo in {*swaps, *drops, name + "s"} - {k.rpartition(".")[2] for k in known}:
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


# Overrides.


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
    "override", ["optim.lr", "=3", ".lr=3", "optim..lr=1", "optim.lr.peak=1", "seed=[1", "seed=!x 1"]
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


# Keys that must fit together.

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
        (["model.shape.num_layers=5", "parallel.pipeline=2"], None),
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


# Ranks.


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
def test_world_size(load, world_size, overrides, expected):
    config = load(SHAPE, *overrides)
    if expected is not None:
        assert check_world_size(config, world_size) == expected
        return
    problem = only_problem(check_world_size, config, world_size)
    assert "--nproc-per-node" in problem.fix
    is_layout = problem.keys == ("parallel.tensor", "parallel.pipeline")
    assert is_layout or problem.keys == ("train.global_batch_size", "train.micro_batch_size")


def test_batch_size_that_the_message_names_works(load):
    config = load(SHAPE, "train.global_batch_size=10")
    fix = only_problem(check_world_size, config, 4).fix
    better = re.search(r"train\.global_batch_size=\d+", fix).group()
    assert check_world_size(load(SHAPE, better), 4) == 4


# Secrets.

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
    base = BASE if not text.startswith("data:") else BASE.replace("data:\n  train: train.jsonl\n", "")
    with pytest.raises(ConfigError) as caught:
        load(base + text, *([override] if override else []))
    assert TOKEN not in str(caught.value)


def test_secret_key_says_where_secrets_belong(load):
    problem = only_problem(load, BASE + "wandb_api_key: 0123456789\n")
    assert "0123456789" not in str(problem)
    assert "environment" in problem.fix


def test_token_counts_are_no_secrets(load):
    assert load(BASE, "evaluation.max_new_tokens=8").evaluation.max_new_tokens == 8


# Saving.


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


yaml_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**17), 10**17)
    | st.floats(allow_nan=False)
    | st.text(st.characters(blacklist_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab:# '", min_size=1), inner),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(yaml_values)
def test_dumped_yaml_reads_back_equal(value):
    again = parse_value(dump_yaml(value))
    assert again == value
    assert type(again) is type(value)


def test_home_directory_is_expanded(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert load(BASE, "output_dir=~/runs").output_dir == "/home/someone/runs"


def test_lines_of_nested_keys(tmp_path):
    path = tmp_path / "lines.yaml"
    path.write_text("a:\n\n  b: [1,\n   2]\n  c: {d: 1,\n      e: 2}\n")
    lines = read_yaml(path).lines
    assert (lines["a",], lines["a", "b"], lines["a", "b", 1]) == (1, 3, 4)
    assert (lines["a", "c", "d"], lines["a", "c", "e"]) == (5, 6)


def test_every_key_has_a_description():
    for model in [Config, *(type(section) for _, section in load_config(None, []))]:
        for name, info in getattr(model, "model_fields", {}).items():
            is_section = hasattr(info.annotation, "model_fields")
            assert is_section or info.description, f"{model.__name__}.{name}"


def test_import_brings_in_nothing_heavy():
    code = (
        "import sys, sft_fast.config, sft_fast.registry; sft_fast.config.load_config(None, []);"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'megatron', 'triton'};"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "[]"
