"""The trained model as a Hugging Face directory: weights, configs, tokenizer, chat template."""

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from sft_fast.config.schema import load_config
from sft_fast.config.sections import ExportConfig, ModelConfig
from sft_fast.files import write_json
from sft_fast.megatron.compare import is_compared
from sft_fast.megatron.exchange import StoreExchange
from sft_fast.megatron.export.check import check_export
from sft_fast.megatron.export.configs import generation_config, hf_config
from sft_fast.megatron.export.tokenizer import export_tokenizer
from sft_fast.megatron.export.weights import export_weights
from sft_fast.megatron.load_inputs import ExportSource
from sft_fast.megatron.model import DTYPES, SFTModel
from sft_fast.megatron.parallel import Parallel
from sft_fast.metrics.curves import draw_curves, png
from sft_fast.metrics.model_card import CURVES_FILE, model_card
from sft_fast.runtime.manifest import staged_directory
from sft_fast.runtime.phases import Phases
from sft_fast.runtime.run_files import read_run

EXPORT_TIMEOUT_S = 3600


def export_model(
    models: Sequence[SFTModel],
    folder: Path,
    origin: ExportSource,
    model: ModelConfig,
    export: ExportConfig,
    output_dir: str,
    parallel: Parallel,
    phases: Phases,
) -> None:
    """Writes a directory that transformers loads: with `AutoModelForCausalLM`, or where a stage has
    a head of its own with `AutoModelForSequenceClassification`. Every rank calls it.

    `folder` is replaced when it exists, after everything is written; see manifest.py.
    """
    dtype = export.dtype or model.dtype
    exchange = StoreExchange(f"export/{folder.name}", EXPORT_TIMEOUT_S)
    with staged_directory(folder, exchange) as stage:
        with phases.paused("write weights", can_leave=True, is_loading=True):
            export_weights(
                models,
                stage.path,
                origin.model.architecture,
                parallel,
                DTYPES[dtype],
                phases.tensor_done,
                None if model.random_init else origin.model.folder,
            )
        if parallel.is_main:
            export_tokenizer(origin.tokenizer, stage.path)
            write_json(stage.path / "config.json", hf_config(origin, dtype))
            write_json(stage.path / "generation_config.json", generation_config(origin))
            write_card(stage.path, origin.data.fingerprint, Path(output_dir))
        if is_compared(export.verify, origin.model.architecture, parallel):
            dist.barrier()  # the weights are there
            check_export(models, stage.path, origin, model, export, parallel)


def write_card(folder: Path, data_fingerprint: str, output: Path) -> None:
    """Adds README.md and, where matplotlib is there, the curves to the export of a run.

    Args:
        folder: the export.
        data_fingerprint: of the token store that was trained on.
        output: has the run's metrics.jsonl and config.yaml; without them there is no card.
    """
    if not all((output / name).is_file() for name in ("metrics.jsonl", "config.yaml")):
        return
    run = read_run(output)
    world_size = (run.last("launch") or {}).get("world_size", 1)
    config = load_config(output / "config.yaml", [])
    card = model_card(config, run, data_fingerprint, world_size)
    try:
        (folder / CURVES_FILE).write_bytes(png(draw_curves(run)))
    except ValueError:
        # Nothing was trained, or matplotlib is missing: a card without a picture.
        card = card.replace(f"![training curves]({CURVES_FILE})\n\n", "")
    (folder / "README.md").write_text(card, encoding="utf-8")
