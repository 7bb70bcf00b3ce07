"""Steps with losses and biases of the router, against a plain loop of PyTorch."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from rank_pool import RankPool
from tiny import make_config, make_store, random_samples, save_tiny_llama

STEPS, LR = 5, 1e-2
ROUTER = {"aux_loss_coef": 0.2, "z_loss_coef": 0.02, "bias_update_rate": 0.03}
FAMILIES: dict[str, dict[str, Any]] = {
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "moe_intermediate_size": 24,
    },
    "deepseek_v3": {
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 20,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
    },
}
Step = tuple[float, float, float]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_llama(folder, request.param, **{"num_hidden_layers": 2} | FAMILIES[request.param])
    return folder


def router_of(folder: Path) -> dict[str, float]:
    """Qwen has no biases."""
    return ROUTER | {"bias_update_rate": 0.0} if "qwen3" in folder.name else ROUTER


def our_steps(folder: str, parallel_section: dict[str, Any]) -> tuple[list[Step], list[Any]]:
    """(loss, auxiliary loss, z-loss) of each step, and the biases at the end."""
    from sft_fast.megatron.batches import open_batches
    from sft_fast.megatron.expert_load import routers
    from sft_fast.megatron.hf import SafetensorsSource
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.megatron.train_step import build_run, train_step
    from sft_fast.models.architecture import architecture_from_hf, read_hf_config
    from sft_fast.packing.from_config import make_plan

    config = make_config(
        model={"path": folder, "shape": None},
        tokenizer={"path": None},
        train={"global_batch_size": 4},
        packing={"strategy": "sequential"},
        parallel=parallel_section,
        router=router_of(Path(folder)),
        optim={"lr": LR, "eps": 1e-3, "weight_decay": 0.0, "clip_grad": 0.0, "decay": "constant"},
    )
    parallel = init_parallel(config.parallel, config.train, config.seed)
    architecture = architecture_from_hf(read_hf_config(Path(folder)))
    weights = SafetensorsSource(Path(folder), architecture)
    store = make_store(random_samples(4 * STEPS, seed=6, longest=60))
    run = build_run(config, architecture, weights, STEPS, parallel)
    plan = make_plan(store, config.packing, config.train, config.seed)
    results = []
    with open_batches(store, plan, range(STEPS), run.shape, parallel) as batches:
        for step in range(STEPS):
            result = train_step(run, batches, plan.counts(step))
            assert 0 < result.experts["expert_load"] <= result.experts["expert_load_worst"] <= 4
            losses = result.experts["router_aux_loss"], result.experts["router_z_loss"]
            results.append((result.loss, *losses))
    biases = [
        router.expert_bias.tolist()
        for module in run.model
        for router in routers(module)
        if router.expert_bias is not None
    ]
    return results, biases


class PlainLoop:
    """The same with transformers and torch's AdamW, one sample at a time."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM

        from sft_fast.packing.from_config import make_plan

        self.router, self.is_softmax = router_of(folder), "qwen3" in folder.name
        config = make_config(train={"global_batch_size": 4}, packing={"strategy": "sequential"})
        self.store = make_store(random_samples(4 * STEPS, seed=6, longest=60))
        self.plan = make_plan(self.store, config.packing, config.train, config.seed)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), LR, (0.9, 0.95), 1e-3, weight_decay=0.0
        )
        mlps = [layer.mlp for layer in self.model.model.layers]
        self.blocks = [mlp for mlp in mlps if hasattr(mlp, "experts")]
        self.copies = [torch.full((4,), 0.5) for _ in self.blocks]
        self.routed: list[list[Any]] = [[] for _ in self.blocks]
        for block, routed in zip(self.blocks, self.routed, strict=True):
            block.gate.register_forward_hook(partial(self.watch, routed))

    def watch(self, routed: list[Any], module: Any, inputs: Any, output: Any) -> None:
        routed.append((output[0], output[2]))

    def loss_of(self, sample: int) -> torch.Tensor:
        """The sum over its targets."""
        begin, end = self.store.offsets[sample], self.store.offsets[sample + 1]
        ids = torch.from_numpy(self.store.tokens[begin:end].astype("int64"))
        bits = np.unpackbits(self.store.supervised_bits, bitorder="little")[begin:end]
        labels = torch.where(torch.from_numpy(bits[1:]).bool(), ids[1:], -100)
        return functional.cross_entropy(
            self.model(ids[None]).logits[0, :-1], labels, reduction="sum"
        )

    def router_losses(self, number: int) -> tuple[torch.Tensor, float, float]:
        """What a layer adds to the loss; its balance and z-loss. Moves its biases."""
        from sft_fast.reference.experts import balance_loss

        logits, experts = (torch.cat(parts) for parts in zip(*self.routed[number], strict=True))
        scores = logits.softmax(1) if self.is_softmax else logits.sigmoid()
        probs = scores / scores.sum(1, keepdim=True)
        square = logits.logsumexp(1).square().mean()
        balance = 4 * (self.copies[number] * probs.mean(0)).sum()
        added = self.router["aux_loss_coef"] * balance + self.router["z_loss_coef"] * square
        counts = experts.flatten().bincount(minlength=4)
        self.copies[number] = counts / len(logits)
        if rate := self.router["bias_update_rate"]:
            bias = bias_of(self.blocks[number])
            bias += rate * (counts.float().mean() - counts).sign()
        return added, balance_loss(probs, experts).item(), square.item()

    def step(self, number: int) -> Step:
        for routed in self.routed:
            routed.clear()
        samples = self.plan.step(number).sample_ids
        loss = sum(map(self.loss_of, samples)) / self.plan.counts(number).num_supervised
        layers = len(self.blocks)
        added, balances, squares = zip(*map(self.router_losses, range(layers)), strict=True)
        self.optimizer.zero_grad()
        (loss + sum(added) / layers).backward()
        self.optimizer.step()
        return loss.item(), sum(balances) / layers, sum(squares) / layers

    def biases(self) -> list[Any]:
        """Of each layer; [] where experts have none."""
        if not self.router["bias_update_rate"]:
            return []
        return [bias_of(block).tolist() for block in self.blocks]


