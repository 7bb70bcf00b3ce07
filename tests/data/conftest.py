import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
]
CORPUS = ["hello world, the user and the assistant talk.\n\nhow are you\n"] * 4


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """A byte-level BPE with merges (also of newlines and of a leading space) and special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s*[\r\n]+| ?\w+|\s+|."), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)

    def make(template: str | None = CHATML, special: Sequence[str] = (), **options: Any) -> Any:
        options = {"bos_token": "<s>", "eos_token": "</s>"} | options
        copy = Tokenizer.from_str(backend.to_str())
        copy.add_special_tokens([AddedToken(token, special=True) for token in special])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=copy, **options)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as JSON lines, one object (or one ready-made line) a row; returns the path."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def real_data() -> Callable[[str], str]:
    """Path of a public data file; skips the test where it is not on this machine."""
    default = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
    folder = Path(os.environ.get("SFT_FAST_TEST_DATA", default))

    def find(name: str) -> str:
        if not (folder / name).is_file():
            pytest.skip(f"{name} is not in {folder}; set SFT_FAST_TEST_DATA to its folder")
        return str(folder / name)

    return find
