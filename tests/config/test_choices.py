"""What a key may say is what the code does: each list of choices against its implementation."""

import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from sft_fast.config.schema import Config, inspect_config

ROOT = Path(__file__).parents[2]


def literals(annotation: Any) -> Iterator[Any]:
    """The Literal types inside an annotation."""
    if get_origin(annotation) is Literal:
        yield annotation
    for part in get_args(annotation) if get_origin(annotation) is not Literal else ():
        yield from literals(part)


def choice_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """(dotted key, its values) of every key with a list of choices."""
    hints = typing.get_type_hints(model, include_extras=True)
    for name in model.model_fields:
        for part in (hints[name], *get_args(hints[name])):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from choice_keys(part, f"{prefix}{name}.")
        for literal in literals(hints[name]):
            yield f"{prefix}{name}", get_args(literal)


CHOICES = dict(choice_keys(Config))


def attention() -> Iterable[str]:
    from sft_fast.megatron.attention.backends import BACKENDS

    return ("auto", *BACKENDS)


def loss_backend() -> Iterable[str]:
    from sft_fast.kernels.backends import OPERATIONS

    return ("auto", *OPERATIONS["masked_cross_entropy"].modules)


def kernels() -> Iterable[str]:
    from sft_fast.kernels.backends import OPERATIONS

    return ("auto", *OPERATIONS["block"].modules)


def strategy() -> Iterable[str]:
    from sft_fast import _C

    return ("auto", *_C.STRATEGIES)


def trackers() -> Iterable[str]:
    from sft_fast.metrics.trackers import TRACKERS

    return TRACKERS


def dtype() -> Iterable[str]:
    from sft_fast.constants import DTYPE_BYTES
    from sft_fast.megatron.model import DTYPES

    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == DTYPE_BYTES
    return DTYPES


def fp8_recipe() -> Iterable[str]:
    from megatron.core.enums import Fp8Recipe

    from sft_fast.models.choices import FP8_MULTIPLES

    assert FP8_MULTIPLES.keys() <= {recipe.value for recipe in Fp8Recipe}
    return FP8_MULTIPLES


IMPLEMENTED: dict[str, Callable[[], Iterable[str]]] = {
    "model.attention": attention,
    "model.dtype": dtype,
    "model.kernels": kernels,
    "export.dtype": dtype,
    "model.fp8_recipe": fp8_recipe,
    "packing.strategy": strategy,
    "loss.backend": loss_backend,
    "metrics.trackers": trackers,
}
# Chosen between by comparisons. The file compares with each value but for `rest`, which is what
# happens if none of the others is meant.
COMPARED = {
    "model.new_embeddings": ("megatron/load_inputs.py", "mean"),
    "model.transformer_impl": ("config/sections.py", "auto local"),
    "model.fp8": ("config/sections.py", "hybrid e4m3"),
    "model.recompute": ("models/estimate.py", "none"),
    "model.recompute_modules": ("models/estimate.py", "core_attn moe"),
    "parallel.stage_layers": ("config/layout.py", "balanced"),
    "lora.targets": ("config/layout.py", ""),
    "data.eval_overlap": ("megatron/load_inputs.py", "allow"),
    "data.near_duplicates": ("data/near_duplicates.py", "drop"),
    "data.train_on": ("data/render.py", ""),
    "data.changing_history": ("data/render.py", "error"),
    "data.over_length": ("data/build.py data/sample_maker.py", ""),
    "data.on_bad_row": ("data/build.py", "skip"),
    "loss.policy": ("../kernels/memory_plan.py", ""),
    # megatron-core's; its scheduler raises at any other.
    "optim.decay": ("megatron/optim.py", "cosine linear constant inverse-square-root WSD"),
    "optim.wsd_decay": ("megatron/optim.py", "exponential linear cosine minus_sqrt"),
    "optim.weight_decay_growth": ("megatron/optim.py", "linear cosine"),
    "guard.on_spike": ("megatron/guard.py", "skip"),
    "model.verify": ("megatron/compare.py", "auto"),
    "export.verify": ("megatron/compare.py", "auto"),
    "checkpoint.allow_change": ("megatron/checkpoint/fingerprint.py", ""),
}


def test_every_list_of_choices_is_compared_with_its_code() -> None:
    assert CHOICES.keys() == IMPLEMENTED.keys() | COMPARED.keys()
    assert not IMPLEMENTED.keys() & COMPARED.keys()


@pytest.mark.parametrize("key", IMPLEMENTED)
def test_what_the_schema_allows_is_what_is_implemented(key: str) -> None:
    assert sorted(CHOICES[key]) == sorted(IMPLEMENTED[key]())


@pytest.mark.parametrize("key", COMPARED)
def test_what_the_schema_allows_is_compared_with(key: str) -> None:
    files, rest = COMPARED[key]
    code = "".join((ROOT / "sft_fast" / name).read_text(encoding="utf-8") for name in files.split())
    assert set(rest.split()) <= set(CHOICES[key])
    missing = [v for v in CHOICES[key] if v not in rest.split() and f'"{v}"' not in code]
    assert not missing


def test_limits_of_packing_are_those_of_the_planners() -> None:
    from sft_fast.packing.bins import PackingOptions

    for name in ("max_samples_per_bin", "pool_size"):
        schema = Config.model_json_schema()["$defs"]["PackingConfig"]["properties"][name]
        limit = schema.get("maximum") or schema["anyOf"][0]["maximum"]
        PackingOptions(**{name: limit})
        with pytest.raises(ValueError, match=f"packing.{name} is {limit + 1}"):
            PackingOptions(**{name: limit + 1})


@pytest.mark.parametrize("name", ["loss", "perplexity", "accuracy"])
def test_a_metric_that_is_always_there_is_no_metric_of_ones_own(name: str) -> None:
    path = ROOT / "sft_fast" / "recipes" / "demo.yaml"
    _, problems, _ = inspect_config(path, [f"evaluation.metrics=[{name}]"])
    assert [(problem.keys, problem.fix) for problem in problems] == [
        (("evaluation.metrics",), f"leave {name} out")
    ]


def test_a_choice_is_found_wherever_it_stands() -> None:
    class Inner(BaseModel):
        colour: list[Literal["red"]] | None = None

    class Outer(BaseModel):
        inner: Inner | None = None
        size: typing.Annotated[Literal["big", "small"], "text"] = "big"

    found = dict(choice_keys(Outer))
    assert found == {"inner.colour": ("red",), "size": ("big", "small")}
