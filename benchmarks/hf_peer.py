"""The strongest peer of a training step: transformers, PEFT and Liger on the same packed rows.

No Trainer around it: packed samples, attention over variable lengths, Liger's norms, rotary, SwiGLU
and fused linear loss where it is installed, grouped experts, fused AdamW. It computes in bf16 with
states in bf16, which is its fastest; the same weights by name as ours, so that losses are compared.
"""

import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sft_fast.constants import IGNORE_INDEX
from sft_fast.models.architecture import Architecture
from sft_fast.packing.steps import StepPlan
from timing import DEVICE, ON_GPU
from tiny import ListStore

FUSED_EXPERTS = ("gate_up_proj", "down_proj")
WHOLE = slice(None)


class Weights(Protocol):
    """Weights by their Hugging Face name."""

    def read(self, name: str, rows: slice, columns: slice) -> Tensor: ...


@dataclass(frozen=True)
class PeerResult:
    """What the peer's steps gave."""

    durations: list[float]
    """Seconds of each step."""
    losses: list[float]
    peak_bytes: int
    kernels: str
    """What it used, for the record."""
    profile: dict[str, object]
    """Where the device time of a step went; {} if it was not asked for."""


class PackedAttention:
    """Attention of transformers over the samples of one packed row."""

    def __init__(self) -> None:
        self.edges = torch.zeros(2, dtype=torch.int32)
        self.longest = 0

    def set_row(self, lengths: list[int]) -> None:
        """Takes in the lengths of the samples that the next forward pass packs."""
        edges = np.concatenate([[0], np.cumsum(lengths)])
        self.edges = torch.tensor(edges, dtype=torch.int32, device=DEVICE)
        self.longest = max(lengths)

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """q [1, heads, T, d], k and v [1, kv_heads, T, d] -> [1, T, heads, d]."""
        query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
        if ON_GPU:
            return self.varlen(query, key, value)[None], None
        outputs = [
            functional.scaled_dot_product_attention(
                *(part[begin:end].transpose(0, 1)[None] for part in (query, key, value)),
                is_causal=True,
                enable_gqa=True,
            )[0].transpose(0, 1)
            for begin, end in zip(self.edges[:-1].tolist(), self.edges[1:].tolist(), strict=True)
        ]
        return torch.cat(outputs)[None], None

    def varlen(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """FlashAttention of torch: [T, heads, d] and twice [T, kv_heads, d] -> [T, heads, d]."""
        from torch.nn.attention.varlen import varlen_attn

        names = inspect.signature(varlen_attn).parameters
        options: dict[str, Any] = (
            {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
        )
        if "enable_gqa" in names:
            options["enable_gqa"] = True
        else:
            repeats = query.shape[1] // key.shape[1]
            key, value = (part.repeat_interleave(repeats, 1) for part in (key, value))
        edges, longest = self.edges, self.longest
        parts = (part.contiguous() for part in (query, key, value))
        output: Tensor = varlen_attn(*parts, edges, edges, longest, longest, **options)
        return output


def hf_config(a: Architecture) -> Any:
    """transformers' configuration of a Llama or a Qwen3 mixture of this shape."""
    from transformers import LlamaConfig, Qwen3MoeConfig

    shape = {
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_key_value_heads,
        "head_dim": a.head_dim,
        "max_position_embeddings": a.max_position_embeddings,
        "rms_norm_eps": a.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": a.rope_theta},
        "tie_word_embeddings": a.tie_word_embeddings,
        "use_cache": False,
    }
    if not a.num_experts:
        return LlamaConfig(intermediate_size=a.ffn_hidden_size, **shape)
    return Qwen3MoeConfig(
        moe_intermediate_size=a.ffn_hidden_size,
        num_experts=a.num_experts,
        num_experts_per_tok=a.experts_per_token,
        norm_topk_prob=a.renormalise_experts,
        **shape,
    )


def build_peer(a: Architecture, weights: Weights, lora_rank: int) -> tuple[Any, str]:
    """The model on the device with `weights`, and what it computes with."""
    from transformers import AutoModelForCausalLM

    used = ["transformers"]
    if ON_GPU and find_spec("liger_kernel") is not None:
        from liger_kernel import transformers as liger

        apply = liger.apply_liger_kernel_to_llama
        if a.num_experts:
            apply = liger.apply_liger_kernel_to_qwen3_moe
        apply()
        used.append("Liger")
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    with DEVICE:
        model = AutoModelForCausalLM.from_config(
            hf_config(a), dtype=dtype, attn_implementation="packed"
        )
    if a.num_experts and ON_GPU:
        model.set_experts_implementation("grouped_mm")
        used.append("grouped_mm")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read_parameter(name, a, weights))
    if lora_rank:
        import peft

        options = peft.LoraConfig(
            r=lora_rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, options)
        used.append("PEFT")
    return model.train(), " + ".join(used)


def read_parameter(name: str, a: Architecture, weights: Weights) -> Tensor:
    """A parameter of transformers, whose experts are fused, from tensors named as on disk."""
    prefix, _, last = name.rpartition(".")
    if not a.num_experts or last not in FUSED_EXPERTS or not prefix.endswith("experts"):
        return weights.read(name, WHOLE, WHOLE)
    parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
    experts = [
        torch.cat([weights.read(f"{prefix}.{e}.{part}.weight", WHOLE, WHOLE) for part in parts])
        for e in range(a.num_experts)
    ]
    return torch.stack(experts)


def packed_rows(store: ListStore, bins: list[np.ndarray]) -> Iterator[tuple[Any, ...]]:
    """(tokens, labels, positions [1, T] each, lengths) of every row."""
    supervised = np.unpackbits(store.supervised_bits, bitorder="little").astype(bool)
    for ids in bins:
        ranges = [slice(store.offsets[i], store.offsets[i + 1]) for i in ids]
        lengths = [r.stop - r.start for r in ranges]
        tokens = np.concatenate([store.tokens[r] for r in ranges]).astype(np.int64)
        positions = np.concatenate([np.arange(length) for length in lengths])
        # transformers shifts the labels itself, over the edges of samples: no first token trains.
        trains = np.concatenate([supervised[r] for r in ranges]) & (positions > 0)
        labels = np.where(trains, tokens, IGNORE_INDEX)
        yield *(torch.from_numpy(x)[None].to(DEVICE) for x in (tokens, labels, positions)), lengths


def run_peer(
    a: Architecture,
    weights: Weights,
    store: ListStore,
    plan: StepPlan,
    num_steps: int,
    lora_rank: int = 0,
    profile: Callable[[Callable[[], object]], dict[str, object]] | None = None,
) -> PeerResult:
    """The steps of `plan`, each one row at a time.

    Args:
        weights: the same that our model has.
        lora_rank: 0 = all weights train.
        profile: measures one more step.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    attention = PackedAttention()
    AttentionInterface.register("packed", attention)
    AttentionMaskInterface.register("packed", lambda *args, **options: None)
    model, used = build_peer(a, weights, lora_rank)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-12, fused=ON_GPU)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()

    def train_step(step: int) -> float:
        total = torch.zeros((), device=DEVICE)
        count = torch.tensor(plan.counts(step).num_supervised, device=DEVICE)
        for bins in plan.micro_batches(step, 0, 1, 1):
            for tokens, labels, positions, lengths in packed_rows(store, bins):
                attention.set_row(lengths)
                loss = model(
                    input_ids=tokens,
                    position_ids=positions,
                    labels=labels,
                    num_items_in_batch=count,
                ).loss
                loss.backward()
                total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    durations, losses = [], []
    for step in range(num_steps):
        begin = time.perf_counter()
        losses.append(train_step(step))
        durations.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if ON_GPU else 0
    profiled = profile(lambda: train_step(num_steps - 1)) if profile is not None else {}
    return PeerResult(durations, losses, peak, used, profiled)
