"""What `sft_fast export` runs: a checkpoint's weights as a Hugging Face model.

Nothing is trained, so there are no gradients and no optimizer: the weights alone are in memory.
"""

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch.nn import ModuleList
from transformers.utils.logging import disable_progress_bar

from sft_fast.config.schema import Config
from sft_fast.config.sections import CheckpointConfig, LoraConfig, ModelConfig
from sft_fast.errors import DamageError
from sft_fast.megatron.checkpoint.fingerprint import changed_fields, model_fields
from sft_fast.megatron.checkpoint.load import damage_of, load_trained_weights
from sft_fast.megatron.checkpoint.train_state import read_train_state
from sft_fast.megatron.export.model import export_model
from sft_fast.megatron.load_inputs import ExportSource, read_export_source
from sft_fast.megatron.lora import adapter_fingerprint
from sft_fast.megatron.parallel import init_parallel
from sft_fast.megatron.starting_model import starting_model
from sft_fast.runtime.phases import Phases


def export(config: Config, phases: Phases) -> int:
    """Writes <output_dir>/export from the checkpoint that `checkpoint.resume` names.

    Args:
        config: of the export.
        phases: told what this rank is doing.

    Returns: the process exit code, 0.

    Raises:
        ValueError: the checkpoint does not hold this model or was trained with another tokenizer,
            or the export is not what it holds.
        DamageError: the checkpoint is damaged.
    """
    disable_progress_bar()  # of transformers, for the look at the export
    parallel = init_parallel(config.parallel, config.train, config.seed)
    checkpoint = Path(config.checkpoint.resume)
    if damages := damage_of(checkpoint, config.checkpoint.timeout_minutes * 60):
        raise DamageError(
            f"{checkpoint} is damaged; --step names another one:\n  " + "\n  ".join(damages)
        )
    state = read_train_state(checkpoint)
    origin = read_export_source(config, state.data)
    check_origin(origin, state.fields, checkpoint, config.model, config.lora, config.checkpoint)
    phases.enter("model", can_leave=True, is_loading=True)
    # A checkpoint of LoRA holds no weights of the model itself, any other all of them.
    weights = origin.model.weights if config.lora.rank > 0 else None
    models = starting_model(
        config, origin.model.architecture, weights, parallel, phases.tensor_done
    )
    load_trained_weights(checkpoint, ModuleList(models), phases.tensor_done)
    phases.enter("export", can_leave=True)
    export_model(
        models,
        Path(config.output_dir) / "export",
        origin,
        config.model,
        config.export,
        config.output_dir,
        parallel,
        phases,
    )
    dist.barrier()
    dist.destroy_process_group()
    return 0


def check_origin(
    origin: ExportSource,
    saved: Mapping[str, str],
    checkpoint: Path,
    model: ModelConfig,
    lora: LoraConfig,
    checkpoint_config: CheckpointConfig,
) -> None:
    """Compares model and tokenizer, which may lie elsewhere by now, with the run's.

    Args:
        origin: the model and tokenizer at hand.
        saved: the fields of the checkpoint; see fingerprint.run_fields.
        checkpoint: named in the message.
        model: section of the export.
        lora: section of the export.
        checkpoint_config: section of the export.

    Raises:
        ValueError: one is another than in training, and `checkpoint.allow_change` does not name it.
    """
    architecture = origin.model.architecture
    adapter = adapter_fingerprint(lora, origin.model.weights)
    present = model_fields(model, origin.tokenizer, architecture, adapter)
    fix = "say where it is (model.path, tokenizer.path), or checkpoint.allow_change=[{}]"
    changed_fields(saved, present, checkpoint_config.allow_change, checkpoint, fix)
