"""Turns the GGUF file of a SmolLM model into the Hugging Face directory that `model.path` wants.

    python examples/convert_gguf.py SOURCE_DIR GGUF_NAME OUT_DIR

Weights are de-quantised to fp32, so they are those of the GGUF file, not of the original model.
Needs the packages gguf and accelerate.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

# tokenizer.ggml.pre -> how text is split before merging. GGUF stores this as a name only, and
# transformers knows no "smollm": it would split "\n\n1" into other tokens than in pretraining.
PRE_TOKENIZERS = {
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
}
METADATA = {
    "general.architecture": ("llama",),
    "llama.rope.scaling.type": (None, "none"),
    "tokenizer.ggml.pre": tuple(PRE_TOKENIZERS),
}


def read_metadata(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the metadata we rely on and the number of tensors of a GGUF file.

    Raises:
        ValueError: no such file, not GGUF, or a model that we would convert wrongly.
    """
    from gguf import GGUFReader

    if not path.is_file():
        present = ", ".join(file.name for file in path.parent.glob("*.gguf")) or "none"
        raise ValueError(f"{path} is not a file; .gguf files in {path.parent}: {present}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it does not begin with GGUF")
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); fetch it again") from None
    fields = {key: reader.get_field(key) for key in METADATA}
    metadata = {key: field and field.contents() for key, field in fields.items()}
    for key, supported in METADATA.items():
        if metadata[key] not in supported:
            raise ValueError(f"{path}: {key} is {metadata[key]!r}; supported: {supported}")
    return metadata, len(reader.tensors)


def convert(source: Path, name: str, out: Path) -> None:
    """Writes model.safetensors, config.json and the tokenizer with its chat template to `out`.

    Raises:
        ValueError: `out` is not empty, or the file is not one that we convert correctly.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory; name another")
    metadata, num_tensors = read_metadata(source / name)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=name, dtype="float32", output_loading_info=True
    )
    num_parameters = sum(1 for _ in loaded.parameters())
    if info["missing_keys"] or num_tensors != num_parameters:
        raise ValueError(
            f"{source / name}: {num_tensors} tensors for {num_parameters} parameters, "
            f"without {sorted(info['missing_keys'])}; expected the same ones: not a plain Llama"
        )
    # A fresh model, because the loaded one would be saved as a quantised one.
    config = loaded.config.to_dict()
    of_the_file = {"quantization_config", "_model_name_or_path", "_name_or_path"}
    model = LlamaForCausalLM(LlamaConfig(**{k: config[k] for k in config.keys() - of_the_file}))
    model.load_state_dict(loaded.state_dict())

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    if not tokenizer.chat_template:
        raise ValueError(f"{source / name} has no tokenizer.chat_template")
    tokenizer.backend_tokenizer.pre_tokenizer = PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]]
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(arguments: list[str]) -> int:
    """Converts by the arguments of the command line; returns the exit code."""
    if len(arguments) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    missing = [name for name in ("gguf", "accelerate") if not importlib.util.find_spec(name)]
    if missing:
        print(f"error: missing packages; run: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    source, name, out = arguments
    try:
        convert(Path(source), name, Path(out))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
