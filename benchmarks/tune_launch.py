"""Times the Triton loss kernels over launch shapes: what LaunchConfig.for_shape was chosen from.

    python benchmarks/tune_launch.py

Prints one line per shape: forward and backward as a fraction of a large copy's bytes per second.
"""

import itertools
from functools import partial
from operator import itemgetter
from unittest import mock

import torch

from sft_fast.kernels import masked_cross_entropy_triton as kernels
from sft_fast.kernels.loss_options import LossOptions
from sft_fast.kernels.masked_cross_entropy import VocabColumns
from timing import DEVICE, copy_bytes_per_s, median_s

PROBLEMS = [(16384, 128256), (5734, 128256), (5734, 16032), (410, 128256), (4096, 32000)]
BLOCKS = [1024, 2048, 4096, 8192, 16384]
WARPS = [4, 8, 16, 32]


def main() -> None:
    ceiling = copy_bytes_per_s()
    print(f"copy {ceiling / 1e12:.2f} TB/s")
    for num_rows, width in PROBLEMS:
        logits = torch.randn(num_rows, width, device=DEVICE, dtype=torch.bfloat16)
        labels = torch.randint(width, (num_rows,), device=DEVICE)
        grads = torch.ones(2, num_rows, device=DEVICE)
        shipped = kernels.launch_config(logits)
        results = []
        for block, num_warps in itertools.product(BLOCKS, WARPS):
            if not 2 <= block // (32 * num_warps) <= 64:
                continue
            for num_splits in {1, shipped.num_splits}:
                config = kernels.LaunchConfig(block, num_splits, num_warps)
                with mock.patch.object(kernels, "launch_config", return_value=config):
                    columns, options = VocabColumns(0, width, width), LossOptions()
                    forward_args = logits, labels, columns, options, False
                    statistics = kernels.shard_statistics(*forward_args)
                    gradient = torch.empty_like(logits)
                    rest = (labels, statistics, grads, columns, options)
                    forward = median_s(partial(kernels.shard_statistics, *forward_args))
                    backward = median_s(partial(kernels.write_gradient, gradient, logits, *rest))
                size = logits.numel() * 2
                results.append((size / forward / ceiling, 2 * size / backward / ceiling, config))
        print(f"{num_rows} x {width}, shipped {shipped}")
        for name, place in (("forward", 0), ("backward", 1)):
            for result in sorted(results, key=itemgetter(place), reverse=True)[:4]:
                print(f"  {name} {result[place]:.3f} {result[2]}")
            worst = min(results, key=itemgetter(place))
            print(f"  {name} {worst[place]:.3f} {worst[2]} (slowest)")


if __name__ == "__main__":
    main()
