"""Chat templates: the embedded ChatML, and the changes that make any template reproducible."""

from __future__ import annotations

import datetime
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\nTools:' }}
{%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' + call.function | tojson + '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

TEMPLATE_DATE = datetime.date(2024, 7, 26)
"""What a template that asks for today's date gets: the same data must not change overnight. It is
the date that the templates themselves fall back to."""

_CLOCK = re.compile(r"strftime_now\(\s*(['\"])(?P<format>[^'\"]*)\1\s*\)")


def embedded_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """ChatML for a tokenizer that has no template.

    A turn ends with <|im_end|> where the vocabulary has it and with the EOS token where it does
    not, so that the end of a turn is always one token. It starts with BOS exactly when the
    tokenizer would put one in front of a plain text.
    """
    template = CHATML_TEMPLATE
    if "<|im_end|>" not in tokenizer.get_vocab() and tokenizer.eos_token is not None:
        template = template.replace("'<|im_end|>'", "eos_token")
    bos = tokenizer.bos_token_id
    if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]:
        template = "{{- bos_token }}" + template
    return template


def freeze_clock(template: str) -> str:
    """Replaces every `strftime_now("...")` of a template by that format of `TEMPLATE_DATE`."""
    return _CLOCK.sub(lambda match: repr(TEMPLATE_DATE.strftime(match["format"])), template)
