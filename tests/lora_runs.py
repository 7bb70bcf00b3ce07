"""Runs with adapters that several files of tests share."""

from pathlib import Path
from typing import Any

from tiny import make_config, make_store, random_samples

NUM_SAMPLES = 12
Tensors = dict[str, Any]


def lora_config(
    folder: str, output: str = "unused", lora: Any = None, parallel: Any = None, **model: Any
) -> Any:
    return make_config(
        output,
        model={"path": folder, "shape": None, **model},
        tokenizer={"path": None},
        # Even rows: two ranks pad no more than one, so that dropout draws as many numbers.
        packing={"alignment": 4},
        train={"global_batch_size": 8},
        parallel=parallel or {},
        lora={"rank": 3, "alpha": 5.0, **(lora or {})},
        optim={"lr": 1e-2, "eps": 1e-3},
    )


def build(config: Any) -> tuple[Any, Any, Any, Any]:
    """(run, plan, store, parallel) of a run whose adapters are random, the same at every layout."""
    from sft_fast.megatron.hf import SafetensorsSource
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.megatron.train_step import build_run
    from sft_fast.models.architecture import architecture_from_hf, read_hf_config
    from sft_fast.packing.from_config import make_plan

    parallel = init_parallel(config.parallel, config.train, config.seed)
    folder = Path(config.model.path)
    architecture = architecture_from_hf(read_hf_config(folder))
    weights = SafetensorsSource(folder, architecture)
    store = make_store(random_samples(NUM_SAMPLES, seed=3))
    run = build_run(config, architecture, weights, 2, parallel)
    randomise_b(run.model, parallel)
    randomise_expert_b(run.model)
    return (
        run,
        make_plan(store, config.packing, config.train, config.seed, architecture),
        store,
        parallel,
    )


def adapters(model: Any) -> Any:
    """Yields (linear, projection) of this rank."""
    from sft_fast.megatron.lora import LoraLinear

    for module in model.modules():
        if isinstance(module, LoraLinear):
            for projection in module.adapted():
                yield module, projection


def randomise_b(model: Any, parallel: Any) -> None:
    """B begins at zero and DoRA's lengths at those of W, where much of the gradient is trivial."""
    import torch
    import xxhash

    for linear, projection in adapters(model):
        b = linear.pair(projection)[1]
        seed = xxhash.xxh32_intdigest(projection.hf_name.encode())
        shards = parallel.tp_size if linear.split_dims["b"] == 0 else 1
        whole = torch.randn(
            len(b) * shards, b.shape[1], generator=torch.Generator().manual_seed(seed)
        )
        with torch.no_grad():
            b.copy_(whole.chunk(shards)[parallel.tp_rank if shards > 1 else 0] * 0.1)
            if linear.dora:
                linear.parameters_of(projection)["m"].mul_(1.25)


def expert_adapters(model: Any) -> Any:
    """Yields (experts, projection) of this rank."""
    from sft_fast.megatron.lora_experts import LoraExperts

    for module in model.modules():
        if isinstance(module, LoraExperts):
            for projection in module.adapted():
                yield module, projection


def randomise_expert_b(model: Any) -> None:
    """As `randomise_b`, for each expert by its number."""
    import torch
    import xxhash

    for experts, projection in expert_adapters(model):
        b = experts.parameters_of(projection)["b"]
        rank, shards = experts.etp_group.rank(), experts.etp_group.size()
        if projection.split_dims["b"] is None:
            rank, shards = 0, 1
        for index, own in enumerate(b):
            number = experts.ep_group.rank() * len(b) + index
            seed = xxhash.xxh32_intdigest(f"{projection.hf_name} {number}".encode())
            generator = torch.Generator().manual_seed(seed)
            whole = torch.randn(len(own) * shards, own.shape[1], generator=generator)
            with torch.no_grad():
                own.copy_(whole.chunk(shards)[rank] * 0.1)


def expert_gradients(model: Any) -> Tensors:
    """Name of an expert's adapter, as PEFT's -> its gradient."""
    import torch
    import torch.distributed as dist

    def whole(value: Any, dim: int, group: Any) -> Any:
        parts = [torch.empty_like(value) for _ in range(group.size())]
        dist.all_gather(parts, value.contiguous(), group=group)
        return torch.cat(parts, dim)

    found = {}
    for experts, projection in expert_adapters(model):
        for letter, parameter in experts.parameters_of(projection).items():
            value, dim = parameter.main_grad, projection.split_dims[letter]
            if dim is not None:
                value = whole(value, dim, experts.etp_group)
            value = whole(value, 0, experts.ep_group)
            for number, own in enumerate(value):
                name = projection.hf_name.replace("*", str(number))
                found[f"base_model.model.{name}.lora_{letter.upper()}.weight"] = own.numpy()
    return found


