"""LoRA: low-rank adapters beside frozen projections, at any tensor and pipeline layout.

Each Hugging Face projection has its own pair A [rank, in], B [out, rank], as in PEFT, although
megatron keeps q, k, v and gate, up in one matrix each. What the pairs of one matrix add to it is

    scale * B A,    B [out, n * rank] block-diagonal in megatron's order of rows, A [n * rank, in]

and both the forward pass and the merge use that product. A pair is split over tensor-parallel ranks
as its matrix is: B by rows with a column-parallel matrix, A by columns with a row-parallel one.
With DoRA each row of the sum is then scaled to a trained length, m [out].

Source: Hu et al. 2021 (arXiv 2106.09685); rsLoRA: Kalajdzievski 2023 (arXiv 2312.03732); DoRA: Liu
et al. 2024 (arXiv 2402.09353).
"""

import contextlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Parameter, functional

from sft_fast.config.layout import adapted_projections
from sft_fast.config.sections import LoraConfig, ModelConfig
from sft_fast.kernels.head_gradient import add_product_
from sft_fast.kernels.low_rank import BlockLayout, adapted_product, add_up, project_down
from sft_fast.megatron.experts import GroupedExperts
from sft_fast.megatron.hf import (
    ADAPTER_PREFIX,
    WeightSource,
    named_rules,
    part,
    qkv_widths,
)
from sft_fast.megatron.lora_experts import (
    ACTIVATIONS_RNG,
    INPUTS_RNG,
    LoraExperts,
    adapt_experts,
)
from sft_fast.megatron.lora_parameters import initial_a, parameter_name, scale_of
from sft_fast.megatron.model import SFTModel
from sft_fast.megatron.parallel import Parallel
from sft_fast.models.architecture import Architecture
from sft_fast.models.families import Rule


@dataclass(frozen=True)
class Projection:
    """One Hugging Face projection of a megatron matrix."""

    hf_name: str
    """E.g. model.layers.3.self_attn.q_proj."""
    num_rows: int
    """Its rows of this rank's part of the matrix."""
    is_adapted: bool
    fused: Rule | None = None
    """Of a projection that is the whole matrix, whose rows lie in another order than its own."""

    @property
    def name(self) -> str:
        """Its name without the module: q_proj."""
        return self.hf_name.rpartition(".")[2]


