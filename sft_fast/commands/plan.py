"""`sft_fast plan`: does it fit, how long does it take, and what would help."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_fast.commands.arguments import (
    Commands,
    add_config,
    add_trust,
    config_tokenizer,
    positive,
    read_config,
)
from sft_fast.models.hardware import GPUS

if TYPE_CHECKING:
    from sft_fast.config.schema import Config
    from sft_fast.config.sections import TrainConfig
    from sft_fast.data.stream import TrainingData
    from sft_fast.models.architecture import Architecture
    from sft_fast.models.flops import Workload
    from sft_fast.models.hardware import Gpu
    from sft_fast.packing.steps import StepPlan


def add(commands: Commands) -> None:
    """Describes `plan` to argparse."""
    plan = commands.add_parser("plan", help="say what fits, how long it takes, and what would help")
    add_config(plan)
    add_trust(plan)
    plan.add_argument("--gpu", default="MI300X", help=f"one of {', '.join(GPUS)}")
    plan.add_argument(
        "--ranks", type=positive, metavar="N", help="GPUs; default: the smallest layout"
    )
    plan.add_argument("--mfu", type=float, default=0.4, help="utilisation to assume (0.4)")
    plan.add_argument("--no-data", action="store_true", help="memory only, without tokenising")
    plan.add_argument("--plot", type=Path, metavar="FILE", help="draw the packing (.png, .svg)")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.set_defaults(run=run, hides_torch=True)


def run(parsed: argparse.Namespace) -> None:
    """Prints memory, time and suggestions for a configuration and a GPU."""
    import json

    from sft_fast.config.layout import layout_problems, rank_problem
    from sft_fast.data.tokenizer import new_token_ids
    from sft_fast.errors import ConfigError, nearest
    from sft_fast.models.locate import model_folder, read_architecture, with_tokens

    config = read_config(parsed)
    gpu = GPUS.get(parsed.gpu.upper())
    if gpu is None:
        near = nearest(parsed.gpu.upper(), GPUS)
        hint = f"; did you mean {near}?" if near else ""
        raise ValueError(f"--gpu {parsed.gpu}; expected one of {', '.join(GPUS)}{hint}")
    if not 0 < parsed.mfu <= 1:
        raise ValueError(f"--mfu {parsed.mfu}; expected a share above 0, at most 1")
    ranks = parsed.ranks or config.parallel.model_parallel_size
    tokenizer = None
    if config.model.path is None or not parsed.no_data:
        tokenizer = config_tokenizer(config.model, config.tokenizer)
    new = range(0) if tokenizer is None else new_token_ids(tokenizer)
    known = read_architecture(config.model, model_folder(config.model), new.stop)
    architecture = with_tokens(known, new, config.model, config.lora)
    of_ranks = rank_problem(config.parallel, config.train, ranks)
    problems = [] if of_ranks is None else [of_ranks]
    problems += layout_problems(
        architecture, config.model, config.packing, config.parallel, config.lora
    )
    if problems:
        raise ConfigError(problems, f"the layout of {ranks} ranks")
    plan = None if parsed.no_data else packing_plan(config, tokenizer, architecture)
    plan_figures = figures(config, architecture, plan, gpu, ranks, parsed.mfu)
    if parsed.plot is not None:
        if plan is None:
            raise ValueError("--plot needs the data; leave --no-data out")
        from sft_fast.packing.report import plot_plan

        plot_plan(plan, parsed.plot)
    print(json.dumps(plan_figures) if parsed.json else as_text(plan_figures))


def packing_plan(config: Config, tokenizer: Any, architecture: Architecture) -> StepPlan:
    """The packs and steps of the training data, tokenised where they are not yet.

    Of a stream, those of the first samples.
    """
    from sft_fast.data.from_config import (
        build_options,
        find_sources,
        open_data_store,
        open_stream,
        stage_options,
    )
    from sft_fast.data.near_duplicates import with_choice
    from sft_fast.packing.from_config import make_training_plan

    sources = find_sources(config.data, "train")
    assert sources is not None, "data.train is required"
    options = build_options(
        config.model, config.data, config.packing, architecture, stage_options(config)
    )
    data: TrainingData
    if config.data.streaming:
        data = open_stream(sources, tokenizer, options, config.data, config.seed)
    else:
        store = open_data_store(
            sources,
            tokenizer,
            options,
            config.data,
            config.output_dir,
            lambda text: print(text, file=sys.stderr),
        )
        data = with_choice(store, config.data.near_duplicates, group_size=options.group_size)
    plan = make_training_plan(
        data,
        config.packing,
        config.train,
        config.seed,
        architecture,
        options.group_size,
    )
    return plan.expected()


def run_work(train: TrainConfig, plan: StepPlan) -> tuple[int, Workload]:
    """Optimizer steps, and what they compute on; epochs are alike but for their order."""
    import numpy as np

    from sft_fast.models.flops import Workload

    steps = train.steps or (train.epochs or 0) * plan.num_steps_per_epoch
    epochs = steps / plan.num_steps_per_epoch
    if plan.is_extract:
        # A stream has no last step that is filled up with empty packs.
        epochs = steps * plan.global_batch_size / plan.plan(0).num_bins
    lengths = plan.lengths.astype(np.int64)
    supervised = int(plan.supervised.sum(dtype=np.int64))
    sums = (int(lengths.sum()), int((lengths**2).sum()), supervised)
    return steps, Workload(*(round(value * epochs) for value in sums))


def figures(
    config: Config,
    architecture: Architecture,
    plan: StepPlan | None,
    gpu: Gpu,
    ranks: int,
    mfu: float,
) -> dict[str, Any]:
    """Everything that the command says."""
    from dataclasses import asdict

    from sft_fast.models.estimate import best_suggestions, estimate_memory, estimate_seconds
    from sft_fast.models.flops import Workload, num_parameters, training_flops
    from sft_fast.packing.from_config import warm_up_warning

    share, workload = 1.0, Workload(1, 0, 1)
    values: dict[str, Any] = {
        "gpu": gpu.name,
        "ranks": ranks,
        "parameters": num_parameters(architecture),
        "memory_limit": gpu.memory_gb * 1e9,
    }
    if plan is not None:
        steps, workload = run_work(config.train, plan)
        from sft_fast.packing.report import packing_report

        report = packing_report(plan, 1, config.train.micro_batch_size)
        share = report.supervised_share
        seconds = estimate_seconds(
            architecture,
            config.model,
            config.train,
            config.parallel,
            config.lora,
            workload,
            ranks,
            gpu.bf16_tflops,
            mfu,
        )
        values |= {
            "steps": steps,
            "extract_samples": len(plan.lengths) if plan.is_extract else None,
            "tokens": workload.tokens,
            "supervised_tokens": workload.supervised,
            "samples_per_pack": report.samples_per_bin,
            "packing_efficiency": report.efficiency,
            "padding": report.padding_share,
            "packing": report.strategy,
            "warning": warm_up_warning(config.optim, steps),
            "flops": training_flops(architecture, workload, lora=config.lora.rank > 0),
            "hours": seconds / 3600,
            "mfu": mfu,
        }
    memory = estimate_memory(architecture, config, ranks, share)
    values["memory"] = asdict(memory) | {"total": memory.total}
    values["fits"] = memory.total <= gpu.memory_gb * 1e9
    values["suggestions"] = [
        asdict(suggestion)
        for suggestion in best_suggestions(
            *(
                architecture,
                config,
                workload,
                ranks,
                gpu.memory_gb * 1e9,
                gpu.bf16_tflops,
                mfu,
                share,
            )
        )
    ]
    return values


def as_text(values: dict[str, Any]) -> str:
    """The figures as aligned lines for a terminal."""
    memory, limit = dict(values["memory"]), values["memory_limit"]
    total = memory.pop("total")
    lines = [("model", f"{count_text(values['parameters'])} parameters")]
    if "steps" in values:
        extract = values["extract_samples"]
        about = "" if extract is None else f"if all are as the first {extract:,} samples: "
        lines += [
            (
                "data",
                f"{about}{values['tokens']:,} tokens in {values['steps']:,} steps, "
                f"{values['supervised_tokens'] / max(values['tokens'], 1):.1%} of them trained",
            ),
            (
                "packing",
                f"{values['packing']}: {values['samples_per_pack']:.1f} samples a pack, "
                f"{values['padding']:.2%} padding, {values['packing_efficiency']:.2%} of the bound",
            ),
            ("work", f"{values['flops']:.3g} FLOPs, forward and backward"),
            (
                "time",
                f"{time_text(values['hours'] * 3600)} on {values['ranks']} x {values['gpu']} at "
                f"{values['mfu']:.0%} of its bf16 rate (assumed)",
            ),
        ]
    verdict = "fits" if values["fits"] else "DOES NOT FIT"
    text = f"{size_text(total)} of {limit / 1e9:.0f} GB on the fullest rank: {verdict}"
    lines.append(("memory", text))
    lines += [("", f"{size_text(size):>9}  {name}") for name, size in memory.items() if size]
    for number, suggestion in enumerate(values["suggestions"]):
        time = f", {time_text(suggestion['seconds'])}" if "steps" in values else ""
        text = f"{size_text(suggestion['memory_bytes']):>9}{time}  {suggestion['overrides']}"
        lines.append(("would help" if number == 0 else "", text))
    if values.get("warning"):
        lines.append(("", values["warning"]))
    return "\n".join(f"{name:<12}{text}" for name, text in lines)


def count_text(count: float) -> str:
    """8030261248 -> "8.03 billion"."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} billion"
    return f"{count / 1e6:.1f} million" if count >= 1e6 else f"{count:,.0f}"


def size_text(size: float) -> str:
    """Bytes in powers of ten, as makers of memory count them."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def time_text(seconds: float) -> str:
    """A duration in words, such as "2.5 hours"."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} hours"
    if seconds >= 60:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds:.0f} seconds" if seconds >= 1 else "under a second"
