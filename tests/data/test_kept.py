"""Parts of an answer that a chat template leaves out: found in the sample, or refused by name."""

from collections.abc import Callable
from typing import Any

import pytest

from masks import chat, marked, sample_of, samples_of
from sft_fast.data.conversation import Conversation, Message
from sft_fast.data.kept import check_answer
from sft_fast.data.render import ChatRenderer

MakeTokenizer = Callable[..., Any]


def template(answer: str, prompt: str = "") -> str:
    """A template that writes an assistant's turn as `answer` says."""
    return (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
        "{%- if m.role == 'assistant' %}" + answer + "{%- else %}{{- m.content }}{%- endif %}"
        "{{- '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n" + prompt + "' }}{% endif %}"
    )


CALLS = "{%- for c in m.tool_calls %}{{- '<call>' + c.function | tojson + '</call>' }}{%- endfor %}"
CALLS_ONLY = "{%- if m.tool_calls %}" + CALLS + "{%- else %}{{- m.content }}{%- endif %}"
CONTENT_WINS = "{%- if m.content %}{{- m.content }}{%- else %}" + CALLS + "{%- endif %}"
FIRST_CALL = "{{- m.content }}" + CALLS.replace("m.tool_calls", "m.tool_calls[:1]")
NAMES_ONLY = "{{- m.content }}" + CALLS.replace("c.function | tojson", "c.function.name")
TEXT_ARGUMENTS = "{{- m.content }}" + CALLS.replace(
    "c.function | tojson", "c.function.name + ' ' + c.function.arguments"
)
XML = "{{- m.content }}" + CALLS.replace(
    "c.function | tojson", "c.function.name + '(' + c.function.arguments.city | escape + ')'"
)
EVERYTHING = "{{- m.content }}" + CALLS
CUTS_THINK = "{{- m.content.split('</think>')[-1] }}"
MOVES_THINK = (
    "{%- if '</think>' in m.content %}"
    "{{- '[R]' + m.content.split('</think>')[0].split('<think>')[-1] | trim + '[/R]' }}"
    "{%- endif %}{{- m.content.split('</think>')[-1] | trim }}"
)
MERGES_THINK = "{{- m.content | replace('<think>', '') | replace('</think>', '') }}"
THOUGHT = chat("3+4?", "<think>\n3 and 4 make 7.\n</think>\n\nIt is 7.")


def call(name: str = "rain", **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calling(text: str, *calls: dict[str, Any]) -> Conversation:
    return Conversation((Message("user", "q"), Message("assistant", text, tool_calls=calls)))


@pytest.mark.parametrize(
    ("answer", "conversation", "message"),
    [
        (CALLS_ONLY, calling("I look.", call(city="Ulm")), "turn 2: .* a part of.*'I look.'"),
        (CONTENT_WINS, calling("I look.", call(city="Ulm")), "leaves out the tool call 'rain'"),
        # The text names what is missing.
        (CONTENT_WINS, calling("rain Ulm city", call(city="Ulm")), "out the tool call 'rain'"),
        (CALLS_ONLY, calling("Ulm", call(city="Ulm")), "value 'Ulm' of the tool call"),
        (FIRST_CALL, calling("", call(city="Ulm"), call(city="Bonn")), "out 1 of 2 tool calls"),
        (FIRST_CALL, calling("", call(city="Ulm"), call(city="Ulm")), "out 1 of 2 tool calls"),
        (FIRST_CALL, calling("", call(), call("rainy")), "leaves out the tool call 'rainy'"),
        (FIRST_CALL, calling("", call("rainy"), call()), "leaves out the tool call 'rain'"),
        (NAMES_ONLY, calling("", call(city="Ulm")), "leaves out the argument 'city'"),
        (NAMES_ONLY, calling("city", call(city=[{"n": 7}])), "leaves out the argument 'city'"),
        (CUTS_THINK, THOUGHT, "the reasoning in front of an answer, '3 and 4 make 7.'"),
        # The tag alone: the generation prompt of the model has written the other one.
        (CUTS_THINK, chat("q", "hm\n</think>\n\na"), "the reasoning in front of an answer, 'hm'"),
        (MOVES_THINK, chat("q", "Well. <think>hm</think>a"), "reasoning in front.*'Well.'"),
        (MERGES_THINK, chat("q", "<think>hm</think>a"), "leaves out the tags between the reason"),
        ("{{- m.content[:3] }}", chat("q", "whole"), "a part of an answer, 'whole'"),
        ("{{- m.content | lower }}", chat("q", "Whole"), "a part of an answer, 'Whole'"),
    ],
)
def test_what_a_template_drops_is_refused_by_name(
    make_tokenizer: MakeTokenizer, answer: str, conversation: Conversation, message: str
) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}.*tokenizer.chat_template"):
        sample_of(make_tokenizer(template(answer)), conversation)


