"""One step of a layer's kernel in three ways: ours, eager in the same dtype, and the truth."""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from closeness import assert_no_worse
from kernel_pool import ON_GPU, seeded

# Triton's interpreter cuts bfloat16 off where GPUs round to nearest.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
Step = Callable[..., Tensor | tuple[Tensor, ...]]


def load(backend: str) -> ModuleType:
    """A backend of the layer's kernels; triton is imported in the ranks only."""
    from importlib import import_module

    return import_module(f"sft_fast.kernels.block_{backend}")


def outputs_and_gradients(
    step: Step, inputs: Sequence[Tensor], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The results of a step of `inputs`, then the gradient of each input.

    The upstream gradients are always the same numbers, rounded to dtype.
    """
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = step(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    upstream = [
        torch.randn(output.shape, generator=seeded(number)).to(dtype).to(output.dtype)
        for number, output in enumerate(outputs)
    ]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    return [*(output.detach() for output in outputs), *gradients]


def compare(ours: Step, eager: Step, oracle: Step, inputs: Sequence[Tensor]) -> None:
    """Fails unless results and gradients of ours are no worse than eager's."""
    dtype = inputs[0].dtype
    results = outputs_and_gradients(ours, inputs, dtype)
    same_dtype = outputs_and_gradients(eager, inputs, dtype)
    truth = outputs_and_gradients(oracle, [tensor.double() for tensor in inputs], dtype)
    for result, plain, true in zip(results, same_dtype, truth, strict=True):
        assert result.dtype == plain.dtype
        assert_no_worse(result, plain, true)
