"""The last layer computes only the tokens whose loss counts, and nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rank_pool import RankPool
from sft_fast.megatron.loss_rows import loss_rows, select_rows
from tiny import TWO_KINDS_OF_LAYERS, make_config, make_store, random_samples, save_tiny_llama

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3": TWO_KINDS_OF_LAYERS,
}


def test_rows_and_their_gradient() -> None:
    tensor = torch.randn(5, 1, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([0, 3, 4])
    found = select_rows(tensor, rows)
    torch.testing.assert_close(found, tensor[rows], rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda whole: select_rows(whole, rows), tensor)


def test_without_active_tokens_one_row_keeps_every_weight_in_the_graph() -> None:
    rows = loss_rows(torch.empty(0, dtype=torch.int64), torch.device("cpu"))
    assert rows is not None and rows.tolist() == [0]
    assert loss_rows(None, torch.device("cpu")) is None


def outcomes(folder: str, recompute: dict[str, Any]) -> dict[str, Any]:
    """Of all tokens and of those that count: loss, gradients, an evaluation's outputs, the rows."""
    from sft_fast.megatron.evaluation import eval_step
    from sft_fast.megatron.forward_step import forward_step
    from sft_fast.megatron.hf import SafetensorsSource
    from sft_fast.megatron.model import unwrap
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.megatron.train_step import build_run
    from sft_fast.models.architecture import architecture_from_hf, read_hf_config
    from sft_fast.packing.micro_batch import fill_micro_batch

    model_section = {"path": folder, "shape": None, **recompute}
    config = make_config(model=model_section, tokenizer={"path": None})
    parallel = init_parallel(config.parallel, config.train, config.seed)
    architecture = architecture_from_hf(read_hf_config(Path(folder)))
    weights = SafetensorsSource(Path(folder), architecture)
    run = build_run(config, architecture, weights, 1, parallel)
    model = unwrap(run.model[0])
    assert model.computes_loss_rows
    seen: list[int] = []
    model.decoder.layers[-1].mlp.register_forward_hook(
        lambda _module, inputs, _output: seen.append(len(inputs[0]))
    )
    batch = fill_micro_batch(make_store(random_samples(3, seed=2)), [0, 1, 2], 128)
    found: dict[str, Any] = {"num_active": len(batch.active_tokens)}
    for key in ("rows", "all"):
        model.computes_loss_rows = key == "rows"
        run.model[0].zero_grad_buffer()
        losses, loss_func = forward_step(iter([batch]), run.model[0])
        loss_func(losses)[0].backward()
        found[key] = {
            "losses": losses.detach(),
            "evaluation": eval_step(None, iter([batch]), run.model[0])[0].detach(),
        } | {name: p.main_grad.clone() for name, p in model.named_parameters()}
    return found | {"seen": seen}


@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        ("llama", {}),
        ("llama", {"recompute": "selective", "recompute_modules": ["norm", "activation"]}),
        ("gemma3", {"recompute": "full"}),
    ],
    ids=["plain", "parts recomputed", "norms behind blocks, recomputed"],
)
def test_losses_and_gradients_are_those_of_all_rows(
    rank_pool: RankPool, tmp_path: Path, name: str, recompute: dict[str, Any]
) -> None:
    save_tiny_llama(tmp_path, num_hidden_layers=2, **MODELS[name])
    (found,) = rank_pool.run(1, outcomes, str(tmp_path), recompute)
    assert set(found["seen"]) == {found["num_active"], 128} and found["num_active"] < 100
    assert found["seen"][0] == found["num_active"]
    for key, expected in found["all"].items():
        assert expected.any(), key
        torch.testing.assert_close(found["rows"][key], expected, rtol=2e-5, atol=2e-7, msg=key)
