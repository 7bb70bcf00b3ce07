"""The tokenizer of an export: the source's own files, where nothing was added to it.

What transformers 5 alone can read is written as 4 spells it, which 5 reads as well.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from sft_fast.data.tokenizer import load_tokenizer, tokenizer_digest
from sft_fast.files import write_json

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FILES = (TEMPLATE_FILE, "chat_template.json", "additional_chat_templates/*.jinja")
VOCABULARY_FILES = (
    *("tokenizer.model", "*.spm", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "*.tiktoken"),
)
"""Of other readers than tokenizers: they know the tokens of the source."""
TOKENIZER_FILES = (
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json"),
    *VOCABULARY_FILES,
)


def export_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes the files of a tokenizer, with its chat template, to a directory.

    Args:
        tokenizer: from `load_tokenizer`.
        folder: the export.
    """
    source = Path(tokenizer.name_or_path)
    if not tokenizer.name_or_path or not source.is_dir():  # the embedded one
        save_tokenizer(tokenizer, folder, {})
        return
    original = load_tokenizer(str(source))
    config = read_config(source)
    if tokenizer_digest(original) == tokenizer_digest(tokenizer):
        copy_files(source, folder, TOKENIZER_FILES)
        write_config(config, source, folder)
    else:
        copy_files(source, folder, VOCABULARY_FILES)
        save_tokenizer(tokenizer, folder, config)
    if has_template(source, config) and original.chat_template == tokenizer.chat_template:
        copy_files(source, folder, TEMPLATE_FILES)
    else:
        replace_template(tokenizer.chat_template, folder)


def save_tokenizer(tokenizer: Any, folder: Path, source_config: dict[str, Any]) -> None:
    """Writes a tokenizer that has tokens which no file has yet.

    Args:
        tokenizer: the tokenizer.
        folder: the export.
        source_config: tokenizer_config.json of what it was before; {} = nothing.
    """
    tokenizer.save_pretrained(folder)
    config = read_config(folder)
    if "tokenizer_class" in source_config:
        config["tokenizer_class"] = source_config["tokenizer_class"]
    # tokenizer.json has them; readers of the vocabulary files look here.
    config["added_tokens_decoder"] = {
        str(number): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    write_json(folder / CONFIG_FILE, for_both_versions(config))


def read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json of a directory; {} where there is none."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return {}
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def write_config(config: dict[str, Any], source: Path, folder: Path) -> None:
    """Copies tokenizer_config.json of `source`, which holds `config`, where both versions of
    transformers read it; else writes it so that they do."""
    fitted = for_both_versions(config)
    if fitted == config:
        copy_files(source, folder, (CONFIG_FILE,))
    else:
        write_json(folder / CONFIG_FILE, fitted)


def for_both_versions(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json without what only transformers 5 reads, or what runs code."""
    config = {key: value for key, value in config.items() if key != "auto_map"}
    if config.get("tokenizer_class") in (None, "TokenizersBackend"):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # A list of them has this name in 4; a dict has the new one in both.
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def copy_files(source: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    """Copies the content of files, which get the mode of new ones."""
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def has_template(source: Path, config: dict[str, Any]) -> bool:
    """Whether a tokenizer's own files have a chat template."""
    return bool(config.get("chat_template")) or (source / TEMPLATE_FILE).is_file()


def replace_template(template: str, folder: Path) -> None:
    """Writes the chat template, in the one place where it then is."""
    config = read_config(folder)
    if config.pop("chat_template", None) is not None:
        write_json(folder / CONFIG_FILE, config)
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
