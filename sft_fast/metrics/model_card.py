"""README.md of an exported model: what it was made from, how, and how that went."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sft_fast.config.schema import Config
from sft_fast.config.sections import DataConfig
from sft_fast.config.yaml_source import dump_yaml
from sft_fast.metrics.trackers import run_name
from sft_fast.models.hub import HUB_ID
from sft_fast.redact import redact
from sft_fast.registry import SFT
from sft_fast.runtime.run_files import RunFiles
from sft_fast.runtime.versions import installed_version
from sft_fast.stages import stage_of

WRITE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
chat = [{"role": "user", "content": "Hello"}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=200)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

`sft_fast chat .` and `vllm serve .` read this directory too."""
SCORE = """```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "."
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)
chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
inputs = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")
print(model(**inputs).logits)
```"""
VERSIONS = ("sft-fast", "megatron-core", "torch", "transformers", "datasets")
CURVES_FILE = "curves.png"


def model_card(config: Config, run: RunFiles, data_fingerprint: str, world_size: int) -> str:
    """The card in the hub's format: YAML between dashes, then Markdown.

    Args:
        config: of the run.
        run: the run so far.
        data_fingerprint: of the token store that was trained on.
        world_size: ranks.
    """
    base, writes_text = config.model.path, stage_of(config).writes_text
    aim = "supervised fine-tuning, loss on the answers only"
    if config.stage != SFT:
        aim = f"stage {config.stage}"
    title = run_name(config.metrics, config.output_dir)
    start = f"`{base}`" if base is not None else "random weights"
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation" if writes_text else "text-classification",
        "tags": [config.stage, "sft_fast"],
    }
    if base is not None and is_hub_id(base):
        head["base_model"] = base
    datasets = [name for name in source_names(config.data) if is_hub_id(name)]
    if datasets:
        head["datasets"] = datasets
    return redact(
        f"---\n{dump_yaml(head)}---\n\n# {title}\n\n"
        f"Fine-tuned from {start} with sft_fast: {aim}"
        f"{', LoRA adapters merged' if config.lora.rank > 0 else ''}.\n\n"
        f"{facts(config.data, config.seed, run, data_fingerprint)}\n\n"
        f"![training curves]({CURVES_FILE})\n\n"
        f"## Use\n\n{WRITE if writes_text else SCORE}\n\n"
        f"## How it was made\n\n```bash\nsft_fast train config.yaml --nproc-per-node {world_size}"
        f"\n```\n\n<details><summary>config.yaml</summary>\n\n```yaml\n"
        f"{dump_yaml(config.model_dump())}```\n\n</details>\n"
    )


def facts(data_config: DataConfig, seed: int, run: RunFiles, data_fingerprint: str) -> str:
    """A table of figures."""
    rows = [("data", ", ".join(f"`{name}`" for name in source_names(data_config)))]
    rows.append(("data fingerprint (xxh3_128)", f"`{data_fingerprint}`"))
    data, step, evaluation = (run.last(kind) for kind in ("data", "step", "eval"))
    if data is not None:
        share = data["supervised_tokens"] / max(data["tokens"], 1)
        text = f"{data['samples']:,} samples, {data['tokens']:,} tokens, {share:.1%} trained"
        rows.append(("samples", text))
    if step is not None:
        rows.append(("optimizer steps", f"{step['step']:,}"))
        rows.append(("training loss", f"{step['loss']:.4f}" if step["loss"] is not None else "NaN"))
    if evaluation is not None and evaluation.get("loss") is not None:
        rows.append(("evaluation loss", f"{evaluation['loss']:.4f}"))
    rows.append(("seed", str(seed)))
    rows += [(name, version) for name in VERSIONS if (version := installed_version(name))]
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)


def source_names(data: DataConfig) -> list[str]:
    """The sources of the training data, as the configuration names them."""
    train = data.train
    return [train] if isinstance(train, str) else [entry.path for entry in train]


def is_hub_id(name: str) -> bool:
    """True for `owner/name`, with or without a configuration and a revision."""
    plain = re.split("[:@]", name)[0]
    return "/" in plain and HUB_ID.fullmatch(plain) is not None and not Path(name).exists()
