"""Our data, model and loss inside Megatron-LM's own training loop, for users who live there.

    torchrun --nproc-per-node 8 -m sft_fast.megatron.pretrain --sft-config my.yaml \\
        --micro-batch-size 1 --global-batch-size 64 --seq-length 8192 --train-iters 1000 \\
        --lr 1e-5 --bf16 --use-distributed-optimizer --tensor-model-parallel-size 2 ...

Megatron-LM's arguments decide everything that has one: layout, batch, schedule, optimizer,
checkpoints, logging. The YAML gives data, tokenizer, packing, model, LoRA and loss; its keys that
Megatron-LM has arguments for are replaced by them. The model is imported from `model.path`, so the
arguments that describe an architecture only have to satisfy Megatron-LM's parser.

What it needs:

- Megatron-LM's checkout on PYTHONPATH, and the package `six`, which it imports.
- torchrun, for one process too.
- `--num-layers`, `--hidden-size`, `--num-attention-heads` and `--max-position-embeddings`, which
  its parser requires; the model has its own.
- `--train-iters`, not `--train-samples`, and `--eval-interval`; `--eval-iters 0` without data.eval.
- `packing.alignment`, a multiple of twice `--context-parallel-size` where that is above 1.

The calls of `pretrain()` are known: that of Megatron-LM up to 0.17, which reads the command line
itself, and those of 0.18 and 0.19, which take the parsed configuration.
"""

import argparse
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import count
from typing import Any

import torch
from megatron.core.enums import ModelType

from sft_fast.config.schema import Config, load_config
from sft_fast.data.store import TokenStore
from sft_fast.exit_codes import USER_ERROR
from sft_fast.megatron.batches import BatchShape, batch_shape, open_batches
from sft_fast.megatron.device import init_device, install_cpu_shim
from sft_fast.megatron.forward_step import forward_step
from sft_fast.megatron.load_inputs import Inputs, read_inputs
from sft_fast.megatron.model import SFTModel
from sft_fast.megatron.parallel import Parallel, current_parallel
from sft_fast.megatron.starting_model import starting_model
from sft_fast.packing.from_config import make_plan
from sft_fast.packing.micro_batch import MicroBatch
from sft_fast.packing.steps import StepPlan
from sft_fast.registry import SFT, load_plugins

# What Megatron-LM must be told for our micro-batches and our loss; its `args_defaults` would not
# replace a default that is not None.
DEFAULTS = {
    "dataloader_type": "external",
    "calculate_per_token_loss": True,
    "tokenizer_type": "NullTokenizer",
    "vocab_size": 1,
}


def import_megatron_training() -> Any:
    """Returns the module `megatron.training`.

    Raises:
        ValueError: Megatron-LM is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module("megatron.training")
    except ImportError as error:
        raise ValueError(
            f"megatron.training cannot be imported ({error}); it comes with Megatron-LM: put "
            "its checkout on PYTHONPATH, or use sft_fast/train.py, which needs megatron-core only"
        ) from error


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron-LM's `extra_args_provider`."""
    group = parser.add_argument_group("sft_fast")
    group.add_argument("--sft-config", required=True, help="YAML with data, packing, model, loss")
    group.add_argument("--sft-override", action="append", default=[], metavar="a.b=c")
    parser.set_defaults(**DEFAULTS)
    return parser


def config_of(args: argparse.Namespace) -> Config:
    """The configuration that the YAML and Megatron-LM's arguments make together.

    Raises:
        ValueError: they do not fit together, or ask for what this loop cannot do.
    """
    if args.train_iters is None:
        raise ValueError(
            "--train-iters is missing; a run has a number of steps of one batch size, which "
            "--train-samples does not give: write --train-iters"
        )
    dtype = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    virtual = getattr(args, "virtual_pipeline_model_parallel_size", None)
    values = {
        "seed": args.seed,
        "model.dtype": dtype,
        "packing.capacity": args.seq_length,
        "train.steps": args.train_iters,
        "train.epochs": "null",
        "train.global_batch_size": args.global_batch_size,
        "train.micro_batch_size": args.micro_batch_size,
        "parallel.tensor": args.tensor_model_parallel_size,
        "parallel.pipeline": args.pipeline_model_parallel_size,
        "parallel.virtual_pipeline": virtual or 1,
        "parallel.context": args.context_parallel_size,
        "parallel.sequence": str(bool(args.sequence_parallel)).lower(),
    }
    given = [f"{key}={value}" for key, value in values.items()]
    config = load_config(args.sft_config, [*given, *args.sft_override])
    if not args.calculate_per_token_loss:
        raise ValueError(
            "--calculate-per-token-loss is off; the loss is a sum over the supervised tokens, "
            "which Megatron-LM divides by their number only with it"
        )
    if config.train.micro_batch_size > 1 and config.parallel.pipeline > 1:
        raise ValueError(
            f"--micro-batch-size is {config.train.micro_batch_size}; with pipeline stages "
            "Megatron-LM sends rows of --seq-length tokens, so it must be 1; raise --seq-length"
        )
    if config.stage != SFT:
        raise ValueError(
            f"stage is {config.stage}; Megatron-LM's loop trains sft, other stages need "
            "sft_fast/train.py"
        )
    if config.data.streaming:
        raise ValueError(
            "data.streaming needs sft_fast's own loop, whose checkpoints say how far the stream "
            "was read; set it to false"
        )
    if config.train.neftune_alpha > 0:
        raise ValueError(
            "train.neftune_alpha needs sft_fast's own loop, which tells the step; set it to 0"
        )
    for name, value in config.router.model_dump().items():
        if value > 0:
            raise ValueError(
                f"router.{name} needs sft_fast's own loop, which adds up the load of the experts; "
                "set it to 0"
            )
    return config


