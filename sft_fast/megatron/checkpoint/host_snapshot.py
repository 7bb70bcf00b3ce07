"""Copies of a GPU's tensors in host memory that training does not wait for.

The copies run on a stream of their own beside the next step's forward and backward. Only the
optimizer's update changes what is copied, so only the update waits for them, on the GPU; the thread
that writes waits on the host.
"""

import contextlib
import mmap
import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sft_fast.constants import round_up
from sft_fast.errors import first_line

ALIGNMENT = 64  # bytes between the first elements of two tensors is a multiple of this


class HostBuffer:
    """Host memory of an exact size, page-locked where that works.

    torch's own page-locked memory comes in powers of two for each tensor, up to twice too much.
    """

    def __init__(self, num_bytes: int):
        """Raises MemoryError where there is not as much."""
        try:
            memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{num_bytes / 1e9:.1f} GB of host memory: {error}") from None
        # Without large pages, locking them takes longer; a child process must not copy them.
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            with contextlib.suppress(AttributeError, OSError):
                memory.madvise(getattr(mmap, advice))
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8)
        status = torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), num_bytes, 0)
        self.is_locked = int(status) == 0
        if not self.is_locked:
            forget_last_error()
            return
        # Memory that goes while it is locked leaves a mapping that later allocations run into.
        self.unlock = weakref.finalize(self, unlock, self.bytes.data_ptr())
        self.unlock.atexit = False

    def release(self) -> None:
        """Unlocks the pages."""
        if self.is_locked:
            self.unlock()
            self.is_locked = False


def unlock(address: int) -> None:
    """Makes the pages at an address ordinary again."""
    torch.cuda.cudart().cudaHostUnregister(address)


def forget_last_error() -> None:
    """Takes the error of a call that failed, which else the next kernel would be blamed for."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)


class HostCopier:
    """The copies of one save after the other, in one buffer; a new save overwrites the last."""

    def __init__(self, log: Callable[[str], None] = print):
        self.log = log
        self.buffer: HostBuffer | None = None
        self.reserving: threading.Thread | None = None
        self.stream: torch.cuda.Stream | None = None
        self.copied: torch.cuda.Event | None = None

    def prepare(self, tensors: Sequence[Tensor]) -> None:
        """Reserves memory for tensors of these shapes in a thread: locking 5 GB takes a second."""
        if not any(tensor.is_cuda for tensor in tensors):
            return
        _, num_bytes = places(tensors)
        self.reserving = threading.Thread(
            target=self.reserve_on, args=(torch.cuda.current_device(), num_bytes), daemon=True
        )
        self.reserving.start()

    def reserve_on(self, device: int, num_bytes: int) -> None:
        """Runs in the thread, which begins on the first GPU."""
        torch.cuda.set_device(device)
        # What is missing now may be there at the first save, which says so otherwise.
        with contextlib.suppress(MemoryError):
            self.reserve(num_bytes)

    def finish_reserving(self) -> None:
        """Waits for the thread that reserves memory."""
        if self.reserving is not None:
            self.reserving.join()
            self.reserving = None

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Starts copies of contiguous tensors of any shape; `wait` waits until they are there.

        Without a GPU's tensors they are made at once.

        Raises:
            MemoryError: the host has no room for them.
        """
        if not any(tensor.is_cuda for tensor in tensors):
            return clones(tensors)
        hosts = self.host_tensors(tensors)
        self.stream = self.stream or torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for host, tensor in zip(hosts, tensors, strict=True):
                host.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
                if tensor.is_cuda:
                    tensor.record_stream(self.stream)
            self.copied = self.stream.record_event()
        return hosts

    def host_tensors(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors in the buffer, each of the shape and dtype of its original."""
        self.finish_reserving()
        begins, num_bytes = places(tensors)
        data = self.reserve(num_bytes)
        return [
            data[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for begin, tensor in zip(begins, tensors, strict=True)
        ]

    def reserve(self, num_bytes: int) -> Tensor:
        """A host buffer, uint8 [at least num_bytes]; the present one if it is large enough."""
        if self.buffer is None or self.buffer.bytes.numel() < num_bytes:
            self.free_buffer()
            self.buffer = HostBuffer(num_bytes)
            if not self.buffer.is_locked:
                self.log(
                    f"warning: {num_bytes / 1e9:.1f} GB of host memory could not be page-locked "
                    "for checkpoint.asynchronous; saves hold training up while they copy"
                )
        return self.buffer.bytes

    def before_update(self) -> None:
        """To be called before what is copied changes: the current stream waits, the host not."""
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)

    def wait(self) -> None:
        """Waits until the copies are in host memory; for the thread that reads them."""
        if self.copied is not None:
            self.copied.synchronize()

    def release(self) -> None:
        """Gives the memory back; nothing may read or write copies any more."""
        self.finish_reserving()
        self.free_buffer()

    def free_buffer(self) -> None:
        """Gives the buffer back once nothing is copied to it."""
        if self.buffer is not None:
            self.wait()
            self.buffer.release()
        self.buffer = None


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors of any shape; MemoryError where there is no room."""
    try:
        return [tensor.detach().clone() for tensor in tensors]
    except RuntimeError as error:  # what torch's CPU allocator raises
        raise MemoryError(first_line(error)) from None


def places(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each tensor, of any shape, begins in a buffer, and the size of the buffer; bytes."""
    begins, end = [], 0
    for tensor in tensors:
        begins.append(end)
        end += round_up(tensor.nbytes, ALIGNMENT)
    return begins, max(end, ALIGNMENT)
