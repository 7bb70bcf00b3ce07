"""Activations whose memory is free between the forward and the backward pass.

Cheaper than megatron-core's checkpoints where one kernel makes the tensor out of what is kept
anyway: nothing is run twice under autograd, and no random numbers are put back.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def free_until_backward(tensor: Tensor, write: Callable[[Tensor], None], result: Tensor) -> None:
    """Frees a tensor's memory, and fills it again when the gradient of `result` is known.

    Args:
        tensor: contiguous, alone in its memory; nobody reads it in the forward pass any more.
        write: writes its numbers again into the tensor that it gets.
        result: what was computed from it: all that need it in the backward pass come later.
    """
    if not (torch.is_grad_enabled() and result.requires_grad):
        return
    storage, num_bytes = tensor.untyped_storage(), tensor.untyped_storage().nbytes()
    assert num_bytes == tensor.numel() * tensor.element_size(), "a view of something larger"
    # Not the tensor itself: autograd would take the writing for a change.
    again = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    again.set_(storage, 0, tensor.shape, tensor.stride())
    storage.resize_(0)
    pending = [(write, again)]

    def fill(_: Tensor) -> None:
        if pending:
            # Taken out, because the hook outlives what the layer's backward pass lets go.
            write, again = pending.pop()
            again.untyped_storage().resize_(num_bytes)
            with torch.no_grad():
                write(again)

    result.register_hook(fill)


def trains(*modules: torch.nn.Module) -> bool:
    """Whether anything of them has a gradient, for which they keep their input."""
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())
