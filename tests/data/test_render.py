from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from masks import chat, marked, sample_of
from sft_fast.data.conversation import Conversation, Message
from sft_fast.data.render import ChatRenderer
from sft_fast.data.templates import CHATML_TEMPLATE, TEMPLATE_DATE, freeze_clock
from sft_fast.data.tokenizer import load_tokenizer

MakeTokenizer = Callable[..., Any]

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
GENERATION = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}%s{% endgeneration %}%s"
    "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and not loop.last %}(an answer)"
    "{% else %}{{ message.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


HAND_WRITTEN = [
    (
        None,
        chat("hi", "hello world"),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[[hello world<|im_end|>]]",
    ),
    (
        None,
        chat("a", "b", "c", "d", system="s"),
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\n[[b<|im_end|>]]\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n[[d<|im_end|>]]",
    ),
    (
        None,
        chat("你好", "你好，世界 👩‍👩‍👧!\n🎉"),
        "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
        "[[你好，世界 👩‍👩‍👧!\n🎉<|im_end|>]]",
    ),
    (
        None,
        chat("a", " b \n"),
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[ b \n<|im_end|>]]",
    ),
    (
        LLAMA3,
        chat("hi", "hello", "🎉 again", "yes"),
        "<s><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[hello<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\n🎉 again<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[yes<|eot_id|>]]",
    ),
]


@pytest.mark.parametrize(("template", "conversation", "expected"), HAND_WRITTEN)
def test_hand_written_masks(
    make_tokenizer: MakeTokenizer,
    template: str | None,
    conversation: Conversation,
    expected: str,
) -> None:
    tokenizer = make_tokenizer(template)
    assert marked(tokenizer, sample_of(tokenizer, conversation)) == expected


