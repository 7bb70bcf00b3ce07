"""Copies to host memory: what waits for what, and whose memory it is."""

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

import pytest

from rank_pool import RankPool
from tiny import VOCAB_SIZE, make_config, make_store, random_samples

torch = pytest.importorskip("torch")


class DeviceTensor(torch.Tensor):
    """A CPU's tensor that says it is a GPU's."""

    is_cuda = True

    def record_stream(self, stream: Any) -> None:
        pass


class FakeGPU:
    """What HostCopier asks of torch.cuda; notes the order."""

    def __init__(self, patch: pytest.MonkeyPatch, status: int = 0):
        self.log: list[str] = []
        self.registered: dict[int, int] = {}
        self.status = status
        self.current = "main"
        names = ("Stream", "stream", "current_stream", "cudart", "current_device", "set_device")
        for name in names:
            patch.setattr(torch.cuda, name, getattr(self, name))
        original = torch.Tensor.copy_

        def copy(target: Any, source: Any, non_blocking: bool = False) -> Any:
            self.log.append(f"copy on {self.current}")
            return original(target, source.as_subclass(torch.Tensor))

        patch.setattr(torch.Tensor, "copy_", copy)

    def Stream(self) -> "FakeStream":
        return FakeStream(self, "side")

    def current_stream(self) -> "FakeStream":
        return FakeStream(self, self.current)

    @contextlib.contextmanager
    def stream(self, stream: "FakeStream") -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def cudart(self) -> "FakeGPU":
        return self

    def current_device(self) -> int:
        return 3

    def set_device(self, device: int) -> None:
        self.log.append(f"device {device}")

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if self.status == 0:
            self.registered[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> None:
        del self.registered[address]


class FakeStream:
    def __init__(self, gpu: FakeGPU, name: str):
        self.gpu, self.name = gpu, name

    def wait_stream(self, other: "FakeStream") -> None:
        self.gpu.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> "FakeEvent":
        self.gpu.log.append(f"event on {self.name}")
        return FakeEvent(self.gpu)

    def wait_event(self, event: "FakeEvent") -> None:
        self.gpu.log.append(f"{self.name} waits for the event")


class FakeEvent:
    def __init__(self, gpu: FakeGPU):
        self.gpu = gpu

    def synchronize(self) -> None:
        self.gpu.log.append("host waits for the event")


def device_tensor(*values: float, dtype: Any = torch.float32) -> Any:
    return torch.tensor(values, dtype=dtype).as_subclass(DeviceTensor)


def test_update_waits_on_the_stream_and_the_writer_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sft_fast.megatron.checkpoint.host_snapshot import HostCopier

    gpu, copier = FakeGPU(monkeypatch), HostCopier()
    copier.before_update()
    copier.wait()
    assert gpu.log == [], "there is nothing to wait for"
    copies = copier.copy([device_tensor(1, 2, 3), device_tensor(4, dtype=torch.bfloat16)])
    assert gpu.log == ["side waits for main", *["copy on side"] * 2, "event on side"]
    copier.before_update()
    copier.wait()
    assert gpu.log[-2:] == ["main waits for the event", "host waits for the event"]
    assert [copy.tolist() for copy in copies] == [[1, 2, 3], [4]]
    assert copies[1].dtype == torch.bfloat16


def test_memory_is_of_exact_size_reused_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_fast.megatron.checkpoint.host_snapshot import HostCopier

    said: list[str] = []
    gpu = FakeGPU(monkeypatch)
    copier = HostCopier(said.append)
    (first,) = copier.copy([device_tensor(*range(48))])
    assert list(gpu.registered.items()) == [(first.data_ptr(), 192)]
    (second,) = copier.copy([device_tensor(*range(16))])
    assert second.data_ptr() == first.data_ptr()
    copier.copy([device_tensor(*range(64))])
    assert list(gpu.registered.values()) == [256], "the smaller one is given back"
    copier.release()
    assert not gpu.registered and not said


def test_memory_is_reserved_ahead_on_the_rank_s_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_fast.megatron.checkpoint.host_snapshot import HostCopier

    gpu, copier = FakeGPU(monkeypatch), HostCopier()
    tensors = [device_tensor(*range(48)), device_tensor(1)]
    copier.prepare(tensors)
    assert copier.reserving is not None
    copier.reserving.join()
    assert gpu.log == ["device 3"] and list(gpu.registered.values()) == [256]
    (first, _) = copier.copy(tensors)
    assert list(gpu.registered) == [first.data_ptr()]
    copier.release()
    copier.prepare([torch.zeros(3)])
    assert not gpu.registered, "tensors of the host need nothing"


def test_forgotten_memory_is_unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_fast.megatron.checkpoint.host_snapshot import HostCopier

    gpu, copier = FakeGPU(monkeypatch), HostCopier()
    copies = copier.copy([device_tensor(1, 2)])
    assert gpu.registered
    del copier
    assert not gpu.registered and copies[0].tolist() == [1, 2]


def test_memory_that_cannot_be_locked_is_used_and_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sft_fast.megatron.checkpoint import host_snapshot

    FakeGPU(monkeypatch, status=2)
    cleared: list[bool] = []
    said: list[str] = []
    monkeypatch.setattr(host_snapshot, "forget_last_error", lambda: cleared.append(True))
    copier = host_snapshot.HostCopier(said.append)
    for _ in range(2):
        (copy,) = copier.copy([device_tensor(1, 2)])
        assert copy.tolist() == [1, 2]
    assert len(said) == len(cleared) == 1 and "page-locked" in said[0]
    copier.release()


def test_missing_memory_is_a_memory_error_and_may_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sft_fast.megatron.checkpoint import host_snapshot

    FakeGPU(monkeypatch)
    copier = host_snapshot.HostCopier()
    real, tensors = host_snapshot.mmap.mmap, [device_tensor(1, 2)]

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(host_snapshot.mmap, "mmap", full)
    copier.prepare(tensors)
    assert copier.reserving is not None
    copier.reserving.join()
    with pytest.raises(MemoryError, match="GB of host memory: .*Cannot allocate memory"):
        copier.copy(tensors)
    monkeypatch.setattr(host_snapshot.mmap, "mmap", real)
    (copy,) = copier.copy(tensors)
    assert copy.tolist() == [1, 2]
    copier.release()


def test_a_clone_without_memory_is_a_memory_error() -> None:
    from sft_fast.megatron.checkpoint.host_snapshot import HostCopier

    # More than there are addresses, in one byte of storage.
    huge = torch.zeros(1, dtype=torch.uint8).expand(2**62)
    with pytest.raises(MemoryError, match="memory"):
        HostCopier().copy([huge])


def test_without_a_gpu_copies_are_made_at_once() -> None:
    from sft_fast.megatron.checkpoint.host_snapshot import HostCopier

    tensor = torch.arange(3)
    (copy,) = HostCopier().copy([tensor])
    tensor.add_(1)
    assert copy.tolist() == [0, 1, 2]


def order_of_a_step() -> list[str]:
    from sft_fast.megatron.batches import open_batches
    from sft_fast.megatron.hf import RandomSource
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.megatron.train_step import build_run, train_step
    from sft_fast.models.architecture import architecture_from_shape
    from sft_fast.packing.from_config import make_plan

    config = make_config()
    parallel = init_parallel(config.parallel, config.train, config.seed)
    architecture = architecture_from_shape(config.model.shape, VOCAB_SIZE)
    run = build_run(config, architecture, RandomSource(architecture, 1), 9, parallel)
    log: list[str] = []
    update = run.optimizer.step_with_ready_grads

    def noted_update() -> bool:
        log.append("update")
        return update()

    run.optimizer.step_with_ready_grads = noted_update
    run.copier.before_update = lambda: log.append("wait")
    store = make_store(random_samples(8, seed=3))
    plan = make_plan(store, config.packing, config.train, config.seed)
    with open_batches(store, plan, range(1), run.shape, parallel) as batches:
        train_step(run, batches, plan.counts(0))
    return log


def test_a_step_waits_before_the_update(rank_pool: RankPool) -> None:
    assert rank_pool.run(1, order_of_a_step) == [["wait", "update"]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_does_not_change_what_is_copied() -> None:
    from sft_fast.megatron.checkpoint.host_snapshot import HostCopier

    said: list[str] = []
    copier = HostCopier(said.append)
    for number in range(3):
        tensors = [torch.full((2**26,), float(number), device="cuda") for _ in range(4)]
        copies = copier.copy(tensors)
        copier.before_update()
        for tensor in tensors:
            tensor.add_(1)
        copier.wait()
        assert all(bool((copy == number).all()) for copy in copies)
    assert not said
    copier.release()
