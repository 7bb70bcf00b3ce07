"""The CPU shim answers megatron's CUDA calls and changes nothing else in torch."""

import subprocess
import sys

import pytest
import torch

from rank_pool import RankPool

PROBE = """
import torch
import sft_fast.megatron.training
from sft_fast.megatron.device import FACTORIES, install_cpu_shim
assert not torch.cuda.is_available()
assert torch.ones(2).type() == "torch.FloatTensor", "an import has changed torch"
install_cpu_shim()
arguments = {"arange": (3,), "as_tensor": ([1.0],), "tensor": ([1.0],), "full": ((2,), 1.0),
             "randint": (0, 5, (2,)), "full_like": (torch.ones(2), 1.0)}
for name in FACTORIES:
    default = (torch.ones(2),) if name.endswith("_like") else ((2,),)
    make = lambda **options: getattr(torch, name)(*arguments.get(name, default), **options)
    for device in ("cuda", torch.device("cuda", 1)):
        assert make(device=device).device.type == "cpu", name
    assert make(device="meta").device.type == "meta", name
    if not name.endswith("_like"):
        with torch.device("meta"):
            assert make().device.type == "meta", name
ones = torch.ones(2)
assert ones.cuda() is ones and ones.to("cuda").device.type == "cpu"
assert ones.type() == "torch.cuda.FloatTensor" and ones.type(torch.int32).dtype == torch.int32
state = torch.cuda.get_rng_state()
first = torch.rand(3)
torch.cuda.set_rng_state(state)
assert torch.equal(torch.rand(3), first)
assert torch.compile(lambda value: value + 1, backend="eager")(ones).tolist() == [2.0, 2.0]
print("fine")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing is redirected")
def test_the_shim_redirects_cuda_when_it_is_called_and_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr


@pytest.mark.gpu
def test_with_a_gpu_torch_is_left_alone() -> None:
    import torch

    from sft_fast.megatron.device import install_cpu_shim

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    install_cpu_shim()
    assert torch.ones(1).type() == "torch.FloatTensor"
    assert isinstance(torch.cuda.current_device(), int)


def gathered(lengths: list[int]) -> list[list[float]]:
    """What a rank gathers when rank r gives lengths[r] numbers r."""
    import torch.distributed as dist

    from sft_fast.megatron.device import install_cpu_shim

    install_cpu_shim()
    outputs = [torch.full((length, 1), -1.0) for length in lengths]
    rank = dist.get_rank()
    dist.all_gather(outputs, torch.full((lengths[rank], 1), float(rank)))
    return [output[:, 0].tolist() for output in outputs]


@pytest.mark.parametrize("lengths", [[1, 3], [2, 2], [0, 2]])
def test_tensors_of_different_lengths_are_gathered(rank_pool: RankPool, lengths: list[int]) -> None:
    expected = [[float(rank)] * length for rank, length in enumerate(lengths)]
    assert rank_pool.run(2, gathered, lengths) == [expected, expected]
