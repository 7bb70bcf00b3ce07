"""Chat templates that come with sft_fast, and the changes that make any template reproducible."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
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

LLAMA3_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

LLAMA2_TEMPLATE = """\
{%- set system = namespace(text='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}
{%- set system.text = '<<SYS>>\\n' + message.content | trim + '\\n<</SYS>>\\n\\n' %}
{%- elif message.role == 'user' %}
{{- bos_token + '[INST] ' + system.text + message.content | trim + ' [/INST]' }}
{%- set system.text = '' %}
{%- elif message.role == 'assistant' %}
{{- ' ' + message.content | trim + ' ' + eos_token }}
{%- else %}
{{- raise_exception('the template llama2 knows system, user and assistant only') }}
{%- endif %}
{%- endfor %}
"""

ALPACA_TEMPLATE = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ messages[0].content | trim }}
{%- else %}
{{- 'Below is an instruction that describes a task. ' }}
{{- 'Write a response that appropriately completes the request.' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- '\\n\\n### Instruction:\\n' + message.content | trim }}
{%- elif message.role == 'assistant' %}
{{- '\\n\\n### Response:\\n' + message.content | trim + eos_token }}
{%- elif not loop.first %}
{{- raise_exception('the template alpaca knows user and assistant, and system as first turn') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}
"""

ZEPHYR_TEMPLATE = """\
{%- for message in messages %}
{{- '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
"""

GEMMA_TEMPLATE = """\
{{- bos_token }}
{%- set system = namespace(text='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}
{%- set system.text = message.content | trim + '\\n\\n' %}
{%- elif message.role in ['user', 'assistant'] %}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\\n' }}
{{- system.text + message.content | trim + '<end_of_turn>' + '\\n' }}
{%- set system.text = '' %}
{%- else %}
{{- raise_exception('the template gemma knows system, user and assistant only') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

TEMPLATES = {
    "alpaca": ALPACA_TEMPLATE,
    "chatml": CHATML_TEMPLATE,
    "gemma": GEMMA_TEMPLATE,
    "llama2": LLAMA2_TEMPLATE,
    "llama3": LLAMA3_TEMPLATE,
    "zephyr": ZEPHYR_TEMPLATE,
}
"""Name -> template; a name can be given where the path of a template file can."""

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
# Of the families that have them as one token each; zephyr's <|user|> is plain text.
_CONTROL_TOKENS = (
    "<|im_start|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<start_of_turn>",
    *_TURN_ENDS,
)

TEMPLATE_DATE = datetime.date(2024, 7, 26)
"""What a template that asks for today's date gets: the same data must not change overnight. It is
the date that the templates themselves fall back to."""

_CLOCK = re.compile(r"strftime_now\(\s*(['\"])(?P<format>[^'\"]*)\1\s*\)")


def chat_template(choice: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template behind `tokenizer.chat_template`: one of `TEMPLATES`, or a Jinja file.

    Raises:
        ValueError: it is neither.
    """
    if choice in TEMPLATES:
        return fitted_template(choice, tokenizer)
    if not Path(choice).is_file():
        raise ValueError(
            f"tokenizer.chat_template: the file {choice} does not exist; expected a Jinja file, or "
            f"one of {', '.join(TEMPLATES)}"
        )
    return Path(choice).read_text(encoding="utf-8")


def fitted_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """One of `TEMPLATES` for this tokenizer.

    A turn ends with the template's token where the vocabulary has it and with the EOS token where
    it does not, so that the end of a turn is always one token. The text starts with BOS exactly
    when the tokenizer would put one in front of a plain text.
    """
    template = TEMPLATES[name]
    vocabulary = tokenizer.get_vocab()
    for token in _TURN_ENDS:
        if token not in vocabulary and tokenizer.eos_token is not None:
            template = template.replace(f"'{token}'", "eos_token")
    bos = tokenizer.bos_token_id
    puts_bos = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
    if puts_bos and "bos_token" not in template:
        return "{{- bos_token }}" + template
    return template if bos is not None else template.replace("bos_token", "''")


def check_control_tokens(choice: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes sure that the tokenizer has the special tokens of a template that was asked for.

    Raises:
        ValueError: it would take one of them apart, like any text.
    """
    template = TEMPLATES.get(choice, tokenizer.chat_template)
    vocabulary = tokenizer.get_vocab()
    used = [token for token in _CONTROL_TOKENS if token in template]
    missing = [token for token in used if token not in vocabulary]
    if missing:
        raise ValueError(
            f"tokenizer.chat_template: {choice} has special tokens that are not in the tokenizer: "
            f"{', '.join(missing)}; choose the template that the model was trained with, or one "
            "without special tokens (alpaca, llama2, zephyr), or add them: tokenizer.add_tokens="
            f"[{', '.join(repr(token) for token in missing)}], and model.new_embeddings=mean if "
            "the model has no records for them"
        )


def freeze_clock(template: str) -> str:
    """Replaces every `strftime_now("...")` of a template by that format of `TEMPLATE_DATE`."""
    return _CLOCK.sub(lambda match: repr(TEMPLATE_DATE.strftime(match["format"])), template)
