"""Templates that only write contents: the code is read right, and what is composed is rendered."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import template_families as families
from masks import chat
from sft_fast.data.conversation import Conversation, Message
from sft_fast.data.render import ChatRenderer
from sft_fast.data.template_flow import only_writes_contents
from sft_fast.data.templates import CHATML_TEMPLATE

MakeTokenizer = Callable[..., Any]
LOOP = "{% for m in messages %}{{ m.role }}: BODY</s>{% endfor %}"


@pytest.mark.parametrize(
    "body",
    [
        "{{ m.content }}",
        "{{ m['content'] | trim }}",
        "{{ '[' + m.content ~ ']' }}",
        "{% set text = m.content | trim %}{{ text + eos_token }}",
        "{% if m.content is string %}{{ m.content }}{% endif %}",
        "{% if m.content %}{{ m.content }}{% endif %}",
        "{{ m.content if m.role == 'user' else m.content | trim }}",
        "{% if '</think>' in m.content %}x{% else %}{{ m.content }}{% endif %}",
        "{% if 'tool_calls' in m %}x{% endif %}{{ m.content }}",
        "{% if loop.last and messages | length > 2 %}x{% endif %}{{ m.content }}",
        "{% set first = messages[0] %}{% if first.role == 'user' %}{{ m.content }}{% endif %}",
        "{% set ns.text = m.content %}{{ ns.text }}",
    ],
)
def test_code_that_only_writes(body: str) -> None:
    template = "{% set ns = namespace(text='') %}" + LOOP.replace("BODY", body)
    assert only_writes_contents(template, ("</think>",))


@pytest.mark.parametrize(
    "body",
    [
        "{{ m.content | upper }}",
        "{{ m.content | length }}",
        "{{ m.content | trim | length }}",
        "{{ m.content[:3] }}",
        "{{ m.content.split('x')[0] }}",
        "{{ m['content'].strip() }}",
        "{{ m.get('content') | upper }}",
        "{{ m.items() | list }}",
        "{{ m | tojson }}",
        "{{ messages | tojson }}",
        "{{ m.content * 2 }}",
        "{{ m.content | replace('a', 'b') }}",
        "{{ m.content | trim('x') }}",
        "{% if m.content == 'a' %}x{% endif %}{{ m.content }}",
        "{% if 'abc' in m.content %}x{% endif %}{{ m.content }}",
        "{% if m.content in 'abc' %}x{% endif %}{{ m.content }}",
        "{% if m.content | length > 3 %}x{% endif %}{{ m.content }}",
        "{% if m.content and loop.first %}x{% endif %}{{ m.content }}",
        "{% if m.content is upper %}x{% endif %}{{ m.content }}",
        "{% set text = m.content %}{{ text | upper }}",
        "{% set text = m.content %}{% set more = text %}{% if more > 'a' %}x{% endif %}",
        "{% set ns.text = m.content %}{{ ns.text[0] }}",
        "{% set text %}{{ m.content }}{% endset %}{{ text | upper }}",
        "{% filter upper %}{{ m.content }}{% endfilter %}",
        "{% macro f(x) %}{{ x | upper }}{% endmacro %}{{ f(m.content) }}",
        "{% set other = m %}{{ other.content | upper }}",
        "{% for n in messages %}{{ n.content | upper }}{% endfor %}",
        "{% for n in messages | reverse %}{{ n.content | upper }}{% endfor %}",
        "{{ messages[0].content | upper }}",
        "{{ (messages | last).content | upper }}",
        "{{ loop.previtem.content | upper if loop.previtem else '' }}{{ m.content }}",
        "{{ loop.previtem | string }}{{ m.content }}",
        "{% if loop.changed(m.content) %}x{% endif %}{{ m.content }}",
        "{% set key = 'content' %}{{ m[key] | upper }}",
        "{{ m['con' ~ 'tent'] | upper }}",
        "{{ raise_exception(m.content) }}",
        "{% with n = m %}{{ n.content | upper }}{% endwith %}",
        "{% set x = namespace(c=m.content) %}{{ x.c | upper }}",
        "{% for c in m.content %}{{ c }}{% endfor %}",
        "{% for k in m %}{{ m[k] }}{% endfor %}",
        "{{ messages | map(attribute='content') | join }}",
        "{% if m.content %}",
    ],
)
def test_code_that_does_more(body: str) -> None:
    template = "{% set ns = namespace(text='') %}" + LOOP.replace("BODY", body)
    assert not only_writes_contents(template, ("</think>",))


SIMPLE = [family for family in families.FAMILIES if only_writes_contents(family.template, ())]
TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
        lambda text: text.strip() and "<" not in text and "[" not in text
    ),
    min_size=2,
    max_size=6,
)


@pytest.mark.parametrize("family", SIMPLE, ids=lambda family: family.name)
@settings(max_examples=15, deadline=None)
@given(texts=TEXTS)
def test_what_is_composed_is_what_is_rendered(
    make_tokenizer: MakeTokenizer, family: Any, texts: list[str]
) -> None:
    tokenizer = make_tokenizer(
        family.template, special=family.special, bos_token=family.bos, eos_token=family.eos
    )
    conversation = chat(*texts[: len(texts) // 2 * 2])
    with patch("sft_fast.data.turn_bounds.CHECKED_CHATS", 0):
        composed = ChatRenderer(tokenizer).render(conversation)
    with patch("sft_fast.data.turn_bounds.only_writes_contents", return_value=False):
        assert composed == ChatRenderer(tokenizer).render(conversation)


def test_nothing_is_rendered_once_a_structure_is_known(make_tokenizer: MakeTokenizer) -> None:
    renderer = ChatRenderer(make_tokenizer(CHATML_TEMPLATE))
    for number in range(10):
        renderer.render(chat(f"a{number}", "b", "c", f"d{number}"))
    with patch.object(renderer, "_run", side_effect=AssertionError):
        text = renderer.render(chat("new", "one", "two", "three")).text
        assert text.endswith("two<|im_end|>\n<|im_start|>assistant\nthree<|im_end|>")
        for other in (chat("a", "b"), chat("a", "b", "c ", "d"), chat("a", "b", system="s")):
            with pytest.raises(AssertionError):
                renderer.render(other)
        named = (Message("user", "a", name="n"), Message("assistant", "b", extra={"x": 1}))
        with pytest.raises(AssertionError):
            renderer.render(Conversation(named))


def test_a_chat_that_is_not_what_its_structure_says_ends_the_shortcut(
    make_tokenizer: MakeTokenizer,
) -> None:
    """Were the code read wrongly, the first chats of a structure would tell."""
    template = CHATML_TEMPLATE.replace("message.content }}", "message.content | upper }}")
    with patch("sft_fast.data.turn_bounds.only_writes_contents", return_value=True):
        renderer = ChatRenderer(make_tokenizer(template))
    for _ in range(8):
        with (
            patch("sft_fast.data.turn_bounds.only_writes_contents", return_value=True),
            pytest.raises(ValueError, match="leaves out turn 1"),
        ):
            renderer.render(chat("abc", "def"))