def bias_of(block: Any) -> torch.Tensor:
    """[4], of the block or of its gate."""
    holder = block if hasattr(block, "e_score_correction_bias") else block.gate
    return holder.e_score_correction_bias


def test_steps_equal_a_plain_loop(rank_pool: RankPool, model: Path) -> None:
    loop = PlainLoop(model)
    expected, biases = [loop.step(number) for number in range(STEPS)], loop.biases()
    assert expected[-1][0] != pytest.approx(expected[0][0], rel=1e-2)
    for world_size, section in ((1, {}), (2, {"expert": 2}), (2, {"pipeline": 2})):
        results = rank_pool.run(world_size, our_steps, str(model), section)
        for steps, _ in results:
            for got, wanted in zip(steps, expected, strict=True):
                assert got == pytest.approx(wanted, rel=1e-5)
        held = [own for _, own in results]
        ours = sum(held, []) if "pipeline" in section else held[0]
        assert len(ours) == len(biases)
        for own, theirs in zip(ours, biases, strict=True):
            assert own == pytest.approx(theirs, rel=1e-6, abs=1e-7)


def test_only_tokens_of_samples_count() -> None:
    """With padding behind each sample, behind the last one, and on ranks that share samples."""
    from sft_fast.megatron.attention.packed_samples import token_mask
    from sft_fast.packing.micro_batch import SequenceLayout, fill_micro_batch

    store = make_store(random_samples(5, seed=1, longest=20))
    for alignment, cp_size in ((1, 1), (8, 1), (4, 2), (8, 2)):
        counts = []
        for cp_rank in range(cp_size):
            layout = SequenceLayout(alignment, cp_size, cp_rank)
            batch = fill_micro_batch(store, [2, 0, 4], 96, layout=layout)
            arguments = batch.position_ids, batch.seqlens, batch.lengths, cp_size
            mask = token_mask(*arguments)
            assert mask is not None and mask.shape == batch.tokens.shape
            positions, samples = batch.places()
            lengths = torch.tensor([*store.lengths[[2, 0, 4]], 0])
            assert torch.equal(mask[0], positions < lengths[samples])
            counts.append(int(mask.sum()))
        assert sum(counts) == store.lengths[[2, 0, 4]].sum()
    full = fill_micro_batch(store, [1], int(store.lengths[1]))
    assert token_mask(full.position_ids, full.seqlens, full.lengths, 1) is None
    empty = fill_micro_batch(store, [], 8)
    mask = token_mask(empty.position_ids, empty.seqlens, empty.lengths, 1)
    assert mask is not None and not mask.any()
