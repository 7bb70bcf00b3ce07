import functools
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from config_cases import BASE, line_of, load_text, only_problem, problems_of
from sft_fast.config.schema import load_config
from sft_fast.config.yaml_source import dump_yaml, parse_value, read_yaml


@pytest.fixture
def load(tmp_path):
    return functools.partial(load_text, tmp_path)


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "0.00001", ".00001", "+1e-05"])
def test_every_spelling_of_a_float_is_a_float(load, text):
    assert load(BASE + f"optim: {{lr: {text}}}").optim.lr == 1e-5
    assert load(BASE, f"optim.lr={text}").optim.lr == 1e-5


def test_quoted_number_is_refused_with_the_unquoted_one_as_fix(load):
    problem = only_problem(load, BASE + 'optim:\n  lr: "1e-5"\n')
    assert problem.keys == ("optim.lr",)
    assert problem.fix == "write 1e-5, without quotes"
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
    lines += [
        f"{b}: &{b} [{', '.join(['*' + a] * 9)}]"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ]
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


def test_lines_of_nested_keys(tmp_path):
    path = tmp_path / "lines.yaml"
    path.write_text("a:\n\n  b: [1,\n   2]\n  c: {d: 1,\n      e: 2}\n")
    lines = read_yaml(path).lines
    assert (lines["a",], lines["a", "b"], lines["a", "b", 1]) == (1, 3, 4)
    assert (lines["a", "c", "d"], lines["a", "c", "e"]) == (5, 6)


yaml_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**17), 10**17)
    | st.floats(allow_nan=False)
    | st.text(st.characters(blacklist_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab:# '", min_size=1), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(yaml_values)
@example("\x85")
@example(["a\u2028b", "\ufeff", "\x7f", "\t", " a ", "\r\n"])
def test_dumped_yaml_reads_back_equal(value):
    again = parse_value(dump_yaml(value))
    assert again == value
    assert type(again) is type(value)