def take_steps(config: Any, count: int, run: Any, plan: Any, store: Any, parallel: Any) -> Any:
    """(loss, grad_norm) of optimizer steps, each over the same global batch."""
    from sft_fast.megatron.batches import open_batches
    from sft_fast.megatron.lora import seed_dropout
    from sft_fast.megatron.train_step import train_step

    results = []
    with open_batches(store, plan, [0] * count, run.shape, parallel) as batches:
        for step in range(count):
            seed_dropout(config.lora, config.seed, step, parallel)
            result = train_step(run, batches, plan.counts(0))
            results.append((result.loss, result.grad_norm))
    return results


def losses_and_norms(folder: str, lora: Any, parallel: Any, model: Any) -> list[Any]:
    config = lora_config(folder, lora=lora, parallel=parallel, **model)
    return take_steps(config, 3, *build(config))


def check_adapter(model: Any, folder: Path, parallel: Any) -> None:
    """All that was trained, and the tokenizer: nothing has to be found in the base."""
    from safetensors.torch import load_file

    if parallel.is_main and parallel.pp_size == 1:
        num_trained = sum(parameter.requires_grad for parameter in model.parameters())
        assert len(load_file(folder / "adapter_model.safetensors")) == num_trained
        assert (folder / "tokenizer.json").is_file()


def gradients(folder: str, output: str, lora: Any, parallel_section: Any) -> Tensors:
    """PEFT name -> gradient of one global batch; also exports adapter and merged model."""
    import torch

    from sft_fast.data.demo import demo_tokenizer
    from sft_fast.megatron.batches import open_batches
    from sft_fast.megatron.export.adapter import PEFT_NAMES, export_adapter
    from sft_fast.megatron.export.weights import export_weights
    from sft_fast.megatron.forward_step import forward_step
    from sft_fast.megatron.hf import gather_shards, merge_rows
    from sft_fast.megatron.model import unwrap
    from sft_fast.megatron.optim import normalise_by
    from sft_fast.megatron.schedule import run_schedule
    from sft_fast.models.architecture import architecture_from_hf, read_hf_config

    config = lora_config(folder, output, lora, parallel_section)
    run, plan, store, parallel = build(config)
    normalise_by(run.model, plan.counts(0).loss_weight)
    with open_batches(store, plan, [0], run.shape, parallel) as batches:
        run_schedule(run.model, batches, run.shape, forward_step)
    architecture = architecture_from_hf(read_hf_config(Path(folder)))
    found = {}
    for linear, projection in adapters(run.model):
        for letter, parameter in linear.parameters_of(projection).items():
            dim = linear.split_dims[letter]
            shards = gather_shards(parameter.main_grad, parallel)
            whole = shards[0] if dim is None else torch.cat(shards, dim)
            if dim == 0 and projection.fused is not None:
                whole = merge_rows(projection.fused, shards, architecture)
            assert dim is not None or all(torch.equal(shard, whole) for shard in shards)
            name = f"base_model.model.{projection.hf_name}.{PEFT_NAMES[letter]}"
            found[name] = whole.clone().numpy()
    found |= expert_gradients(run.model)
    for name, per_expert in {"adapter": False, "per_expert": True}.items():
        export_adapter(
            run.model,
            Path(output) / name,
            demo_tokenizer(),
            architecture,
            config.model,
            config.lora,
            config.export.model_copy(update={"adapter_per_expert": per_expert}),
            parallel,
        )
        if not architecture.num_experts:
            check_adapter(run.model, Path(output) / name, parallel)
            break
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    merged = Path(output) / "merged"
    merged.mkdir(exist_ok=True)
    export_weights(
        [unwrap(chunk) for chunk in run.model], merged, architecture, parallel, torch.float32
    )
    for name, value in run.model.named_parameters():
        assert torch.equal(value, before[name]), name
    return found


def load_model(folder: str | Path) -> Any:
    """In fp64, so that what differs is the rounding of one side only."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double()


def mean_loss(model: Any) -> Any:
    """The same global batch as `build`, one sample at a time."""
    import torch

    total, count = 0.0, 0
    for ids, supervised in random_samples(NUM_SAMPLES, seed=3):
        logits = model(torch.tensor([ids])).logits[0, :-1]
        mask = torch.tensor(supervised[1:], dtype=torch.bool)
        targets = torch.tensor(ids[1:])
        total += torch.nn.functional.cross_entropy(logits[mask], targets[mask], reduction="sum")
        count += int(mask.sum())
    return total / count


def assert_close(found: Tensors, expected: Tensors) -> None:
    import torch

    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max()
        assert scale > 0, name
        error = (torch.as_tensor(found[name]) - value).abs().max() / scale
        assert error < 5e-5, (name, error)  # transformers in fp32 is 1.2e-5 away from fp64
