"""The meter of the training loop: what a step costs on these devices, and where its lines go."""

import torch

from sft_fast.config.sections import LoraConfig, MetricsConfig
from sft_fast.megatron.parallel import Parallel
from sft_fast.metrics.writer import MetricsWriter, StepMeter
from sft_fast.models.architecture import Architecture
from sft_fast.models.flops import Workload, training_flops
from sft_fast.models.hardware import find_gpu
from sft_fast.packing.steps import StepCounts


def step_meter(
    writer: MetricsWriter,
    metrics: MetricsConfig,
    lora: LoraConfig,
    architecture: Architecture,
    num_steps: int,
    parallel: Parallel,
) -> StepMeter:
    """Starts the line of the training loop."""

    def flops(counts: StepCounts) -> float:
        workload = Workload(counts.num_tokens, counts.sum_squared_lengths, counts.num_supervised)
        return training_flops(architecture, workload, lora=lora.rank > 0)

    peak_tflops = metrics.peak_tflops
    if peak_tflops is None and parallel.device.type == "cuda":
        gpu = find_gpu(torch.cuda.get_device_name())
        peak_tflops = None if gpu is None else gpu.bf16_tflops
    return StepMeter(
        writer,
        num_steps,
        metrics.log_every_steps,
        flops,
        None if peak_tflops is None else peak_tflops * 1e12 * parallel.world_size,
    )
