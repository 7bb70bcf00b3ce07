"""Ten public families of chat templates: their formats, and masks that were written by hand.

In an expected text the supervised tokens stand in double brackets.
"""

from dataclasses import dataclass, field
from typing import Any

from masks import chat
from sft_fast.data.conversation import Conversation, Message

EMOJI = "👩‍👩‍👧 🎉"
HEBREW = "שלום עולם"
MULTI = chat("hi", f"hello {EMOJI}", "你好，世界", HEBREW)
WITH_SYSTEM = chat("hi", "hello world", "how", "you\n\nare", system="Be brief.")
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"city": "Bonn"}}}
TOOL = {"type": "function", "function": {"name": "rain", "parameters": {}}}
# An assistant turn with a call and no content, and a tool result that is a line break only.
TOOLS = Conversation(
    (
        Message("user", "rain?"),
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", "\n"),
        Message("assistant", "no"),
    ),
    (TOOL,),
)


def thought(content: str, reasoning: str, **options: Any) -> Message:
    return Message("assistant", content, extra={"reasoning_content": reasoning}, **options)


REASONED = Conversation((Message("user", "1+1"), thought("2", "easy")))


@dataclass(frozen=True)
class Case:
    """A conversation and its samples; several where each answer is one of its own."""

    conversation: Conversation
    expected: str | tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    name: str
    template: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    cases: tuple[Case, ...]
    ours: str | None = None
    """Name of our template for the same format."""


