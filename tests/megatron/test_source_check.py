"""What is computed before the first step: a random or misread model does not train."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rank_pool import RankPool
from tiny import VOCAB_SIZE, make_config, make_store, save_tiny_llama

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tensor": (2, {"tensor": 2, "sequence": True, "distributed_optimizer": False}),
    "pipeline": (2, {"pipeline": 2}),
}


def look(
    folder: str,
    parallel_section: dict[str, Any],
    samples: list[list[int]],
    verify: str = "auto",
    factor: float = 1.0,
) -> str:
    """check_source on each rank, with one weight of ours multiplied; or the error."""
    from sft_fast.megatron.hf import load_hf_weights
    from sft_fast.megatron.load_inputs import read_model
    from sft_fast.megatron.model import build_model
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.megatron.source_check import check_source

    config = make_config(
        model={"path": folder, "shape": None, "verify": verify},
        tokenizer={"path": None},
        parallel=parallel_section,
    )
    parallel = init_parallel(config.parallel, config.train, config.seed)
    source = read_model(config.model, config.lora, 0, Path(folder), range(VOCAB_SIZE, VOCAB_SIZE))
    sections = (config.model, config.parallel, config.lora, config.loss)
    models = build_model(source.architecture, *sections, parallel)
    for model in models:
        load_hf_weights(model, source.weights, source.architecture, parallel)
        if parallel.is_last_stage:
            model.decoder.final_layernorm.weight.data.mul_(factor)
    store = make_store([(ids, [0] * len(ids)) for ids in samples])
    try:
        return check_source(models, config.model, source, store, parallel)
    except ValueError as error:
        return f"error: {error}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source")
    save_tiny_llama(path, tie_word_embeddings=False)
    return path


@pytest.fixture(scope="module")
def liked(folder: Path) -> list[list[int]]:
    """Samples that the model finds likely."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    starts = torch.tensor([[3], [70], [99]])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts: list[list[int]] = model.generate(starts, max_new_tokens=30, **options).tolist()
    return texts


def loss_by_transformers(folder: Path, samples: list[list[int]]) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = []
    for ids in samples:
        tokens = torch.tensor([ids])
        logits = model(tokens).logits[0, :-1]
        losses += torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trained_model_is_that_of_transformers(
    rank_pool: RankPool, folder: Path, liked: list[list[int]], layout: str
) -> None:
    world_size, section = LAYOUTS[layout]
    loss = loss_by_transformers(folder, liked)
    assert loss < math.log(VOCAB_SIZE) - 0.5
    for seen in rank_pool.run(world_size, look, str(folder), section, liked):
        assert seen == (f"the loss of 93 tokens before training is {loss:.3f}, as in transformers")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_that_is_read_otherwise_stops_every_rank(
    rank_pool: RankPool, folder: Path, liked: list[list[int]], layout: str
) -> None:
    world_size, section = LAYOUTS[layout]
    arguments = (str(folder), section, liked)
    for seen in rank_pool.run(world_size, look, *arguments, "always", 1.01):
        assert seen.startswith("error: model.path: on 93 tokens transformers computes")
        assert "the logits differ by 0.0099 " in seen  # of 1.01
    for seen in rank_pool.run(world_size, look, *arguments, "never", 1.01):
        assert seen == ""


def test_a_model_that_knows_nothing_of_the_text_is_stopped(
    rank_pool: RankPool, folder: Path, liked: list[list[int]]
) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, VOCAB_SIZE, 60).tolist() for _ in range(3)]
    (seen,) = rank_pool.run(1, look, str(folder), {}, noise)
    assert seen.startswith("error: model.path: the loss of 180 tokens before training is")
    assert "model.random_init=true" in seen
    # A few tokens say nothing of the mean.
    (seen,) = rank_pool.run(1, look, str(folder), {}, [noise[0][:10]])
    assert "as in transformers" in seen
    # Nor are uniform probabilities knowledge.
    (seen,) = rank_pool.run(1, look, str(folder), {}, liked, "always", 0.0)
    assert f"is {math.log(VOCAB_SIZE):.3f}, and that of a model" in seen


def test_the_row_ends_where_the_source_ends() -> None:
    from sft_fast.megatron.source_check import LONGEST, MOST_TOKENS, first_row, first_samples

    long = list(range(1000))
    store = make_store([([5, 6, 99, 7], [0] * 4), ([99, 5], [0] * 2), (long, [0] * 1000)])
    row = first_row(first_samples(store), num_known=99)  # type: ignore[arg-type]
    assert row is not None
    assert [sample.tolist() for sample in row.samples] == [[5, 6], long[:99]]
    row = first_row(first_samples(make_store([(long, [0] * 1000)] * 4)), 2000)  # type: ignore[arg-type]
    assert row is not None
    assert [len(sample) for sample in row.samples] == [LONGEST] * (MOST_TOKENS // LONGEST)
    assert first_row(iter([]), 99) is None
