"""Whether a run starts from the model that transformers loads, and whether that was trained."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from sft_fast.config.sections import ModelConfig
from sft_fast.data.stream import SampleStream, TrainingData
from sft_fast.megatron.compare import (
    TOLERANCE,
    ProbeStore,
    is_compared,
    mean_loss,
    our_logits,
    relative_error,
    their_logits,
)
from sft_fast.megatron.load_inputs import Model
from sft_fast.megatron.model import SFTModel
from sft_fast.megatron.parallel import Parallel

MOST_TOKENS = 256
LONGEST = 128
FEWEST_TOKENS = 16  # fewer say nothing of the mean loss
RANDOM_MARGIN = 0.25
"""Nats below the logarithm of the vocabulary: several standard errors of MOST_TOKENS tokens."""


def check_source(
    models: Sequence[SFTModel],
    model: ModelConfig,
    source: Model,
    data: TrainingData,
    parallel: Parallel,
) -> str:
    """Computes one packed row before the first step; every rank calls it.

    A stage's own head has no source, so with one there is nothing to compare.

    Args:
        models: this rank's chunks, with the weights of the source.
        model: section of the configuration.
        source: what was loaded.
        data: for training.
        parallel: this rank's place.

    Returns: what was seen, for the log; "" if nothing was.

    Raises:
        ValueError: on every rank, the model knows nothing of the text, or transformers computes
            something else.
    """
    has_source = source.folder is not None and not model.random_init
    has_logits = source.architecture.num_outputs is None and parallel.cp_size == 1
    if not (has_source and has_logits) or model.verify == "never":
        return ""
    row = first_row(first_samples(data), source.num_known)
    if row is None:
        return ""
    logits = our_logits(models, row, source.architecture, parallel)[:, : source.num_known]
    loss = mean_loss(logits, row)
    seen = f"the loss of {len(row.tokens)} tokens before training is {loss:.3f}"
    uniform = math.log(source.num_known)
    if len(row.tokens) >= FEWEST_TOKENS and not loss < uniform - RANDOM_MARGIN:
        raise ValueError(
            f"model.path: {seen}, and that of a model that knows nothing of the text "
            f"{uniform:.3f} (the logarithm of the vocabulary); expected trained weights: look at "
            "model.path and tokenizer.path, say model.random_init=true to begin with random "
            "weights, or model.verify=never to train these all the same"
        )
    if not is_compared(model.verify, source.architecture, parallel):
        return seen
    problem = [compared(row, logits, model, source) if parallel.is_main else ""]
    dist.broadcast_object_list(problem, src=0, device=parallel.device)
    if problem[0]:
        raise ValueError(problem[0])
    return f"{seen}, as in transformers"


def first_samples(data: TrainingData) -> Iterator[NDArray[np.uint32]]:
    """Yields uint32 [tokens], the beginning of each sample."""
    if isinstance(data, SampleStream):
        for sample in data.head():
            yield sample.tokens[:LONGEST]
        return
    for begin, end in pairwise(data.offsets):
        yield data.tokens[begin : min(end, begin + LONGEST)]


def first_row(beginnings: Iterator[NDArray[np.uint32]], num_known: int) -> ProbeStore | None:
    """A row of beginnings, up to a token that the source does not know.

    Returns: None if no sample begins with two tokens that it knows.
    """
    samples, left = [], MOST_TOKENS
    for beginning in beginnings:
        ids = beginning[:left]
        unknown = (ids >= num_known).nonzero()[0]
        ids = ids[: unknown[0]] if len(unknown) else ids
        if len(ids) > 1:
            samples.append(ids)
            left -= len(ids)
        if left < 2:
            break
    return ProbeStore.of(samples) if samples else None


def compared(row: ProbeStore, logits: Tensor, model: ModelConfig, source: Model) -> str:
    """What is wrong with logits [tokens, vocabulary], in transformers' eyes; "" = nothing."""
    assert source.folder is not None
    theirs = their_logits(source.folder, row, source.architecture, model.dtype)[
        :, : source.num_known
    ]
    error = relative_error(logits, theirs)
    if error <= TOLERANCE[model.dtype]:
        return ""
    ours = mean_loss(logits, row)
    return (
        f"model.path: on {len(row.tokens)} tokens transformers computes a loss of "
        f"{mean_loss(theirs, row):.3f} with {source.folder}, this trainer {ours:.3f}; "
        f"the logits differ by {error:.2g} of their size, more than {TOLERANCE[model.dtype]}. "
        "Please report the model; model.verify=never trains it all the same"
    )
