"""DDP, optimizer and learning-rate schedule, all megatron-core's."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from torch.nn import ModuleList

from sft_fast.config.sections import ModelConfig, OptimConfig, ParallelConfig
from sft_fast.megatron.hf import ADAPTER_PREFIX
from sft_fast.megatron.memory import optimizer_offload_options
from sft_fast.megatron.model import DTYPES, SFTModel
from sft_fast.megatron.parallel import Parallel
from sft_fast.megatron.without_apex import provide_clipping

# fp16 only; the loss is a sum over tokens, so megatron's 2**32 would overflow for many steps.
INITIAL_LOSS_SCALE = 2.0**16


def wrap_model(
    modules: Sequence[SFTModel], model: ModelConfig, parallel: ParallelConfig
) -> ModuleList:
    """Adds mixed precision and data parallelism; gradients accumulate and reduce in fp32.

    Args:
        modules: the parts of the model that this rank holds, first layers first.
        model: section of the run, for the number format.
        parallel: section of the run.

    Returns: a DistributedDataParallel for each.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        average_in_collective=False,
    )
    chunks = ModuleList()
    for module in modules:
        typed = module if model.dtype == "fp32" else Float16Module(module.config, module)
        # The gradients of later chunks come first, so that only the first chunk's are in buckets.
        ddp = DistributedDataParallel(
            module.config, ddp_config, typed, disable_bucketing=len(chunks) > 0
        )
        chunks.append(ddp)
    return chunks


def build_optimizer(
    model: ModuleList,
    model_config: ModelConfig,
    parallel_config: ParallelConfig,
    optim: OptimConfig,
    parallel: Parallel,
    b_lr_ratio: float = 1.0,
) -> MegatronOptimizer:
    """AdamW; moments and master weights are sharded when parallel.distributed_optimizer is on.

    Args:
        model: what `wrap_model` returned.
        model_config: section of the run.
        parallel_config: section of the run.
        optim: section of the run.
        parallel: this rank's place.
        b_lr_ratio: learning rate of the adapters' B over that of all else.
    """
    dtype = DTYPES[model_config.dtype]
    provide_clipping()
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        params_dtype=dtype,
        initial_loss_scale=INITIAL_LOSS_SCALE,
        use_distributed_optimizer=parallel_config.distributed_optimizer,
        **optimizer_offload_options(optim, parallel),
    )
    optimizer = get_megatron_optimizer(
        optimizer_config,
        list(model),
        lr_overrides(optimizer_config, b_lr_ratio),
        use_gloo_process_groups=False,
    )
    fuse_update(optimizer)
    allocate_adam_state(optimizer)
    return optimizer


def lr_overrides(config: OptimizerConfig, b_lr_ratio: float) -> dict[ParamKey, Any] | None:
    """What sets groups of parameters apart; None = what megatron's own does.

    Source of LoRA+: Hayou et al. 2024 (arXiv 2402.12354).
    """
    if b_lr_ratio == 1.0:
        return None
    rates = {"max_lr": config.lr * b_lr_ratio, "min_lr": config.min_lr * b_lr_ratio}
    # The schedule goes by the rates; a checkpoint tells groups apart by the multiple.
    of_b = {**rates, "lr_mult": b_lr_ratio}
    own = ParamKey(name=f"*.{ADAPTER_PREFIX}b_*")
    return {**get_standard_config_overrides(config), own: of_b}


def ready_gradients(optimizer: MegatronOptimizer) -> float | None:
    """Makes the gradients of a step ready for the update: in fp32, without the scale of fp16.

    Returns: their norm, on the host; None where fp16 gradients overflowed.
    """
    return None if optimizer.prepare_grads() else float(optimizer.get_grad_norm())


