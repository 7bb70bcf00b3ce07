"""The Megatron-LM plug-in against a stand-in of `megatron.training`: calls and results."""

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rank_pool import RankPool
from tiny import vary_vectors

YAML = """
output_dir: {output}
model: {{path: {model}}}
tokenizer: {{path: {model}}}
data: {{train: {data}, eval: {data}, eval_overlap: allow}}
packing: {{capacity: 32}}
train: {{steps: 1}}
"""
MEGATRON_ARGS: dict[str, Any] = {
    "bf16": False,
    "fp16": False,
    "seed": 3,
    "seq_length": 128,
    "train_iters": 4,
    "global_batch_size": 4,
    "micro_batch_size": 1,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "sequence_parallel": False,
    "eval_iters": 3,
}


def stand_in(style: str, results: dict[str, Any], changes: dict[str, Any]) -> dict[str, ModuleType]:
    """Modules that do what Megatron-LM's `pretrain` does with the providers, without an optimizer.

    Args:
        style: "providers" (up to 0.17), "middle" (0.18) or "container" (0.19).
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    training: Any = ModuleType("megatron.training")
    arguments: Any = ModuleType("megatron.training.arguments")
    utilities: Any = ModuleType("megatron.training.argument_utils")

    def parse(extra_args_provider: Any) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        parser.add_argument("--calculate-per-token-loss", action="store_true")
        parser.add_argument("--dataloader-type")
        args = extra_args_provider(parser).parse_args()
        assert args.dataloader_type == "external" and args.calculate_per_token_loss
        for name, value in (MEGATRON_ARGS | changes).items():
            setattr(args, name, value)
        args.consumed_train_samples = results.get("consumed", 0)
        training.get_args = lambda: args
        return args

    def run(datasets: Any, model_provider: Any, step: Any) -> None:
        args = training.get_args()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=args.tensor_model_parallel_size,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
        )
        assert datasets.is_distributed
        stage = parallel_state.get_pipeline_model_parallel_rank()
        is_last = stage == args.pipeline_model_parallel_size - 1
        model = model_provider(pre_process=stage == 0, post_process=is_last, config=None)
        ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
        ddp.config.finalize_model_grads_func = finalize_model_grads
        train, valid, test = datasets((8, 8, 0))
        assert test is None
        schedule = get_forward_backward_func()
        dp_size = parallel_state.get_data_parallel_world_size()

        def losses_of(iterator: Any, forward_only: bool) -> list[list[float]]:
            reports = schedule(
                forward_step_func=step,
                data_iterator=iterator,
                model=[ddp],
                num_microbatches=args.global_batch_size // dp_size,
                seq_length=args.seq_length,
                micro_batch_size=args.micro_batch_size,
                forward_only=forward_only,
            )
            return [report["lm loss"].tolist() for report in reports]

        ddp.zero_grad_buffer()
        num_steps = args.train_iters - args.consumed_train_samples // args.global_batch_size
        results["train"] = [losses_of(train, False) for _ in range(num_steps)]
        results["rest"] = next(train, None)
        results["valid"] = [losses_of(valid, True) for _ in range(args.eval_iters)]
        squares = sum(float(p.main_grad.square().sum()) for p in ddp.parameters())
        results["gradient"] = squares

    def with_providers(
        train_valid_test_dataset_provider: Any,
        model_provider: Any,
        model_type: Any,
        forward_step_func: Any,
        extra_args_provider: Any = None,
    ) -> None:
        parse(extra_args_provider)
        run(train_valid_test_dataset_provider, model_provider, forward_step_func)

    def with_container(
        cfg_container: Any,
        train_valid_test_dataset_provider: Any,
        model_type: Any,
        forward_step_func: Any,
        model_provider: Any = None,
    ) -> None:
        assert cfg_container is training.get_args()
        run(train_valid_test_dataset_provider, model_provider, forward_step_func)

    def in_the_middle(
        cfg_container: Any,
        train_valid_test_dataset_provider: Any,
        model_provider: Any,
        model_type: Any,
        forward_step_func: Any,
    ) -> None:
        assert cfg_container is training.get_args()
        run(train_valid_test_dataset_provider, model_provider, forward_step_func)

    calls = {"providers": with_providers, "middle": in_the_middle, "container": with_container}
    training.pretrain = calls[style]
    arguments.parse_and_validate_args = parse
    utilities.pretrain_cfg_container_from_args = lambda args: args
    assert torch.is_grad_enabled()
    return {module.__name__: module for module in (training, arguments, utilities)}


def pretrained(
    config: str, style: str, consumed: int, changes: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    """(exit code, what the stand-in saw)."""
    import contextlib
    import io

    from sft_fast.megatron import pretrain

    results: dict[str, Any] = {"consumed": consumed}
    modules = stand_in(style, results, changes)
    before = {name: sys.modules.get(name) for name in modules}
    argv, sys.argv = sys.argv, ["pretrain", "--sft-config", config]
    sys.modules.update(modules)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            code = pretrain.main()
    finally:
        sys.argv = argv
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    results["error"] = errors.getvalue()
    return code, results


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM

    from sft_fast.data.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("pretrain")
    tokenizer = load_tokenizer("demo")
    tokenizer.save_pretrained(folder / "model")
    llama = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=256,
    )
    model = AutoModelForCausalLM.from_config(llama)
    vary_vectors(model)
    model.save_pretrained(folder / "model")
    rows = [{"prompt": f"next of {number}", "completion": str(number + 1)} for number in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "my.yaml"
    path.write_text(
        YAML.format(output=folder / "run", model=folder / "model", data=folder / "rows.jsonl")
    )
    return str(path)


def totals(results: dict[str, Any], part: str) -> list[list[float]]:
    """[loss sum, tokens] of each step."""
    return [[sum(column) for column in zip(*step, strict=True)] for step in results[part]]


def test_both_calls_train_alike_and_go_on_where_they_stopped(
    rank_pool: RankPool, config: str
) -> None:
    ((code, old),) = rank_pool.run(1, pretrained, config, "providers", 0, {})
    assert code == 0, old["error"]
    ((_, new),) = rank_pool.run(1, pretrained, config, "container", 0, {})
    assert new["train"] == old["train"] and new["gradient"] == old["gradient"] > 0
    assert len(old["train"]) == 4 and len(old["valid"]) == 3 and old["rest"] is None
    assert all(tokens > 0 for _, tokens in totals(old, "train"))
    ((_, later),) = rank_pool.run(1, pretrained, config, "middle", 8, {})
    assert later["train"] == old["train"][2:]
    # Two data-parallel ranks share each step; the evaluation begins anew.
    halves = [results for _, results in rank_pool.run(2, pretrained, config, "providers", 0, {})]
    for part in ("train", "valid"):
        shares = [totals(half, part) for half in halves]
        summed = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(*shares, strict=True)]
        for got, expected in zip(summed, totals(old, part), strict=True):
            assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calculate_per_token_loss": False}, "--calculate-per-token-loss is off"),
        ({"pipeline_model_parallel_size": 2, "micro_batch_size": 2}, "--micro-batch-size is 2"),
        ({"seq_length": 4}, "packing.capacity"),
        ({"train_iters": None}, "--train-iters is missing"),
        ({"sft_override": ["router.z_loss_coef=0.1"]}, "router.z_loss_coef needs sft_fast's own"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    rank_pool: RankPool, config: str, changes: dict[str, Any], message: str
) -> None:
    size = changes.get("pipeline_model_parallel_size", 1)
    for code, results in rank_pool.run(size, pretrained, config, "providers", 0, changes):
        assert code == 2
        assert message in results["error"]


def test_without_megatron_lm_the_message_says_where_it_comes_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sft_fast.megatron import pretrain

    monkeypatch.setitem(sys.modules, "megatron.training", None)
    assert pretrain.main() == 2
    assert "comes with Megatron-LM" in capsys.readouterr().err

    def pretrain_of(extra_args_provider: Any, **rest: Any) -> None:
        raise ValueError("of Megatron-LM")

    training: Any = ModuleType("megatron.training")
    training.pretrain = pretrain_of
    monkeypatch.setitem(sys.modules, "megatron.training", training)
    # Its own error keeps its traceback.
    with pytest.raises(ValueError, match="of Megatron-LM"):
        pretrain.main()
    assert Path(pretrain.__file__).name == "pretrain.py"