def test_tokens_are_those_of_transformers_up_to_the_last_end_of_turn(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(LLAMA3)
    conversation = chat("hi", "hello", "how are you", "fine")
    messages = [message.as_dict() for message in conversation.messages]
    expected = tokenizer.apply_chat_template(messages, return_dict=False)
    assert sample_of(tokenizer, conversation).input_ids.tolist() == expected


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=6))
def test_any_text_is_supervised_exactly(make_tokenizer: MakeTokenizer, contents: list[str]) -> None:
    tokenizer = make_tokenizer()
    conversation = chat(*contents[: len(contents) // 2 * 2])
    sample = sample_of(tokenizer, conversation)
    answers = [message.content + "<|im_end|>" for message in conversation.messages[1::2]]
    supervised = tokenizer.decode(sample.input_ids[sample.supervised].tolist())
    assert sample.supervised[-1]
    # An answer that starts with a newline shares its first token with the prompt's newline.
    assert len(supervised) == len("".join(answers)) + sample.boundary_tokens
    assert supervised.replace("\n", "") == "".join(answers).replace("\n", "")
    if not sample.boundary_tokens:
        assert supervised == "".join(answers)


def test_token_over_the_start_of_an_answer_is_supervised_and_counted(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer()
    assert len(tokenizer("\n\n").input_ids) == 1
    sample = sample_of(tokenizer, chat("hi", "\nhello"))
    assert sample.boundary_tokens == 1
    assert marked(tokenizer, sample).endswith("<|im_start|>assistant[[\n\nhello<|im_end|>]]")


def test_weight_zero_turn_is_context_and_the_tail_behind_the_last_answer_is_cut(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer()
    turns = (
        Message("user", "a"),
        Message("assistant", "b", train=False),
        Message("user", "c"),
        Message("assistant", "d"),
        Message("user", "tail"),
        Message("assistant", "e", train=False),
    )
    assert marked(tokenizer, sample_of(tokenizer, Conversation(turns))) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[[d<|im_end|>]]"
    )


def test_answer_may_come_first(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    turns = (Message("assistant", "a"), Message("user", "b"), Message("assistant", "c"))
    assert marked(tokenizer, sample_of(tokenizer, Conversation(turns))) == (
        "<|im_start|>assistant\n[[a<|im_end|>]]\n<|im_start|>user\nb<|im_end|>\n"
        "<|im_start|>assistant\n[[c<|im_end|>]]"
    )


def test_eos_is_put_where_the_template_ends_no_turn(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(PLAIN)
    sample = sample_of(tokenizer, chat("a", "world", "b", "you"))
    # " world" and " you" are single tokens: they belong to the answers.
    assert marked(tokenizer, sample) == (
        "user: a\nassistant:[[ world]]\nuser: b\nassistant:[[ you</s>]]"
    )
    assert sample.boundary_tokens == 2
    without_eos = make_tokenizer(PLAIN, eos_token=None)
    with pytest.raises(ValueError, match="no EOS token, so the model could not learn to stop"):
        sample_of(without_eos, chat("a", "hello"))


@pytest.mark.parametrize(
    ("inside", "behind"),
    [("", "<|im_end|>\n"), ("<|im_end|>\n", ""), ("<|im_end|>", "{{ '\\n' }}")],
)
def test_generation_marks_are_used_and_extended_over_the_end_of_turn(
    make_tokenizer: MakeTokenizer, inside: str, behind: str
) -> None:
    tokenizer = make_tokenizer(GENERATION.replace("%s", inside, 1).replace("%s", behind, 1))
    assert marked(tokenizer, sample_of(tokenizer, chat("a", "b", "c", "d"))) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[[d<|im_end|>]]"
    )


def test_template_that_changes_earlier_turns_is_refused_with_the_place(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(FORGETFUL)
    assert sample_of(tokenizer, chat("a", "b")).supervised[-1]
    with pytest.raises(ValueError) as caught:
        sample_of(tokenizer, chat("a", "first", "c", "second"))
    message = str(caught.value)
    assert "turns 1 to 2" in message
    assert "first" in message and "(an answer)" in message
    assert "{% generation %}" in message


def test_generation_prompt_must_be_what_the_answer_follows(make_tokenizer: MakeTokenizer) -> None:
    template = CHATML_TEMPLATE.replace("<|im_start|>assistant\\n' }}", "<|im_start|>model\\n' }}")
    assert template != CHATML_TEMPLATE
    with pytest.raises(ValueError, match="turns 1 to 1 with the generation prompt"):
        sample_of(make_tokenizer(template), chat("a", "b"))


@pytest.mark.parametrize(
    ("template", "conversation", "message"),
    [
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}</s>{% endfor %}",
            chat("a", "b", system="be brief"),
            r"leaves out turn 1 \(system\)",
        ),
        (
            "{{ raise_exception('only users here') }}",
            chat("a", "b"),
            "refuses the conversation: only users here",
        ),
        (
            "{% for m in messages %}{{ m.content if m.role == 'user' }}</s>{% endfor %}",
            chat("a", "b"),
            "renders an answer as nothing",
        ),
        (
            "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}</s>{% endfor %}",
            chat("a", "b"),
            "two BOS tokens",
        ),
        (None, chat("a<|im_start|>system", "b"), r"turn 1 \(user\) contains the control token"),
        (None, chat("a", "b</s>"), r"turn 2 \(assistant\) contains the control token '</s>'"),
    ],
)
def test_conversation_that_cannot_be_rendered_faithfully(
    make_tokenizer: MakeTokenizer,
    template: str | None,
    conversation: Conversation,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        sample_of(make_tokenizer(template), conversation)


def test_tools_and_calls_must_reach_the_text(make_tokenizer: MakeTokenizer) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    turns = (Message("user", "rain?"), Message("assistant", "", tool_calls=(call,)))
    tokenizer = make_tokenizer(CHATML_TEMPLATE)
    assert marked(tokenizer, sample_of(tokenizer, Conversation(turns))).endswith(
        '[[<tool_call>{"name": "weather", "arguments": {"city": "Bonn"}}</tool_call><|im_end|>]]'
    )
    with pytest.raises(ValueError, match="leaves out the tool call 'weather'"):
        sample_of(make_tokenizer(LLAMA3), Conversation(turns))
    forged = {"function": {"name": "weather", "arguments": {"city": "<|im_end|>"}}}
    turns = (turns[0], Message("assistant", "", tool_calls=(forged,)))
    with pytest.raises(ValueError, match=r"turn 2 .* contains the control token '<\|im_end\|>'"):
        sample_of(tokenizer, Conversation(turns))
    with_tools = Conversation(chat("a", "b").messages, tools=({"name": "weather"},))
    assert "Tools:\n" in marked(tokenizer, sample_of(tokenizer, with_tools))
    with pytest.raises(ValueError, match="leaves out the tool 'weather'"):
        sample_of(make_tokenizer(LLAMA3), with_tools)


def test_template_that_does_not_compile_is_named(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(ValueError, match="chat template does not compile, line 2"):
        ChatRenderer(make_tokenizer("{{ 1 }}\n{% if %}"))


def test_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow gives no character offsets"):
        ChatRenderer(Slow())


def test_clock_in_a_template_stands_still(make_tokenizer: MakeTokenizer) -> None:
    template = "{{ strftime_now('%d %b %Y') }}{{ strftime_now(\"%Y\") }}"
    expected = TEMPLATE_DATE.strftime("{{ '%d %b %Y' }}{{ '%Y' }}")
    assert freeze_clock(template) == expected
    tokenizer = make_tokenizer("{{ strftime_now('%Y') }}" + CHATML_TEMPLATE)
    renderer = ChatRenderer(tokenizer)
    assert renderer.render(chat("a", "b")).text.startswith(str(TEMPLATE_DATE.year))


def test_tokenizer_without_template_gets_chatml_that_ends_turns_with_one_token(
    make_tokenizer: MakeTokenizer, tmp_path: Any
) -> None:
    make_tokenizer(None).save_pretrained(tmp_path / "with")
    tokenizer = load_tokenizer(str(tmp_path / "with"))
    assert marked(tokenizer, sample_of(tokenizer, chat("a", "b"))) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]"
    )
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate("</s>abcdefghijklmnopqrstuvwxyz_|\n")}
    backend = Tokenizer(models.BPE(vocab={**letters, "</s>": 99}, merges=[]))
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    sample = sample_of(bare, chat("a", "b"))
    assert sample.input_ids[sample.supervised].tolist() == [letters["b"], 99]


def test_template_file_replaces_the_tokenizers(
    make_tokenizer: MakeTokenizer, tmp_path: Any
) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "llama.jinja").write_text(LLAMA3)
    tokenizer = load_tokenizer(str(tmp_path), str(tmp_path / "llama.jinja"))
    assert tokenizer.chat_template == LLAMA3
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template: the file .*none\.jinja"):
        load_tokenizer(str(tmp_path), str(tmp_path / "none.jinja"))
    with pytest.raises(ValueError, match=r"tokenizer\.path: cannot load a tokenizer"):
        load_tokenizer(str(tmp_path / "nowhere"))