@torch.no_grad()
def clip_and_update(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Moves weights and moments by gradients that are ready and have this norm.

    After `ready_gradients` it is the rest of megatron's `optimizer.step()`, which leaves nobody the
    time to look at the norm and refuse.
    """
    for part in optimizer_parts(optimizer):
        config, parameters = part.config, part.get_parameters()
        if parameters and config.clip_grad > 0:
            # Adam with a share of its state on the host reads `decoupled_grad`, not `grad`.
            is_decoupled = config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, config.clip_grad, grad_norm, is_decoupled)
    was_updated = optimizer.step_with_ready_grads()
    assert was_updated, "fp16 gradients that overflow are refused before"


def optimizer_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Those that megatron has chained, or the one there is."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def torch_adam_parts(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """The torch Adam optimizers inside, offloaded ones too; Transformer Engine and Apex may provide
    others."""
    found = [
        adam
        for part in optimizer_parts(optimizer)
        for adam in getattr(part.optimizer, "sub_optimizers", [part.optimizer])
    ]
    return [adam for adam in found if isinstance(adam, torch.optim.Adam)]


def fuse_update(optimizer: MegatronOptimizer) -> None:
    """Makes torch's Adam update in one kernel; the groups that a load restores may say otherwise.

    Its default, a kernel for each operation, holds 4 bytes a weight more while it updates.
    """
    for adam in torch_adam_parts(optimizer):
        for group in adam.param_groups:
            group.update(fused=True, foreach=False)


def separate_step_counts(optimizer: MegatronOptimizer) -> None:
    """Gives each parameter its own step tensor, on its device as the fused update wants it.

    megatron restores one tensor for all of them; Adam would then add one to it per parameter.
    """
    for adam in torch_adam_parts(optimizer):
        for parameter, state in adam.state.items():
            state["step"] = state["step"].to(parameter.device, copy=True)


def allocate_adam_state(optimizer: MegatronOptimizer) -> None:
    """Gives torch's Adam its state of step 0: megatron saves and loads none that is missing.

    Likewise the offloaded Adam, which to load would else make a step with random gradients, after
    the weights were loaded.
    """
    for part in optimizer_parts(optimizer):
        adam = part.optimizer
        if isinstance(adam, HybridDeviceOptimizer):
            for one in adam.sub_optimizers:
                allocate_moments(one)
            adam._sync_sub_optimizers_state_to_hdo()
        elif isinstance(adam, torch.optim.Adam):
            allocate_moments(adam)


def allocate_moments(adam: torch.optim.Optimizer) -> None:
    """Gives each parameter moments, like it, before its first step."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                names = ("exp_avg", "exp_avg_sq")
                adam.state[parameter] = {name: torch.zeros_like(parameter) for name in names}
                # Transformer Engine and Apex count the steps of a group.
                if isinstance(adam, torch.optim.Adam):
                    adam.state[parameter]["step"] = torch.tensor(0.0, device=parameter.device)


def build_lr_schedule(
    optimizer: MegatronOptimizer, optim: OptimConfig, num_steps: int
) -> OptimizerParamScheduler:
    """Linear warm-up, then `optim.decay`; counted in optimizer steps."""
    decay_steps = max(optim.decay_steps or num_steps, optim.warmup_steps + 1)
    end_weight_decay = optim.end_weight_decay
    grows = end_weight_decay is not None
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=optim.decay,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay if end_weight_decay is None else end_weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style=optim.weight_decay_growth if grows else "constant",
        wsd_decay_steps=optim.wsd_decay_steps,
        lr_wsd_decay_style=optim.wsd_decay,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def connect_schedule(model: ModuleList, optimizer: MegatronOptimizer) -> None:
    """Gives megatron's pipeline schedule the hooks it looks for on the model's config."""
    chunks = parts_of(model)
    config = chunks[0].config
    config.grad_scale_func = optimizer.scale_loss
    # A list only where there are several chunks: the schedules without interleaving call it.
    config.no_sync_func = one_or_all([chunk.no_sync for chunk in chunks])
    if chunks[0].ddp_config.overlap_param_gather:
        config.param_sync_func = one_or_all([chunk.start_param_sync for chunk in chunks])


def parts_of(model: ModuleList) -> list[Any]:
    """The DistributedDataParallel parts of `wrap_model`."""
    return list(model)


def one_or_all(functions: list[Any]) -> Any:
    """The only element, or the list."""
    return functions[0] if len(functions) == 1 else functions


def gather_parameters(model: ModuleList) -> None:
    """Makes every rank's parameters whole, which overlap leaves to the next forward."""
    for chunk in parts_of(model):
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def normalise_by(model: ModuleList, loss_weight: float) -> None:
    """Makes this step's gradient the weighted mean over the global batch's supervised tokens.

    The sum of their weights comes from the packing plan, so no device has to be asked for it and
    no collective carries it; megatron's own way would do both. A loss of a layer's own, beside that
    of the tokens, finds it in its config, too.
    """
    config = parts_of(model)[0].config
    config.loss_weight, config.finalize_model_grads_func = loss_weight, divide_by_weight


def divide_by_weight(model: list[Any], num_tokens: Any, **kwargs: Any) -> None:
    """megatron's end of a backward pass, with the gradients divided by the weights of the step."""
    finalize_model_grads(model, None, **kwargs)
    for chunk in model:
        chunk.scale_gradients(1.0 / (model[0].config.loss_weight or 1.0))
