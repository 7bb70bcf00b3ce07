"""Tiny models that several files train; folders of transformers."""

import pytest

from tiny import save_tiny_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_llama(folder, tie_word_embeddings=True)
    return str(folder)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("experts")
    counts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    save_tiny_llama(folder, "qwen3_moe", head_dim=16, **counts)
    return str(folder)