class LoraLinear(torch.nn.Module):
    """What an adapted matrix has beside its weight. A linear becomes one by its `__class__`.

    The adapters are parameters of the linear itself, not of a child, because DDP gathers what a
    module owns when that module's forward begins.
    """

    weight: Tensor
    bias: Tensor | None
    skip_bias_add: bool
    tp_group: Any
    sequence_parallel: bool
    projections: tuple[Projection, ...]
    num_groups: int
    """Blocks in which the rows of the projections alternate."""
    scale: float
    dropout: float
    dora: bool
    row_squares: Tensor
    """[out] fp32, of DoRA: squared Euclidean length of this rank's part of each frozen row."""
    split_dims: dict[str, int | None]
    """Dimension over which tensor-parallel ranks split a, b and m; None = each has all of it."""

    def pair(self, projection: Projection) -> tuple[Tensor, Tensor]:
        """(A [rank, in], B [num_rows, rank]) of a projection, this rank's parts."""
        parameters = self.parameters_of(projection)
        return parameters["a"], parameters["b"]

    def parameters_of(self, projection: Projection) -> dict[str, Tensor]:
        """a [rank, in], b [num_rows, rank] and with DoRA m [num_rows], this rank's parts."""
        letters = "abm" if self.dora else "ab"
        return {
            letter: getattr(self, parameter_name(letter, projection.name)) for letter in letters
        }

    def adapted(self) -> list[Projection]:
        """The projections that have an adapter."""
        return [projection for projection in self.projections if projection.is_adapted]

    def matrices(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Every A [rank, in], and every B [num_rows, rank]."""
        a, b = zip(*map(self.pair, self.adapted()), strict=True)
        return a, b

    @cached_property
    def layout(self) -> BlockLayout:
        """Where the rows of the projections are: per query group its q, k and v."""
        numbers = iter(range(len(self.projections)))
        return BlockLayout(
            self.num_groups,
            tuple(projection.num_rows // self.num_groups for projection in self.projections),
            tuple(next(numbers) if item.is_adapted else None for item in self.projections),
        )

    def by_projection(self, rows: Tensor) -> list[Tensor]:
        """[out] -> [num_rows] of each projection."""
        parts = rows.view(self.num_groups, -1).split(self.layout.widths, dim=1)
        return [part.flatten() for part in parts]

    @property
    def is_one_operation(self) -> bool:
        """Nothing happens between the products of the matrix and of its adapters."""
        has_dropout = self.dropout > 0.0 and self.training
        return self.tp_group.size() == 1 and not has_dropout

    def product(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """What megatron's linear layers return, of hidden [s, b, in]."""
        bias = None if self.skip_bias_add or self.dora else self.bias
        a, b = self.matrices()
        output = adapted_product(hidden, self.weight, bias, a, b, self.layout, self.scale)
        if self.dora:
            output = output * self.row_factors().to(output.dtype)
            if self.bias is not None and not self.skip_bias_add:
                output = output + self.bias
        return output, self.bias if self.skip_bias_add else None

    def low_rank(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [s, b, in] for the frozen product, and A times it, [s, b, n * rank].

        Each A has dropout of its own.
        """
        a, _ = self.matrices()
        if self.dropout == 0.0 or not self.training:
            return project_down(hidden, a)
        with self.dropout_stream():
            parts = [
                functional.linear(functional.dropout(hidden, self.dropout), each) for each in a
            ]
        return hidden, torch.cat(parts, dim=-1)

    def dropout_stream(self) -> contextlib.AbstractContextManager[None]:
        """Random numbers that tensor-parallel ranks share where they share the input."""
        return contextlib.nullcontext()

    def add_adapters(self, output: Tensor, low_rank: Tensor) -> Tensor:
        """output [s, b, out] + scale * low_rank [s, b, n * rank] times B; DoRA scales the sum."""
        bias = self.bias if self.dora and not self.skip_bias_add else None
        if bias is not None:
            output = output - bias
        _, b = self.matrices()
        added = add_up(output, low_rank, b, self.layout, self.scale)
        if self.dora:
            added = added * self.row_factors().to(added.dtype)
        return added if bias is None else added + bias

    def row_factors(self) -> Tensor:
        """[out] fp32: m / length of the row; 1 for rows without an adapter."""
        lengths = self.by_projection(self.row_lengths(self.summed_squares()))
        factors = [
            self.parameters_of(projection)["m"].float() / length
            if projection.is_adapted
            else torch.ones_like(length)
            for projection, length in zip(self.projections, lengths, strict=True)
        ]
        grouped = [factor.view(self.num_groups, -1) for factor in factors]
        return torch.cat(grouped, dim=1).flatten()

    @torch.no_grad()
    def summed_squares(self) -> Tensor:
        """[out] fp32: squared lengths of this rank's rows of W + scale * B A.

        A constant to DoRA's gradient. w^2 + 2 scale b (A w) + scale^2 b (A A^T) b for a row w, b,
        which needs no matrix of W's size.
        """
        a, b = self.matrices()
        every_a, every_b = torch.cat(a), self.layout.assemble(b).float() * self.scale
        crossed = every_b.new_zeros(every_b.shape)
        add_product_(crossed, self.weight, every_a.t())
        every_a = every_a.float()
        crossed.mul_(2).addmm_(every_b, every_a @ every_a.t())
        return self.row_squares + (every_b * crossed).sum(dim=1)

    def row_lengths(self, squares: Tensor) -> Tensor:
        """[out]: lengths of whole rows, of squares [out] of the columns' ranks."""
        if self.split_dims["a"] == 1:
            squares = squares.clone()
            dist.all_reduce(squares, group=self.tp_group)
        return squares.clamp(min=0).sqrt()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """This rank's weight with the adapters merged, a new fp32 tensor [out, in]."""
        a, b = self.matrices()
        delta = self.layout.assemble(b).float() @ torch.cat(a).float()
        weight = torch.add(self.weight.float(), delta, alpha=self.scale)
        return weight * self.row_factors()[:, None] if self.dora else weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """megatron's, with the adapters split as they are."""
        base: Any = super()
        tensors = base.sharded_state_dict(prefix, sharded_offsets, metadata)
        adapters, split_dims = {}, {}
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith(ADAPTER_PREFIX):
                adapters[name] = parameter
                dim = self.split_dims[name.removeprefix(ADAPTER_PREFIX)[0]]
                if dim is not None:
                    split_dims[name] = dim
        own = make_sharded_tensors_for_checkpoint(
            adapters,
            prefix,
            split_dims,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for projection in self.adapted():
            if projection.fused is not None and projection.fused.split == "rows":
                # A rank's parts of gate and up are no one block.
                for letter in self.parameters_of(projection).keys() - {"a"}:
                    name = f"{prefix}{parameter_name(letter, projection.name)}"
                    own[name] = apply_swiglu_sharded_factory(own[name], sharded_offsets)
        return tensors | own


class LoraColumnParallelLinear(LoraLinear, ColumnParallelLinear):
    """Split by rows: every rank has all of A, and the rows of B for its rows of the weight."""

    split_dims = {"a": None, "b": 0, "m": 0}

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[s, b, out/tp] of hidden [s, b, in], or of [s/tp, b, in] with sequence parallel."""
        if self.is_one_operation:
            return self.product(input_)
        input_, low_rank = self.low_rank(input_)
        output, bias = super().forward(input_, *args, **kwargs)
        if self.sequence_parallel:
            # Gathered after A: n * rank numbers per token instead of the hidden size.
            low_rank = gather_from_sequence_parallel_region(low_rank, group=self.tp_group)
        else:
            low_rank = copy_to_tensor_model_parallel_region(low_rank, group=self.tp_group)
        return self.add_adapters(output, low_rank), bias


class LoraRowParallelLinear(LoraLinear, RowParallelLinear):
    """Split by columns: every rank has all of B, and the columns of A for its part of the input."""

    split_dims = {"a": 1, "b": None, "m": None}

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[s, b, out], or [s/tp, b, out] with sequence parallel, of hidden [s, b, in/tp]."""
        if self.is_one_operation:
            return self.product(input_)
        input_, low_rank = self.low_rank(input_)
        output, bias = super().forward(input_, *args, **kwargs)
        if self.sequence_parallel:
            low_rank = reduce_scatter_to_sequence_parallel_region(low_rank, group=self.tp_group)
        else:
            low_rank = reduce_from_tensor_model_parallel_region(low_rank, group=self.tp_group)
        return self.add_adapters(output, low_rank), bias

    def dropout_stream(self) -> contextlib.AbstractContextManager[None]:
        """Random numbers that differ between tensor-parallel ranks."""
        # With sequence parallel the whole block already runs inside this fork.
        if self.sequence_parallel:
            return contextlib.nullcontext()
        return get_cuda_rng_tracker().fork()


def has_adapters(model: torch.nn.Module) -> bool:
    """Whether any layer of the model has one."""
    return any(isinstance(module, LoraLinear | LoraExperts) for module in model.modules())


def add_adapters(
    model: SFTModel,
    architecture: Architecture,
    model_config: ModelConfig,
    lora: LoraConfig,
    seed: int,
    parallel: Parallel,
) -> None:
    """Freezes the model and gives the projections that `lora.targets` selects their adapters.

    The head of a stage, which begins at random, is trained whole.

    B is zero and A as in PEFT: uniform, from the projection's name and the seed alone, so it does
    not depend on the layout.
    """
    model.requires_grad_(False)
    if model.has_stage_head:
        model.output_layer.requires_grad_()
    targets = set(adapted_projections(architecture, lora.targets))
    layer: Any
    for layer in model.decoder.layers:
        experts = getattr(layer.mlp, "experts", None)
        if isinstance(experts, GroupedExperts):
            number = layer.layer_number - 1
            rules, own = architecture.layer_rules(number), layer.mlp.local_expert_indices
            adapt_experts(experts, own, rules, f"model.layers.{number}.", targets, lora, seed)
    for name, rule in list(named_rules(model, architecture)):
        hf_names = [source.removesuffix(".weight") for source in rule.sources]
        if targets.isdisjoint(hf_names):
            continue
        linear: Any = model.get_submodule(name.removesuffix(".weight"))
        is_row = isinstance(linear, RowParallelLinear)
        linear.__class__ = LoraRowParallelLinear if is_row else LoraColumnParallelLinear
        linear.scale, linear.dropout = scale_of(lora), lora.dropout
        linear.dora = lora.dora
        (first_rows, *_), *others = rule.sources.values()
        is_fused = not others and "+" in first_rows
        is_qkv = rule.split == "qkv" and not is_fused
        groups = architecture.num_key_value_heads // parallel.tp_size
        linear.num_groups = groups if is_qkv else 1
        widths = qkv_widths(architecture) if is_qkv else (1,) * len(hf_names)
        rows_per_width = len(linear.weight) // sum(widths)
        linear.projections = tuple(
            Projection(
                hf_name, width * rows_per_width, hf_name in targets, rule if is_fused else None
            )
            for hf_name, width in zip(hf_names, widths, strict=True)
        )
        if linear.dora:
            norms = torch.linalg.vector_norm(linear.weight, dim=1, dtype=torch.float32)
            linear.row_squares = norms.square_()
        for projection in linear.adapted():
            add_parameters(linear, projection, lora, seed, parallel)
        if linear.dora:
            add_lengths(linear)
    if model_config.recompute != "none" and model.pre_process:
        # Recomputed layers get gradients only where their input asks for one.
        model.embedding.register_forward_hook(lambda module, inputs, out: out.requires_grad_())


def add_parameters(
    linear: LoraLinear,
    projection: Projection,
    lora: LoraConfig,
    seed: int,
    parallel: Parallel,
) -> None:
    """Adds A and B of a projection."""
    rank, num_columns = lora.rank, linear.weight.shape[1]
    is_split = linear.split_dims["a"] is not None
    num_inputs = num_columns * parallel.tp_size if is_split else num_columns
    a = initial_a(projection.hf_name, rank, num_inputs, seed)
    if is_split:
        a = a[:, part(num_inputs, parallel.tp_size, parallel.tp_rank)]
    add_parameter(linear, "a", projection, a)
    add_parameter(linear, "b", projection, torch.zeros(projection.num_rows, rank))


def add_lengths(linear: LoraLinear) -> None:
    """Adds DoRA's m of every projection, which begins as the lengths of the rows."""
    lengths = linear.by_projection(linear.row_lengths(linear.row_squares))
    for projection, length in zip(linear.projections, lengths, strict=True):
        if projection.is_adapted:
            add_parameter(linear, "m", projection, length)


def add_parameter(linear: LoraLinear, letter: str, projection: Projection, value: Tensor) -> None:
    """Adds a copy of this rank's part of a matrix or vector."""
    dim = linear.split_dims[letter]
    parameter = Parameter(value.to(linear.weight, copy=True).contiguous())
    if dim is not None:
        set_tensor_model_parallel_attributes(parameter, True, dim, stride=1)
    else:
        # Each rank sees its part of the sequence: megatron adds up gradients with this mark.
        parameter.sequence_parallel = linear.sequence_parallel  # type: ignore[attr-defined]
    linear.register_parameter(parameter_name(letter, projection.name), parameter)


def seed_dropout(lora: LoraConfig, config_seed: int, step: int, parallel: Parallel) -> None:
    """Makes the masks of a step a function of the seed, the step and the rank's place.

    A resumed run therefore needs no generator state from its checkpoint.
    """
    if lora.dropout == 0.0:
        return
    place = f"{config_seed}/{step}/{parallel.dp_rank}/{parallel.pp_rank}"
    if parallel.cp_size > 1:
        place += f"/{parallel.cp_rank}"
    seed = xxhash.xxh32_intdigest(place.encode())
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    # Ranks that share experts may be data-parallel ones.
    place = (
        f"experts/{config_seed}/{step}/{parallel.edp_rank}/{parallel.pp_rank}/{parallel.ep_rank}"
    )
    places = {INPUTS_RNG: place, ACTIVATIONS_RNG: f"{place}/{parallel.etp_rank}"}
    for name, text in places.items():
        get_cuda_rng_tracker().add(name, xxhash.xxh64_intdigest(text.encode()) >> 1)


def adapter_fingerprint(lora: LoraConfig, weights: WeightSource) -> str:
    """Says what a checkpoint of adapters fits to: their shape, and the base weights.

    Returns: "" for a run without LoRA, whose checkpoints hold all weights.
    """
    if lora.rank == 0:
        return ""
    targets = lora.targets if isinstance(lora.targets, str) else ",".join(sorted(lora.targets))
    kind = "dora" if lora.dora else "lora"
    return f"{kind} rank {lora.rank} scale {scale_of(lora)} of {targets} on {weights.digest()}"
