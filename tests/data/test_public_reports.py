"""Public bug reports of other trainers: each kind once, with what is right here.

Where the folder of shapes stands beside the checkout, the inputs behind them are read as well.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from masks import marked
from sft_fast.data.build import BuildOptions, build_store
from sft_fast.data.formats import ConversationReader
from sft_fast.data.json_records import SourceRecord
from sft_fast.data.render import ChatRenderer, MaskOptions
from sft_fast.data.source import Source, load_records

MakeTokenizer = Callable[..., Any]
BUGS = Path(__file__).resolve().parents[2] / ".." / "shared" / "shapes" / "bugs"
USER = "{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}"
END = "{{- '<|im_end|>\\n' }}"


def template(answer: str, prompt: str = "", before: str = "") -> str:
    return (
        f"{before}{{%- for m in messages %}}{{%- if m.role != 'assistant' %}}{USER}"
        "{%- else %}{{- '<|im_start|>assistant\\n' }}" + answer + END + "{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n" + prompt + "' }}{% endif %}"
    )


CALLS = "{%- for c in m.tool_calls or [] %}{{- '<c>' + c.function | tojson }}{%- endfor %}"
PLAIN = template("{{- m.content }}" + CALLS)
CUT = "{{- m.content.split('</think>')[-1] }}"
OLD_CALL = "{{- '<c>' + m.tool_calls[0].function.name + m.tool_calls[0].function.arguments }}"


def turns(answer: Any = "a", **keys: Any) -> dict[str, Any]:
    assistant = {"role": "assistant", "content": answer, **keys}
    return {"messages": [{"role": "user", "content": "q"}, assistant]}


def call(arguments: Any, key: str = "arguments") -> dict[str, Any]:
    return {"type": "function", "function": {"name": "rain", key: arguments}}


def trained(
    make_tokenizer: MakeTokenizer, row: dict[str, Any], chat_template: str, **options: Any
) -> list[str]:
    """The trained runs of a record's samples, end-of-turn tokens included."""
    tokenizer = make_tokenizer(chat_template, **options)
    renderer = ChatRenderer(tokenizer, MaskOptions())
    conversation = ConversationReader("auto")(SourceRecord(row, "rows.jsonl", 1))
    texts = [marked(tokenizer, s) for s in renderer.tokenize(renderer.render_samples(conversation))]
    return [run.split("]]")[0] for text in texts for run in text.split("[[")[1:]]


ULM = '<c>{"name": "rain", "arguments": {"city": "Ulm"}}'
TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {}}}]


@pytest.mark.parametrize(
    ("reference", "row", "chat_template", "expected"),
    [
        # Without {% generation %} all tokens were trained, or none.
        ("NVIDIA-NeMo/Megatron-Bridge#3359", turns(), PLAIN, ["a<|im_end|>"]),
        ("marin-community/marin#7237", turns(), PLAIN, ["a<|im_end|>"]),
        # The first token of an answer was lost.
        ("OpenRLHF/OpenRLHF#973", turns("hello world"), PLAIN, ["hello world<|im_end|>"]),
        # Arguments as text were encoded twice, or stopped the run where types differ.
        (
            "axolotl-ai-cloud/axolotl#3136",
            turns("", tool_calls=[call('{"city": "Ulm"}')]),
            PLAIN,
            [ULM + "<|im_end|>"],
        ),
        (
            "oumi-ai/oumi#2599",
            turns("", tool_calls=[call('{"city": "Ulm"}'), call({"city": "Ulm"})]),
            PLAIN,
            [ULM * 2 + "<|im_end|>"],
        ),
        # A template that joins texts met an object.
        (
            "ml-explore/mlx-lm#1065",
            turns("", tool_calls=[call({"city": "Ulm"})]),
            template(OLD_CALL),
            ['<c>rain{"city": "Ulm"}<|im_end|>'],
        ),
        # A turn of calls has no content.
        (
            "huggingface/transformers#45290",
            {"messages": [turns()["messages"][0], {"role": "assistant", "tool_calls": [call({})]}]},
            PLAIN,
            ['<c>{"name": "rain", "arguments": {}}<|im_end|>'],
        ),
        # The record's variables did not reach the template.
        (
            "axolotl-ai-cloud/axolotl#2658",
            {**turns(), "chat_template_kwargs": {"enable_thinking": False}},
            template("{{- '<none>' if not enable_thinking }}{{- m.content }}"),
            ["<none>a<|im_end|>"],
        ),
    ],
)
def test_what_was_trained_wrongly_is_right(
    make_tokenizer: MakeTokenizer,
    reference: str,
    row: dict[str, Any],
    chat_template: str,
    expected: list[str],
) -> None:
    assert trained(make_tokenizer, row, chat_template) == expected, reference


