"""The model that a run begins with: allocated, loaded, with its adapters."""

from collections.abc import Callable

from sft_fast.config.schema import Config
from sft_fast.megatron.hf import WeightSource, load_hf_weights
from sft_fast.megatron.lora import add_adapters
from sft_fast.megatron.model import SFTModel, build_model
from sft_fast.megatron.parallel import Parallel
from sft_fast.models.architecture import Architecture
from sft_fast.runtime.phases import no_report
from sft_fast.stages import stage_of


def starting_model(
    config: Config,
    architecture: Architecture,
    weights: WeightSource | None,
    parallel: Parallel,
    tensor_done: Callable[[], None] = no_report,
) -> list[SFTModel]:
    """This rank's chunks, with LoRA's adapters where the configuration has them.

    Args:
        config: the configuration.
        architecture: of the model.
        weights: what is loaded; None = nothing, the weights are undefined. LoRA needs them.
        parallel: this rank's place.
        tensor_done: called after each slice, see runtime.phases.
    """
    modules = build_model(
        architecture,
        config.model,
        config.parallel,
        config.lora,
        config.loss,
        parallel,
        stage_of(config),
    )
    for module in modules:
        if weights is not None:
            load_hf_weights(module, weights, architecture, parallel, tensor_done)
        if config.lora.rank > 0:
            assert weights is not None, "adapters stand beside weights"
            add_adapters(module, architecture, config.model, config.lora, config.seed, parallel)
    return modules