QWEN = """\
{%- if tools %}
{{- '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- endif %}
{%- set state = namespace(last_query=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{% set state.last_query = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
{{- '\\n</tool_response><|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{%- set reasoning = message.reasoning_content or '' %}
{%- set content = message.content %}
{%- if '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > state.last_query and (loop.last or reasoning) %}
{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{ content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '\\n' if content or not loop.first }}
{{- '<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

QWEN_CASES = (
    Case(
        REASONED,
        "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
        "[[<think>\neasy\n</think>\n\n2<|im_end|>]]",
    ),
    Case(
        REASONED,
        "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
        "<think>\neasy\n</think>\n\n[[2<|im_end|>]]",
        {"train_reasoning": False},
    ),
    Case(
        chat("1+1", "<think>\neasy\n</think>\n\n2"),
        "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
        "<think>\neasy\n</think>\n\n[[2<|im_end|>]]",
        {"train_reasoning": False},
    ),
    # Without reasoning the last answer gets an empty block, the earlier ones get none: what each
    # answer looks like to the model is only seen in a sample of its own.
    Case(
        MULTI,
        (
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
            f"[[<think>\n\n</think>\n\nhello {EMOJI}<|im_end|>]]",
            f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello {EMOJI}<|im_end|>\n"
            "<|im_start|>user\n你好，世界<|im_end|>\n<|im_start|>assistant\n"
            f"[[<think>\n\n</think>\n\n{HEBREW}<|im_end|>]]",
        ),
        {"changing_history": "expand"},
    ),
    Case(
        MULTI,
        f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello {EMOJI}<|im_end|>\n"
        "<|im_start|>user\n你好，世界<|im_end|>\n<|im_start|>assistant\n"
        f"[[<think>\n\n</think>\n\n{HEBREW}<|im_end|>]]",
        {"train_on": "last_turn"},
    ),
    Case(
        Conversation(
            (
                Message("user", "rain?"),
                thought("", "look", tool_calls=(CALL,)),
                Message("tool", "\n"),
                thought("no", "dry"),
            ),
            (TOOL,),
        ),
        "<|im_start|>system\n# Tools\n"
        '{"type": "function", "function": {"name": "rain", "parameters": {}}}\n<|im_end|>\n'
        "<|im_start|>user\nrain?<|im_end|>\n<|im_start|>assistant\n"
        '[[<think>\nlook\n</think>\n\n<tool_call>\n{"name": "rain", "arguments": {"city": "Bonn"}}'
        "\n</tool_call><|im_end|>]]\n<|im_start|>user\n<tool_response>\n\n\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\n[[<think>\ndry\n</think>\n\nno<|im_end|>]]",
    ),
    Case(
        Conversation(
            (
                Message("user", "rain?"),
                thought("", "look", tool_calls=(CALL,)),
                Message("tool", "\n"),
                thought("no", "dry"),
            )
        ),
        "<|im_start|>user\nrain?<|im_end|>\n<|im_start|>assistant\n"
        '<think>\nlook\n</think>\n\n<tool_call>\n{"name": "rain", "arguments": {"city": "Bonn"}}'
        "\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n\n\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\n<think>\ndry\n</think>\n\n[[no<|im_end|>]]",
        {"train_tool_calls": False, "train_reasoning": False},
    ),
)

LLAMA2 = """\
{%- if messages[0].role == 'system' %}
{%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}
{%- set turns = messages[1:] %}
{%- else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{%- for message in turns %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('user and assistant must take turns') }}
{%- endif %}
{%- if message.role == 'user' %}
{{- bos_token + '[INST] ' + (system if loop.first else '') + message.content.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}
"""
LLAMA2_CASES = (
    Case(
        WITH_SYSTEM,
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nhi [/INST][[ hello world </s>]]"
        "<s>[INST] how [/INST][[ you\n\nare </s>]]",
    ),
    Case(
        chat(" hi\n", f"\n{EMOJI} "),
        f"<s>[INST] hi [/INST][[ {EMOJI} </s>]]",
    ),
    Case(
        MULTI,
        f"<s>[INST] hi [/INST][[ hello {EMOJI} </s>]]"
        f"<s>[INST] 你好，世界 [/INST][[ {HEBREW} </s>]]",
    ),
)

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + ('ipython' if message.role == 'tool' else message.role) }}
{{- '<|end_header_id|>\\n\\n' }}
{%- if message.tool_calls %}
{%- set call = message.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
{%- else %}{{ message.content | trim }}{% endif %}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
LLAMA3_CASES = (
    Case(
        WITH_SYSTEM,
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[hello world<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\nhow<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[you\n\nare<|eot_id|>]]",
    ),
    Case(
        MULTI,
        "<s><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        f"<|start_header_id|>assistant<|end_header_id|>\n\n[[hello {EMOJI}<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\n你好，世界<|eot_id|>"
        f"<|start_header_id|>assistant<|end_header_id|>\n\n[[{HEBREW}<|eot_id|>]]",
    ),
)
LLAMA3_TOOLS = Case(
    Conversation(TOOLS.messages),
    "<s><|start_header_id|>user<|end_header_id|>\n\nrain?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
    '[[{"name": "rain", "parameters": {"city": "Bonn"}}<|eot_id|>]]'
    "<|start_header_id|>ipython<|end_header_id|>\n\n<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[no<|eot_id|>]]",
)

MISTRAL_V1 = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}
{%- elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}
{%- else %}{{ raise_exception('only user and assistant') }}{% endif %}
{%- endfor %}
"""
MISTRAL_V3 = """\
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools and message == users[-1] %}
{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST] ' + message.content + '[/INST]' }}
{%- elif message.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}{{ call.function | tojson + (', ' if not loop.last else ']') }}
{%- endfor %}{{ eos_token }}
{%- elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}
{%- elif message.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + message.content | tojson + '}[/TOOL_RESULTS]' }}
{%- endif %}
{%- endfor %}
"""
TOOL_JSON = '[{"type": "function", "function": {"name": "rain", "parameters": {}}}]'
MISTRAL_CASES = (
    Case(
        MULTI,
        f"<s>[INST] hi [/INST][[ hello {EMOJI}</s>]][INST] 你好，世界 [/INST][[ {HEBREW}</s>]]",
    ),
)
MISTRAL_V3_CASES = (
    Case(
        MULTI,
        f"<s>[INST] hi[/INST][[ hello {EMOJI}</s>]][INST] 你好，世界[/INST][[ {HEBREW}</s>]]",
    ),
    Case(
        TOOLS,
        f"<s>[AVAILABLE_TOOLS] {TOOL_JSON}[/AVAILABLE_TOOLS][INST] rain?[/INST]"
        '[[[TOOL_CALLS] [{"name": "rain", "arguments": {"city": "Bonn"}}]</s>]]'
        '[TOOL_RESULTS] {"content": "\\n"}[/TOOL_RESULTS][[ no</s>]]',
    ),
    # The tools stand in front of the last question only, so every answer has its own history.
    Case(
        Conversation(MULTI.messages, (TOOL,)),
        (
            f"<s>[AVAILABLE_TOOLS] {TOOL_JSON}[/AVAILABLE_TOOLS][INST] hi[/INST]"
            f"[[ hello {EMOJI}</s>]]",
            f"<s>[INST] hi[/INST] hello {EMOJI}</s>"
            f"[AVAILABLE_TOOLS] {TOOL_JSON}[/AVAILABLE_TOOLS][INST] 你好，世界[/INST]"
            f"[[ {HEBREW}</s>]]",
        ),
        {"changing_history": "expand"},
    ),
)

GEMMA = """\
{{- bos_token }}
{%- for message in messages %}
{%- set role = 'model' if message.role == 'assistant' else message.role %}
{%- if role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{{- '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""
GEMMA_CASES = (
    Case(
        MULTI,
        "<bos><start_of_turn>user\nhi<end_of_turn>\n"
        f"<start_of_turn>model\n[[hello {EMOJI}<end_of_turn>]]\n"
        "<start_of_turn>user\n你好，世界<end_of_turn>\n"
        f"<start_of_turn>model\n[[{HEBREW}<end_of_turn>]]",
    ),
)

PHI = """\
{%- for message in messages %}
{{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}
"""
PHI_CASES = (
    Case(
        WITH_SYSTEM,
        # EOS behind the whole is no part of any turn.
        "<|system|>\nBe brief.<|end|>\n<|user|>\nhi<|end|>\n"
        "<|assistant|>\n[[hello world<|end|>]]\n"
        "<|user|>\nhow<|end|>\n<|assistant|>\n[[you\n\nare<|end|>]]",
    ),
    Case(
        chat("hi", f"{EMOJI}\n"),
        f"<|user|>\nhi<|end|>\n<|assistant|>\n[[{EMOJI}\n<|end|>]]",
    ),
    # Text that looks like the end of a turn, and is none.
    Case(
        chat("hi", "the end"),
        "<|user|>\nhi<|end|>\n<|assistant|>\n[[the end<|end|>]]",
    ),
    Case(
        MULTI,
        f"<|user|>\nhi<|end|>\n<|assistant|>\n[[hello {EMOJI}<|end|>]]\n"
        f"<|user|>\n你好，世界<|end|>\n<|assistant|>\n[[{HEBREW}<|end|>]]",
    ),
)

# Without line breaks EOS stands beside the last end of a turn, and is still no part of it.
PHI4 = PHI.replace("<|end|>\\n", "<|end|>").replace("|>\\n", "|>")
PHI4_CASES = (
    Case(
        WITH_SYSTEM,
        "<|system|>Be brief.<|end|><|user|>hi<|end|><|assistant|>[[hello world<|end|>]]"
        "<|user|>how<|end|><|assistant|>[[you\n\nare<|end|>]]",
    ),
    Case(chat("hi", "ho"), "<|user|>hi<|end|><|assistant|>[[ho<|end|>]]"),
)

ZEPHYR = """\
{%- for message in messages %}
{{- '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
{%- endfor %}
"""
ZEPHYR_CASES = (
    Case(
        WITH_SYSTEM,
        "<|system|>\nBe brief.</s>\n<|user|>\nhi</s>\n<|assistant|>\n[[hello world</s>]]\n"
        "<|user|>\nhow</s>\n<|assistant|>\n[[you\n\nare</s>]]",
    ),
    Case(
        MULTI,
        f"<|user|>\nhi</s>\n<|assistant|>\n[[hello {EMOJI}</s>]]\n"
        f"<|user|>\n你好，世界</s>\n<|assistant|>\n[[{HEBREW}</s>]]",
    ),
    Case(
        chat(f"{HEBREW}\n\n", "a\n\n", system="\n"),
        f"<|system|>\n\n</s>\n<|user|>\n{HEBREW}\n\n</s>\n<|assistant|>\n[[a\n\n</s>]]",
    ),
)

DEEPSEEK = """\
{%- set state = namespace(system='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}{% set state.system = message.content %}{% endif %}
{%- endfor %}
{{- bos_token + state.system }}
{%- for message in messages %}
{%- if message.role == 'system' %}{% continue %}{% endif %}
{%- if message.role == 'user' %}{{ '<｜User｜>' + message.content }}
{%- elif message.role == 'tool' %}
{{- '<｜tool▁outputs▁begin｜>' + message.content + '<｜tool▁outputs▁end｜>' }}
{%- else %}
{%- if loop.previtem and loop.previtem.role != 'tool' %}{{ '<｜Assistant｜>' }}{% endif %}
{{- message.content.split('</think>')[-1] }}
{%- if message.tool_calls %}{{ '<｜tool▁calls▁begin｜>' }}
{%- for call in message.tool_calls %}
{{- '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name + '\\n' }}
{{- call.function.arguments | tojson + '<｜tool▁call▁end｜>' }}
{%- endfor %}{{ '<｜tool▁calls▁end｜>' }}
{%- endif %}{{ '<｜end▁of▁sentence｜>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<｜Assistant｜>' }}{% endif %}
"""
DEEPSEEK_CASES = (
    Case(
        WITH_SYSTEM,
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>hi<｜Assistant｜>"
        "[[hello world<｜end▁of▁sentence｜>]]<｜User｜>how<｜Assistant｜>"
        "[[you\n\nare<｜end▁of▁sentence｜>]]",
    ),
    Case(
        MULTI,
        f"<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>[[hello {EMOJI}<｜end▁of▁sentence｜>]]"
        f"<｜User｜>你好，世界<｜Assistant｜>[[{HEBREW}<｜end▁of▁sentence｜>]]",
    ),
    # Special tokens inside of a turn; behind the answer of a tool the next turn has no opening.
    Case(
        Conversation(
            (
                Message("user", "rain?"),
                Message("assistant", "look", tool_calls=(CALL, CALL)),
                Message("tool", "\n"),
                Message("assistant", "no"),
            )
        ),
        "<｜begin▁of▁sentence｜><｜User｜>rain?<｜Assistant｜>[[look<｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>rain\n{"city": "Bonn"}<｜tool▁call▁end｜>'
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>rain\n{"city": "Bonn"}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>]]<｜tool▁outputs▁begin｜>\n<｜tool▁outputs▁end｜>"
        "[[no<｜end▁of▁sentence｜>]]",
    ),
)

SMOLLM2 = """\
{%- for message in messages %}
{%- if loop.first and message.role != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
SMOLLM2_CASES = (
    Case(
        MULTI,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n"
        f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[[hello {EMOJI}<|im_end|>]]\n"
        "<|im_start|>user\n你好，世界<|im_end|>\n"
        f"<|im_start|>assistant\n[[{HEBREW}<|im_end|>]]",
    ),
    Case(
        chat("hi\n", "a\n", system="\n"),
        "<|im_start|>system\n\n<|im_end|>\n<|im_start|>user\nhi\n<|im_end|>\n"
        "<|im_start|>assistant\n[[a\n<|im_end|>]]",
    ),
)

ALPACA = """\
{{- bos_token + 'Below is an instruction that describes a task. ' }}
{{- 'Write a response that appropriately completes the request.' }}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '\\n\\n### Instruction:\\n' + message.content | trim }}
{%- else %}{{ '\\n\\n### Response:\\n' + message.content | trim + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}
"""
ALPACA_CASES = (
    Case(
        MULTI,
        "<s>Below is an instruction that describes a task. Write a response that appropriately "
        f"completes the request.\n\n### Instruction:\nhi\n\n### Response:\n[[hello {EMOJI}</s>]]"
        f"\n\n### Instruction:\n你好，世界\n\n### Response:\n[[{HEBREW}</s>]]",
    ),
)

HARMONY = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- if message.reasoning_content and loop.last %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.reasoning_content + '<|end|>' }}
{%- endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- else %}
{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}
"""
# The answer stands in the reasoning too, and a special token behind that.
HARMONY_CASES = (
    Case(
        Conversation((Message("user", "1+1"), thought("2", "1+1=2"))),
        "<|start|>user<|message|>1+1<|end|><|start|>assistant"
        "[[<|channel|>analysis<|message|>1+1=2<|end|>"
        "<|start|>assistant<|channel|>final<|message|>2<|return|>]]",
    ),
    Case(
        MULTI,
        "<|start|>user<|message|>hi<|end|><|start|>assistant<|channel|>final<|message|>hello "
        f"{EMOJI}<|end|><|start|>user<|message|>你好，世界<|end|><|start|>assistant"
        f"[[<|channel|>final<|message|>{HEBREW}<|return|>]]",
        {"train_on": "last_turn"},
    ),
)

# As gpt-oss has it: reasoning is kept in front of a call until an answer follows, one call a turn.
GPT_OSS = """\
{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}
{%- set has_rules = messages[0].role in ['system', 'developer'] %}
{%- set turns = messages[1:] if has_rules else messages %}
{%- if has_rules or tools %}
{{- '<|start|>developer<|message|>' + (messages[0].content if has_rules else '') }}
{%- for tool in tools or [] %}{{ '\\ntype ' + tool.function.name }}{% endfor %}
{{- '<|end|>' }}
{%- endif %}
{%- set called = namespace(name='') %}
{%- for turn in turns %}
{%- set later = turns[loop.index:] | selectattr('role', 'equalto', 'assistant') | list %}
{%- if turn.role == 'user' %}{{ '<|start|>user<|message|>' + turn.content + '<|end|>' }}
{%- elif turn.role == 'tool' %}
{{- '<|start|>functions.' + called.name + ' to=assistant<|channel|>commentary<|message|>' }}
{{- turn.content | tojson + '<|end|>' }}
{%- elif turn.tool_calls %}
{%- set called.name = turn.tool_calls[0].function.name %}
{%- if turn.thinking and later | rejectattr('tool_calls', 'defined') | list | length == 0 %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + turn.thinking + '<|end|>' }}
{%- endif %}
{{- '<|start|>assistant to=functions.' + called.name + '<|channel|>commentary json<|message|>' }}
{{- turn.tool_calls[0].function.arguments | tojson + '<|call|>' }}
{%- else %}
{%- if turn.thinking and loop.last and not add_generation_prompt %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + turn.thinking + '<|end|>' }}
{%- endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + turn.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}
"""


def channel(name: str, content: str, **extra: Any) -> Message:
    """A turn of Harmony."""
    return Message("assistant", content, extra={"channel": name, **extra})


RAIN = channel("commentary", '{"city": "Ulm"}', recipient="functions.rain", content_type="json")
HARMONY_TURNS = (
    Message("developer", "Be brief."),
    Message("user", "rain?"),
    channel("analysis", "look it up"),
    RAIN,
    Message("tool", "wet", name="functions.rain", extra={"channel": "commentary"}),
    channel("analysis", "wet is rain"),
    channel("final", "yes"),
)
_EFFORT = "<|start|>system<|message|>Reasoning: high<|end|>"
_CALLED = f"{_EFFORT}<|start|>developer<|message|>Be brief.\ntype rain<|end|>"
_ASKED = "<|start|>user<|message|>rain?<|end|><|start|>assistant"
_LOOKED = "<|channel|>analysis<|message|>look it up<|end|>"
_CALL = '<|start|>assistant to=functions.rain<|channel|>commentary json<|message|>{"city": "Ulm"}'
_WET = '<|start|>functions.rain to=assistant<|channel|>commentary<|message|>"wet"<|end|>'
_THOUGHT = "<|channel|>analysis<|message|>wet is rain<|end|>"
_YES = "<|start|>assistant<|channel|>final<|message|>yes<|return|>"
HIGH = {"reasoning_effort": "high"}
WITH_CHANNELS = Conversation(HARMONY_TURNS, (TOOL,), template_options=HIGH)
# The model that answers has the call's reasoning before it, though the whole chat has none of it.
_ANSWERED = f"{_CALLED}{_ASKED}{_LOOKED}{_CALL}<|call|>{_WET}<|start|>assistant"
GPT_OSS_CASES = (
    Case(
        WITH_CHANNELS,
        (f"{_CALLED}{_ASKED}[[{_LOOKED}{_CALL}<|call|>]]", f"{_ANSWERED}[[{_THOUGHT}{_YES}]]"),
        {"changing_history": "expand"},
    ),
    Case(WITH_CHANNELS, f"{_ANSWERED}[[{_THOUGHT}{_YES}]]", {"train_on": "last_turn"}),
    Case(WITH_CHANNELS, f"{_ANSWERED}[[{_THOUGHT}{_YES}]]", {"train_tool_calls": False}),
    Case(
        WITH_CHANNELS,
        f"{_ANSWERED}{_THOUGHT}[[{_YES}]]",
        {"train_on": "last_turn", "train_reasoning": False},
    ),
    Case(
        Conversation((*HARMONY_TURNS[:2], *HARMONY_TURNS[3:5], *HARMONY_TURNS[5:]), (TOOL,)),
        f"{_CALLED.replace('high', 'medium')}{_ASKED}[[{_CALL.removeprefix('<|start|>assistant')}"
        f"<|call|>]]{_WET}<|start|>assistant[[{_THOUGHT}{_YES}]]",
    ),
    Case(
        Conversation((Message("user", "1+1"), thought("2", "1+1=2")), template_options=HIGH),
        f"{_EFFORT}<|start|>user<|message|>1+1<|end|><|start|>assistant[[<|channel|>analysis"
        "<|message|>1+1=2<|end|><|start|>assistant<|channel|>final<|message|>2<|return|>]]",
    ),
)

COMMAND = """\
{{- bos_token }}
{%- for message in messages %}
{%- set kind = 'CHATBOT' if message.role == 'assistant' else message.role | upper %}
{{- '<|START_OF_TURN_TOKEN|><|' + kind + '_TOKEN|>' }}
{%- if message.role == 'assistant' %}
{{- '<|START_RESPONSE|>' + message.content + '<|END_RESPONSE|>' }}
{%- else %}{{ message.content }}{% endif %}
{{- '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}
"""
# Two special tokens end an answer, and both have to be learnt.
COMMAND_CASES = (
    Case(
        MULTI,
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>hi<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        f"[[<|START_RESPONSE|>hello {EMOJI}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>]]"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>你好，世界<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        f"[[<|START_RESPONSE|>{HEBREW}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>]]",
    ),
)

IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
INST = (
    *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
FULLWIDTH = (
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>"),
    *(
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁outputs▁begin｜>",
        "<｜tool▁outputs▁end｜>",
    ),
)
CHANNELS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
COMMANDS = (
    *("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>"),
    *("<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
)
FAMILIES = (
    Family("command", COMMAND, COMMANDS, COMMANDS[0], COMMANDS[2], COMMAND_CASES),
    Family("qwen", QWEN, IM, None, "<|im_end|>", QWEN_CASES),
    Family("llama2", LLAMA2, (), "<s>", "</s>", LLAMA2_CASES, "llama2"),
    Family("llama3", LLAMA3, HEADERS, "<s>", "<|eot_id|>", LLAMA3_CASES, "llama3"),
    Family("llama3_tools", LLAMA3, HEADERS, "<s>", "<|eot_id|>", (LLAMA3_TOOLS,)),
    Family("mistral_v1", MISTRAL_V1, (), "<s>", "</s>", MISTRAL_CASES),
    Family("mistral_v3", MISTRAL_V3, INST, "<s>", "</s>", MISTRAL_V3_CASES),
    Family(
        "gemma",
        GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        GEMMA_CASES,
        "gemma",
    ),
    Family("phi3", PHI, (*ROLES, "<|endoftext|>"), None, "<|endoftext|>", PHI_CASES),
    Family("phi4", PHI4, (*ROLES, "<|endoftext|>"), None, "<|endoftext|>", PHI4_CASES),
    Family("zephyr", ZEPHYR, (), None, "</s>", ZEPHYR_CASES, "zephyr"),
    Family("deepseek", DEEPSEEK, FULLWIDTH, FULLWIDTH[0], FULLWIDTH[1], DEEPSEEK_CASES),
    Family("harmony", HARMONY, CHANNELS, None, "<|return|>", HARMONY_CASES),
    Family("gptoss", GPT_OSS, CHANNELS, None, "<|return|>", GPT_OSS_CASES),
    Family("smollm2", SMOLLM2, IM, None, "<|im_end|>", SMOLLM2_CASES),
    Family("alpaca", ALPACA, (), "<s>", "</s>", ALPACA_CASES, "alpaca"),
)