class Providers:
    """What Megatron-LM calls back, once it has made its process groups."""

    def __init__(self, training: Any):
        """Args:
        training: the module `megatron.training`.
        """
        self.training = training

    @cached_property
    def config(self) -> Config:
        """The configuration that the arguments name; its plugins are loaded."""
        config = config_of(self.training.get_args())
        load_plugins(config.plugins)
        return config

    @cached_property
    def parallel(self) -> Parallel:
        """The layout that Megatron-LM has set up."""
        return current_parallel(init_device())

    @cached_property
    def inputs(self) -> Inputs:
        """Tokenizer, model and stores; ValueError for weights per token."""
        inputs = read_inputs(self.config)
        assert isinstance(inputs.store, TokenStore), "config_of refuses streams"
        for store in (inputs.store, inputs.eval_store):
            if store is not None and store.weights is not None:
                raise ValueError(
                    f"{store.report.source} has weights per token, but Megatron-LM divides the "
                    "loss by the number of tokens; remove them, or train with sft_fast/train.py"
                )
        return inputs

    @cached_property
    def modules(self) -> list[SFTModel]:
        """The chunks of this rank, with their weights."""
        model = self.inputs.model
        return starting_model(self.config, model.architecture, model.weights, self.parallel)

    def datasets(
        self, num_samples: Any, vp_stage: int | None = None
    ) -> tuple[Iterator[MicroBatch], Iterator[MicroBatch] | None, None]:
        """`train_valid_test_datasets_provider`, with iterators for the external data loader.

        The training data goes on after `consumed_train_samples`; the evaluation data begins anew
        when it is used up.

        Returns: this rank's micro-batches for training, for evaluation (None without data), None.
        """
        args, config = self.training.get_args(), self.config
        begin = args.consumed_train_samples // config.train.global_batch_size
        steps = range(begin, config.train.steps or 0)
        store, eval_store = self.inputs.store, self.inputs.eval_store
        assert isinstance(store, TokenStore), "config_of refuses streams"
        shape = batch_shape(config.train, config.packing, config.model, self.parallel)
        plan = make_plan(store, config.packing, config.train, config.seed)
        train = micro_batches(store, plan, steps, shape, self.parallel)
        valid = None
        if eval_store is not None and args.eval_iters:
            most = config.evaluation.max_samples
            plan = make_plan(
                eval_store, config.packing, config.train, config.seed, max_samples=most
            )
            valid = endless(eval_store, plan, shape, self.parallel)
        return train, valid, None

    def model(
        self,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        **kwargs: Any,
    ) -> SFTModel:
        """`model_provider`: this rank's part of the model, not yet wrapped."""
        model = self.modules[vp_stage or 0]
        assert (model.pre_process, model.post_process) == (pre_process, post_process)
        return model


def micro_batches(
    store: TokenStore, plan: StepPlan, steps: range, shape: BatchShape, parallel: Parallel
) -> Iterator[MicroBatch]:
    """Yields this rank's micro-batches of some steps."""
    with open_batches(store, plan, steps, shape, parallel) as batches:
        yield from batches


def endless(
    store: TokenStore, plan: StepPlan, shape: BatchShape, parallel: Parallel
) -> Iterator[MicroBatch]:
    """Yields evaluation's micro-batches, again and again."""
    for epoch in count():
        begin = epoch * plan.num_steps_per_epoch
        steps = range(begin, begin + plan.num_steps_per_epoch)
        yield from micro_batches(store, plan, steps, shape, parallel)


def start(training: Any, step: Callable[..., Any]) -> None:
    """Calls `pretrain()` of the installed Megatron-LM."""
    providers = Providers(training)
    # A partial can carry the mark that every tensor-parallel rank reads its own micro-batches.
    datasets: Any = partial(providers.datasets)
    datasets.is_distributed = True
    # By name: the order of the arguments changes from release to release.
    call = partial(
        training.pretrain,
        train_valid_test_dataset_provider=datasets,
        model_provider=providers.model,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=step,
    )
    if "extra_args_provider" in inspect.signature(training.pretrain).parameters:
        call(extra_args_provider=add_arguments)
        return
    arguments = importlib.import_module("megatron.training.arguments")
    utilities = importlib.import_module("megatron.training.argument_utils")
    args = arguments.parse_and_validate_args(add_arguments)
    call(utilities.pretrain_cfg_container_from_args(args))


def is_ours(error: ValueError) -> bool:
    """Whether our code raised it, or what our code called: not Megatron-LM on its own."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [(frame.f_globals.get("__name__", ""), frame.f_code.co_name) for frame in frames]
    return any(
        module.startswith("sft_fast.") and function not in (main.__name__, start.__name__)
        for module, function in names
    )


def main() -> int:
    """Runs Megatron-LM's `pretrain()`; returns 0, or USER_ERROR where the input is wrong."""
    # Megatron-LM asks for a GPU before it calls us for the first time.
    install_cpu_shim()
    try:
        start(import_megatron_training(), forward_step)
    except ValueError as error:
        if not is_ours(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    exit_code = main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(exit_code)
