import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import template_families as families
from masks import chat, marked, sample_of
from sft_fast.data.conversation import Conversation, Message
from sft_fast.data.render import ChatRenderer
from sft_fast.data.templates import CHATML_TEMPLATE, TEMPLATE_DATE, TEMPLATES, freeze_clock
from sft_fast.data.tokenizer import load_tokenizer
from sft_fast.data.tokens import Span, _check_covered, _composed
from sft_fast.data.turn_bounds import TurnBounds

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
            "{{ raise_exception('must alternate') }}",
            Conversation(chat("-", "a", "b", "c").messages[1:]),
            r"must alternate \(it begins with the assistant: remove that turn",
        ),
        (
            "{{ raise_exception('must alternate') }}",
            Conversation((*chat("a").messages, *chat("b", "c").messages)),
            r"must alternate \(two turns of the user follow each other: join them\)",
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


def test_a_tokenizer_that_is_tekken_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(ValueError, match="holds tekken.json alone, .*put the tokenizer.json and"):
        load_tokenizer(str(tmp_path))


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


def test_a_template_whose_special_tokens_are_unknown_is_refused(
    make_tokenizer: MakeTokenizer, tmp_path: Any
) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"gemma has special tokens.*<start_of_turn>.*add_tokens"):
        load_tokenizer(str(tmp_path), "gemma")
    (tmp_path / "own.jinja").write_text("{{ '<|im_start|><start_of_turn>' }}")
    with pytest.raises(ValueError, match=r"not in the tokenizer: <start_of_turn>;"):
        load_tokenizer(str(tmp_path), str(tmp_path / "own.jinja"))
    tokens = ["<start_of_turn>", "<end_of_turn>"]
    tokenizer = load_tokenizer(str(tmp_path), "gemma", add_tokens=tokens)
    assert [len(tokenizer(token)["input_ids"]) for token in tokens] == [1, 1]


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


def turn(role: str, content: str, **options: Any) -> Message:
    return Message(role, content, **options)


WEIGHTED = (
    turn("user", "a"),
    turn("assistant", "b", weight=0.5),
    turn("user", "c"),
    turn("assistant", "d", weight=2.0),
    turn("user", "tail"),
)