@pytest.mark.parametrize(
    ("answer", "conversation", "trained"),
    [
        (
            EVERYTHING,
            calling("I look.", call(city="Ulm"), call(city="Ulm")),
            "I look." + 2 * '<call>{"name": "rain", "arguments": {"city": "Ulm"}}</call>',
        ),
        (
            EVERYTHING,
            calling("", call(text='a "b"\n\\é', n=1.5, on=True, none=None, deep={"x": ["y", 2]})),
            '<call>{"name": "rain", "arguments": {"text": "a \\"b\\"\\n\\\\é", "n": 1.5, '
            '"on": true, "none": null, "deep": {"x": ["y", 2]}}}</call>',
        ),
        (TEXT_ARGUMENTS, calling("", call(city="Ülm")), '<call>rain {"city": "Ülm"}</call>'),
        (XML, calling("", {"function": {"name": "city", "arguments": {"city": "a<b>"}}}), None),
        (CALLS_ONLY, calling("", call(city="Ulm")), None),
        (MOVES_THINK, THOUGHT, "[R]3 and 4 make 7.[/R]It is 7."),
        (MOVES_THINK, chat("q", "<think>\n\n</think>\n\na"), "[R][/R]a"),
        ("{{- m.content | trim }}", chat("q", "\n  a \n"), "a"),
        ("{{- m.content | tojson }}", chat("q", "a\n'b' é"), "\"a\\n'b' é\""),
    ],
)
def test_what_a_template_keeps_in_its_own_way_is_trained(
    make_tokenizer: MakeTokenizer, answer: str, conversation: Conversation, trained: str | None
) -> None:
    tokenizer = make_tokenizer(template(answer))
    text = marked(tokenizer, sample_of(tokenizer, conversation))
    assert trained is None or text.endswith(f"[[{trained}<|im_end|>]]")


def test_turns_that_are_not_trained_may_lose_their_reasoning(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(template(CUTS_THINK))
    turns = (*THOUGHT.messages, *chat("and 5?", "12").messages)
    whole = marked(tokenizer, sample_of(tokenizer, Conversation(turns), train_on="last_turn"))
    assert "make 7" not in whole and whole.endswith("[[12<|im_end|>]]")


@pytest.mark.parametrize("changing_history", ["error", "expand"])
@pytest.mark.parametrize("conversation", [THOUGHT, chat("a", "b", "c", "d")])
def test_a_generation_prompt_that_no_answer_follows_gets_no_advice_that_fails(
    make_tokenizer: MakeTokenizer, conversation: Conversation, changing_history: str
) -> None:
    tokenizer = make_tokenizer(template(CUTS_THINK, "<think>\\n"))
    with pytest.raises(ValueError, match="other text with its generation prompt") as caught:
        samples_of(tokenizer, conversation, changing_history=changing_history)
    assert "<think>" in str(caught.value) and "changing_history" not in str(caught.value)
    assert "tokenizer.chat_template" in str(caught.value)


def test_reasoning_and_content_that_are_the_same_must_both_be_there() -> None:
    thought = Message("assistant", "7", extra={"reasoning_content": "7"})
    check_answer(thought, "<think>7</think>7")
    for answer in ("7", "<think>7</think>", "<think></think>7"):
        with pytest.raises(ValueError, match="leaves out"):
            check_answer(thought, answer)


SPACES = pytest.mark.parametrize("content", ["b", " b", "\n b", "b \n", " b  "])


@SPACES
@pytest.mark.parametrize("swallowing", ["<|im_start|>", "<|go|>", "<|im_end|>"])
@pytest.mark.parametrize("sides", [("lstrip",), ("rstrip",), ("lstrip", "rstrip")])
def test_a_special_token_of_the_template_is_not_trained_for_the_space_it_swallows(
    make_tokenizer: MakeTokenizer, swallowing: str, sides: tuple[str, ...], content: str
) -> None:
    from tokenizers import AddedToken

    tokenizer = make_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}<|go|>{{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|go|>{% endif %}",
        special=["<|go|>"],
    )
    token = AddedToken(swallowing, special=True, **dict.fromkeys(sides, True))
    tokenizer.add_tokens([token], special_tokens=True)
    sample = sample_of(tokenizer, chat("a", content, "c", content))
    before, after = tokenizer.convert_tokens_to_ids(["<|go|>", "<|im_end|>"])
    ids, trained = sample.input_ids, sample.supervised
    assert not trained[ids == before].any()
    # The user's end of turn, the assistant's, and once more.
    assert trained[ids == after].tolist() == [False, True, False, True]
    spans = marked(tokenizer, sample).split("[[")[1:]
    assert [span.split("]]")[0].replace("<|im_end|>", "").strip() for span in spans] == ["b", "b"]


def test_characters_that_the_tokenizer_does_not_know_are_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "a", "b", "<unk>x"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' </s> ' }}{% endfor %}"
    assert sample_of(tokenizer, chat("?", "a b")).input_ids.tolist() == [0, 1, 2, 3, 1]
    with pytest.raises(ValueError, match="no token for '🎉' of an answer"):
        sample_of(tokenizer, chat("a", "b 🎉"))


def test_keys_that_the_template_does_not_read_are_named_and_channels_stop(
    make_tokenizer: MakeTokenizer,
) -> None:
    def answer(**extra: Any) -> Conversation:
        return Conversation((Message("user", "q"), Message("assistant", "a", extra=extra)))

    renderer = ChatRenderer(make_tokenizer(template("{{- m.content + (m.mood or '') }}")))
    assert renderer.unread_keys(answer(mood="!", id=1, at="x")) == ("at of turns", "id of turns")
    renderer.render(answer(channel="final", recipient="all"))
    for extra in ({"channel": "analysis"}, {"recipient": "functions.rain"}):
        with pytest.raises(ValueError, match=r"turn 2 has .* does not read.*\(train: false\)"):
            renderer.render(answer(**extra))
        reads = ChatRenderer(make_tokenizer(template("{{- m.channel ~ m.recipient ~ m.content }}")))
        reads.render(answer(**extra))
        whole = ChatRenderer(make_tokenizer(template("{{- m | tojson }}")))
        assert whole.unread_keys(answer(**extra)) == ()
        context = (*answer(**extra).messages[:1], Message("assistant", "a", False, extra=extra))
        renderer.render(Conversation((*context, *chat("q", "a").messages)))