@pytest.mark.parametrize(
    ("reference", "row", "chat_template", "message"),
    [
        # A template writes the content or the calls.
        (
            "huggingface/trl#6766",
            turns("I look.", tool_calls=[call({})]),
            template("{%- if m.content %}{{- m.content }}{%- else %}" + CALLS + "{%- endif %}"),
            "leaves out the tool call 'rain'",
        ),
        # A template writes one call of several.
        (
            "huggingface/trl#5109",
            turns("", tool_calls=[call({"city": "Ulm"}), call({"city": "Bonn"})]),
            template(CALLS.replace("m.tool_calls or []", "m.tool_calls[:1]")),
            "leaves out 1 of 2 tool calls 'rain'",
        ),
        # A template cuts off the reasoning that was to be learnt.
        (
            "huggingface/open-r1#585",
            turns("<think>hm</think>a"),
            template(CUT),
            "leaves out the reasoning in front of an answer, 'hm'",
        ),
        # A generation prompt opens the reasoning, and the answers do not continue it.
        (
            "hiyouga/LlamaFactory#6987",
            turns("a"),
            template(CUT, "<think>\\n"),
            "other text with its generation prompt than with an answer behind it",
        ),
        # The tools on offer did not reach the text.
        (
            "NVIDIA-NeMo/Megatron-Bridge#4072",
            {**turns(), "tools": TOOLS},
            PLAIN,
            "leaves out the tool 'rain'",
        ),
        # Two BOS tokens, from the template and from the tokenizer.
        (
            "huggingface/alignment-handbook#127",
            turns(),
            template("{{- m.content }}", before="{{- bos_token + bos_token }}"),
            "starts with two BOS tokens",
        ),
    ],
)
def test_what_was_lost_in_silence_is_refused(
    make_tokenizer: MakeTokenizer,
    reference: str,
    row: dict[str, Any],
    chat_template: str,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        trained(make_tokenizer, row, chat_template)


def test_the_end_of_turn_is_learnt_where_it_is_the_padding_too(
    make_tokenizer: MakeTokenizer,
) -> None:
    """huggingface/trl#1623: a token that is padding and EOS was masked in the answers."""
    ended = PLAIN.replace("<|im_end|>", "</s>")
    assert trained(make_tokenizer, turns(), ended, pad_token="</s>") == ["a</s>"]


def test_padding_of_tables_does_not_reach_the_prompt(
    make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    """modelscope/ms-swift#6467: tools had the parameters of all other tools, null."""
    from datasets import Dataset

    def tool(name: str) -> dict[str, Any]:
        properties = {f"of_{name}": {"type": "string"}}
        return {"function": {"name": name, "parameters": {"properties": properties}}}

    rows = [{**turns(), "tools": [tool("rain")]}, {**turns(), "tools": [tool("sun")]}]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    tokenizer = make_tokenizer(template("{{- m.content }}", before="{{- tools | tojson }}"))
    source = Source(load_records(str(tmp_path / "rows.parquet")))
    store = build_store(source, tokenizer, BuildOptions(512), tmp_path / "store")
    texts = [tokenizer.decode(store.sample(number)[0].tolist()) for number in range(2)]
    assert ["of_sun" in text for text in texts] == [False, True]
    assert not any("null" in text for text in texts)


def test_turns_before_a_cut_are_still_trained(
    make_tokenizer: MakeTokenizer, write_rows: Callable[..., str], tmp_path: Path
) -> None:
    """OpenRLHF/OpenRLHF#1324: a long last question took the answers before it along."""
    chat = turns("short")["messages"] + [{"role": "user", "content": "hello " * 200}]
    tokenizer = make_tokenizer(PLAIN)
    options = BuildOptions(64, over_length="truncate_right")
    source = Source(load_records(write_rows([{"messages": chat}])))
    tokens, supervised = build_store(source, tokenizer, options, tmp_path / "store").sample(0)
    assert tokenizer.decode(tokens[supervised].tolist()) == "short<|im_end|>"


def test_evaluation_files_beside_the_training_files_are_not_trained(tmp_path: Path) -> None:
    """marin-community/marin#2381 and huggingface/datasets#4895."""
    for name in ("data/train.jsonl", "data/test.jsonl", "data/validation/part.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"question": name, "answer": "a"}))
    records = load_records(str(tmp_path / "data"))
    assert [record.values["question"] for record in records] == ["data/train.jsonl"]
    found = load_records(str(tmp_path / "data"), evaluation=True)
    assert [record.values["question"] for record in found] == ["data/validation/part.jsonl"]


needs_bugs = pytest.mark.skipif(not BUGS.is_dir(), reason="no folder of shapes beside the checkout")


@needs_bugs
@pytest.mark.parametrize(
    ("name", "template_name", "expected"),
    [
        ("args_text", "string_arguments", '{"city": "Oslo"}'),
        ("args_nan", "calls_and_content", ValueError("NaN")),
        ("args_twice", "calls_and_content", ValueError("'city' occurs twice")),
        ("call_parameters", "calls_and_content", '"arguments": {"city": "Oslo"}'),
        ("sharegpt_parameters", "calls_and_content", '"arguments": {"city": "Oslo"}'),
        ("call_with_text", "calls_and_content", "Let me look that up.<tool_call>"),
        ("call_with_text", "calls_only", ValueError("'Let me look that up.'")),
        ("call_with_text", "content_wins", ValueError("the tool call 'get_weather'")),
        ("think_inline", "cuts_think", ValueError("'3 and 4 make 7.'")),
        ("think_inline", "cuts_think_prompt", ValueError("its generation prompt")),
        ("template_kwargs", "thinking_switch", "The answer is 7.<|im_end|>"),
        # Read by `datasets` of every age, and by the types of a column.
        ("category.parquet", "calls_and_content", "The answer is 0."),
        ("dictionary.parquet", "calls_and_content", "Red."),
        ("large.parquet", "calls_and_content", "The answer is 0."),
        ("old_list.parquet", "calls_and_content", "The answer is 0."),
        ("old_sequence.parquet", "calls_and_content", "The answer is 0."),
    ],
)
def test_an_input_behind_a_report(
    make_tokenizer: MakeTokenizer, name: str, template_name: str, expected: Any
) -> None:
    chat_template = (BUGS / "templates" / f"{template_name}.jinja").read_text(encoding="utf-8")
    records = load_records(str(BUGS / (name if "." in name else f"{name}.jsonl")))
    if isinstance(expected, ValueError):
        with pytest.raises(ValueError, match=str(expected)):
            trained(make_tokenizer, next(iter(records)).values, chat_template)
        return
    runs = trained(make_tokenizer, next(iter(records)).values, chat_template)
    assert expected in "".join(runs)


@needs_bugs
@pytest.mark.parametrize(
    ("name", "mask", "learnt"),
    [
        ("split_calls", MaskOptions(train_tool_calls=False), ["I am fine."] * 6 + ["As you like."]),
        ("split_developer", MaskOptions("last_turn"), None),
    ],
)
def test_an_input_behind_a_report_is_split(
    make_tokenizer: MakeTokenizer,
    tmp_path: Path,
    name: str,
    mask: MaskOptions,
    learnt: list[str] | None,
) -> None:
    records = load_records(str(BUGS / f"{name}.jsonl"))
    tokenizer = make_tokenizer((BUGS / "templates/calls_and_content.jinja").read_text())
    options = BuildOptions(300, over_length="split_turns", mask=mask)
    store = build_store(Source(records), tokenizer, options, tmp_path / "store")
    texts = []
    for number in range(store.num_samples):
        tokens, supervised = store.sample(number)
        texts.append(tokenizer.decode(tokens[supervised].tolist()).removesuffix("<|im_end|>"))
        if name == "split_developer":
            assert "Answer briefly." in tokenizer.decode(tokens.tolist())
    if learnt is None:
        last = next(iter(records)).values["messages"][-1]
        learnt = [last["content"]]
    assert sorted(texts) == sorted(learnt)


@needs_bugs
def test_directories_behind_reports() -> None:
    mixed = load_records(str(BUGS / "mixed_names"))
    assert [Path(name).name for name in mixed.left_out] == ["extra.jsonl"]
    nested = load_records(str(BUGS / "nested_dev"))
    assert [Path(name).parent.name for name in nested.files] == ["dev-tools", "general"]


@needs_bugs
def test_a_token_of_the_answer_that_swallows_spaces_is_learnt(
    make_tokenizer: MakeTokenizer,
) -> None:
    from tokenizers import AddedToken

    tokenizer = make_tokenizer((BUGS / "templates/calls_and_content.jinja").read_text())
    token = AddedToken("<|tag|>", special=True, lstrip=True, rstrip=True)
    tokenizer.add_tokens([token], special_tokens=True)
    renderer, reader = ChatRenderer(tokenizer), ConversationReader("auto")
    for row in load_records(str(BUGS / "tagged.jsonl")):
        (sample,) = renderer.tokenize(renderer.render_samples(reader(row)))
        learnt = marked(tokenizer, sample).split("[[")[1]
        assert learnt.startswith("<|tag|>The answer is ")
        assert learnt.endswith(".<|tag|><|im_end|>]]")


@needs_bugs
def test_an_answer_longer_than_a_pack_is_cut_and_counted_or_refused(
    make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    records = load_records(str(BUGS / "long_answer.jsonl"))
    tokenizer = make_tokenizer(PLAIN)
    cut = BuildOptions(64, over_length="truncate_right")
    store = build_store(Source(records), tokenizer, cut, tmp_path / "cut")
    tokens, supervised = store.sample(0)
    assert len(tokens) == 64 and supervised[-1]
    assert store.report.truncated == 1
    with pytest.raises(ValueError, match="1 of 1 samples .*longer than packing.capacity"):
        build_store(Source(records), tokenizer, BuildOptions(64), tmp_path / "refused")
    with pytest.raises(ValueError, match="no sample .* 1 too long"):
        split = BuildOptions(64, over_length="split_turns")
        build_store(Source(records), tokenizer, split, tmp_path / "split")


@needs_bugs
def test_a_share_of_few_records_that_holds_out_none_is_named() -> None:
    _, held_out = load_records(str(BUGS / "nine.jsonl")).hold_out(1e-6)
    with pytest.raises(ValueError, match="holds out none of the 9 records"):
        list(held_out)