def test_weights_of_turns_become_weights_of_tokens(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    sample = sample_of(tokenizer, Conversation(WEIGHTED))
    assert sample.weights is not None and sample.weights.dtype == "float16"
    texts = {
        weight: tokenizer.decode(sample.input_ids[sample.weights == weight].tolist())
        for weight in (0.5, 2.0)
    }
    assert texts == {0.5: "b<|im_end|>", 2.0: "d<|im_end|>"}
    assert ((sample.weights > 0) == sample.supervised).all()
    assert sample_of(tokenizer, chat("a", "b")).weights is None


def test_tail_can_be_kept_and_is_counted(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    conversation = Conversation(WEIGHTED)
    cut = sample_of(tokenizer, conversation)
    whole = sample_of(tokenizer, conversation, trim_tail=False)
    rest = tokenizer.decode(whole.input_ids[len(cut.input_ids) :].tolist())
    assert rest == "\n<|im_start|>user\ntail<|im_end|>\n"
    assert whole.input_ids[: len(cut.input_ids)].tolist() == cut.input_ids.tolist()
    assert not whole.supervised[len(cut.input_ids) :].any()
    assert ChatRenderer(tokenizer).render(conversation).trimmed_turns == 1


def test_only_the_last_trained_turn(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    turns = (*chat("a", "b", "c", "d").messages, turn("user", "e"))
    turns = (*turns, turn("assistant", "f", train=False))
    sample = sample_of(tokenizer, Conversation(turns), train_on="last_turn")
    assert marked(tokenizer, sample).endswith("[[d<|im_end|>]]")
    assert marked(tokenizer, sample).count("[[") == 1


def test_tool_calls_can_be_context_only(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(CHATML_TEMPLATE)
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = (turn("user", "a"), turn("assistant", "b", tool_calls=(call,)), turn("tool", "c"))
    answered = Conversation((*turns, turn("assistant", "d")))
    sample = sample_of(tokenizer, answered, train_tool_calls=False)
    assert "[[b" not in marked(tokenizer, sample)
    assert marked(tokenizer, sample).endswith("[[d<|im_end|>]]")
    with pytest.raises(
        ValueError, match="every assistant turn is a tool call, and data.train_tool"
    ):
        sample_of(tokenizer, Conversation(turns), train_tool_calls=False)


def test_reasoning_that_the_template_drops_or_does_not_end_is_refused(
    make_tokenizer: MakeTokenizer,
) -> None:
    turns = (turn("user", "a"), turn("assistant", "b", extra={"reasoning_content": "hm"}))
    with pytest.raises(ValueError, match="leaves out the reasoning of an answer"):
        sample_of(make_tokenizer(), Conversation(turns))
    template = CHATML_TEMPLATE.replace(
        "message.content }}", "(message.reasoning_content or '') + message.content }}"
    )
    tokenizer = make_tokenizer(template)
    assert marked(tokenizer, sample_of(tokenizer, Conversation(turns))).endswith(
        "[[hmb<|im_end|>]]"
    )
    with pytest.raises(ValueError, match="cannot find where the reasoning of an answer ends"):
        sample_of(tokenizer, Conversation(turns), train_reasoning=False)


@pytest.mark.parametrize("text", ["plain\n\ntext 🎉", "plain</s>", "a <|im_start|> b"])
def test_plain_text_is_trained_whole_up_to_one_eos(
    make_tokenizer: MakeTokenizer, text: str
) -> None:
    tokenizer = make_tokenizer()
    expected = text.removesuffix("</s>") + "</s>"
    assert marked(tokenizer, sample_of(tokenizer, Conversation((), text=text))) == f"[[{expected}]]"


def count_turns(renderer: ChatRenderer, conversation: Conversation) -> int:
    """Turns that the template is run on to render a conversation."""
    runs = []
    original = renderer._run

    def run(messages: Any, *rest: Any, **options: Any) -> Any:
        runs.append(len(messages))
        return original(messages, *rest, **options)

    renderer._run = run  # type: ignore[method-assign]
    renderer.render(conversation)
    renderer._run = original  # type: ignore[method-assign]
    return sum(runs)


def test_rendering_is_linear_in_the_length_of_a_conversation(
    make_tokenizer: MakeTokenizer,
) -> None:
    renderer = ChatRenderer(make_tokenizer(LLAMA3))
    for number in (40, 80, 160):
        contents = [f" turn {i}\n" for i in range(number)]
        first = count_turns(renderer, chat(*contents))
        again = count_turns(renderer, chat(*(f"{content} again" for content in contents)))
        # Each answer behind its last turns, once for the whole structure; then each conversation
        # whole and up to its last answer.
        assert first <= 13 * number
        assert again <= 2 * number


@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(
        st.text(alphabet=st.sampled_from("ab \n\t🎉你</think>"), min_size=1).filter(str.strip),
        min_size=4,
        max_size=8,
    ),
    template=st.sampled_from([CHATML_TEMPLATE, LLAMA3, TEMPLATES["llama2"], TEMPLATES["zephyr"]]),
)
def test_shortcut_finds_what_the_prefixes_of_the_chat_prove(
    make_tokenizer: MakeTokenizer, contents: list[str], template: str
) -> None:
    conversation = chat(*contents[: len(contents) // 2 * 2])
    renderer = ChatRenderer(make_tokenizer(template))
    exact = exact_renderer(make_tokenizer(template))
    assert renderer.render(conversation) == exact.render(conversation)


def exact_renderer(tokenizer: Any) -> ChatRenderer:
    """A renderer that proves every chat by all of its prefixes."""
    renderer = ChatRenderer(tokenizer)
    renderer._bounds = ExactBounds(tokenizer.eos_token)  # type: ignore[assignment]
    return renderer


def agent(*rounds: int) -> Conversation:
    """A user's turn for each number, answered after so many tool calls; no two calls are alike."""
    turns = []
    for user, num_calls in enumerate(rounds):
        turns.append(Message("user", f"task {user}"))
        for step in range(num_calls):
            arguments = {"city": f"town {user}.{step}", "days": step, "more": [step] * (step % 3)}
            call = {"type": "function", "function": {"name": "rain", "arguments": arguments}}
            turns += [Message("assistant", "", tool_calls=(call,)), Message("tool", f"{step} mm")]
        turns.append(Message("assistant", f"done {user}"))
    tool = {"type": "function", "function": {"name": "rain", "parameters": {}}}
    return Conversation(tuple(turns), (tool,) if any(rounds) else ())


def family_tokenizer(name: str, make_tokenizer: MakeTokenizer) -> Any:
    (family,) = (family for family in families.FAMILIES if family.name == name)
    template = family.template
    if name == "qwen":
        # As before it reasoned: history stays.
        template = template.replace("loop.index0 > state.last_query", "false")
    return make_tokenizer(
        template, special=family.special, bos_token=family.bos, eos_token=family.eos
    )


@pytest.mark.parametrize(
    ("family", "rounds"),
    # Mistral puts the tools in front of the last task, so several tasks are no stable history.
    [("qwen", 1), ("qwen", 4), ("llama3_tools", 1), ("llama3_tools", 4), ("mistral_v3", 1)],
)
def test_rendering_is_linear_where_no_two_calls_are_alike(
    make_tokenizer: MakeTokenizer, family: str, rounds: int
) -> None:
    renderer = ChatRenderer(family_tokenizer(family, make_tokenizer))
    for num_calls in (20, 40, 80):
        conversation = agent(*[num_calls // rounds] * rounds)
        num_turns = len(conversation.messages)
        assert count_turns(renderer, conversation) <= 14 * num_turns


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(["qwen", "llama3_tools", "mistral_v3"]),
    rounds=st.lists(st.integers(0, 6), min_size=3, max_size=6),
    trained=st.lists(st.booleans(), min_size=40, max_size=40),
    has_system=st.booleans(),
)
def test_parts_find_what_the_prefixes_of_the_chat_prove(
    make_tokenizer: MakeTokenizer,
    family: str,
    rounds: list[int],
    trained: list[bool],
    has_system: bool,
) -> None:
    tokenizer = family_tokenizer(family, make_tokenizer)
    chat = agent(*rounds)
    answers = [turn for turn in chat.messages if turn.role == "assistant"]
    masked = {id(turn) for turn, train in zip(answers[:-1], trained, strict=False) if not train}
    turns = [replace(turn, train=id(turn) not in masked) for turn in chat.messages]
    system = [Message("system", "Be brief.")] if has_system and family != "mistral_v3" else []
    conversation = Conversation((*system, *turns), chat.tools)
    outcomes: list[Any] = []
    with patch("sft_fast.data.turn_bounds.FEW_ANSWERS", 2):
        for renderer in (ChatRenderer(tokenizer), exact_renderer(tokenizer)):
            try:
                outcomes.append(renderer.render(conversation))
            except ValueError as error:
                assert family == "mistral_v3"
                outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    "condition",
    [
        "not loop.last",
        # Forgets what is far back, which the last turns alone do not show.
        "loop.revindex > 10",
        # Counts the turns.
        "messages|length > 20",
    ],
)
def test_long_chats_of_changing_history_are_refused(
    make_tokenizer: MakeTokenizer, condition: str
) -> None:
    template = FORGETFUL.replace("not loop.last", condition)
    conversation = chat(*(f"turn {number}" for number in range(40)))
    with pytest.raises(ValueError, match="renders the same turns differently when more"):
        ChatRenderer(make_tokenizer(template)).render(conversation)


class ExactBounds(dict[str, TurnBounds]):
    """Gives every template a TurnBounds that renders all prefixes."""

    def __init__(self, eos: str) -> None:
        self._eos = eos

    def __contains__(self, template: object) -> bool:
        return True

    def __missing__(self, template: str) -> TurnBounds:
        bounds = TurnBounds(template, self._eos)
        bounds._layout = lambda *_: None  # type: ignore[method-assign]
        bounds._prove_in_parts = lambda *_: None  # type: ignore[method-assign]
        return bounds


@settings(max_examples=40, deadline=None)
@given(contents=st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=6))
def test_tokens_decode_to_the_rendered_text(
    make_tokenizer: MakeTokenizer, contents: list[str]
) -> None:
    tokenizer = make_tokenizer()
    renderer = ChatRenderer(tokenizer)
    rendered = renderer.render(chat(*contents[: len(contents) // 2 * 2]))
    (sample,) = renderer.tokenize([rendered])
    assert tokenizer.decode(sample.input_ids.tolist()) == rendered.text
    batch = renderer.tokenize([rendered, renderer.render(chat("a", "b")), rendered])
    for other in (batch[0], batch[2]):
        assert other.input_ids.tolist() == sample.input_ids.tolist()
        assert other.supervised.tolist() == sample.supervised.tolist()


def test_characters_that_no_token_covers_are_noticed() -> None:
    span = Span(0, 5, None)
    _check_covered(span, "ab cd", np.array([(0, 2), (3, 5)]))
    with pytest.raises(ValueError, match="the tokenizer drops 'b ' of an answer"):
        _check_covered(span, "ab cd", np.array([(0, 1), (3, 5)]))


COMPOSED = st.sampled_from(["é", "e\u0301", "\u0958", "\u0915\u093c", "각", "a ", "\u0344", "Å"])


@pytest.mark.parametrize("is_nfc", [False, True])
@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(
        (st.text(min_size=1) | st.lists(COMPOSED, min_size=1).map("".join)).filter(str.strip),
        min_size=2,
        max_size=4,
    )
)
def test_places_by_bytes_and_by_characters_give_the_same_masks(
    make_tokenizer: MakeTokenizer, is_nfc: bool, contents: list[str]
) -> None:
    from tokenizers import normalizers, pre_tokenizers

    tokenizer = make_tokenizer(LLAMA3)
    if is_nfc:
        # As Qwen's.
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = byte_level
    renderer = ChatRenderer(tokenizer)
    assert (renderer._text_tokenizer._pieces is not None) == is_nfc
    rendered = renderer.render(chat(*contents[: len(contents) // 2 * 2]))
    by_bytes = renderer._text_tokenizer
    assert by_bytes._lengths is not None
    composed = _composed(rendered) if is_nfc else rendered
    (first,), (second,) = by_bytes([rendered]), by_bytes._by_characters([composed])
    if is_nfc:
        text = unicodedata.normalize("NFC", rendered.text)
        assert tokenizer.decode(first.input_ids.tolist()) == text
        answers = [unicodedata.normalize("NFC", content.strip()) for content in contents[1::2]]
        trained = tokenizer.decode(first.input_ids[first.supervised].tolist())
        assert trained == "".join(f"{answer}<|eot_id|>" for answer in answers)
    assert first.input_ids.tolist() == second.input_ids.tolist()
    assert first.supervised.tolist() == second.supervised.tolist()
    assert first.boundary_tokens == second.boundary_tokens


def test_tokenizer_that_is_not_of_plain_bytes_goes_by_characters(
    make_tokenizer: MakeTokenizer,
) -> None:
    from tokenizers import AddedToken, normalizers

    tokenizer = make_tokenizer(LLAMA3)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert ChatRenderer(tokenizer)._text_tokenizer._lengths is None
    assert marked(tokenizer, sample_of(tokenizer, chat("a", "HELLO"))).endswith(
        "[[hello<|eot_id|>]]"
    )
    greedy = make_tokenizer(LLAMA3)
    greedy.add_tokens([AddedToken("EAT", lstrip=True, special=False)])
    expected = "[[aEAT z<|eot_id|>]]"
    sample = sample_of(greedy, chat("a", "a   EAT z"))
    assert marked(greedy, sample).endswith(expected)
