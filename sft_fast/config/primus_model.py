"""The model of a Primus file: weights, sizes by name of a preset, stages, what is recomputed."""

import os
from typing import Any

from sft_fast.config.primus_arguments import (
    ARCHITECTURE,
    DETAILS,
    LATENT,
    RECOMPUTED,
    SIZES,
    as_flag,
)
from sft_fast.config.primus_presets import PRESETS, Preset
from sft_fast.config.primus_translation import Translation
from sft_fast.config.validation import ValueOrigin
from sft_fast.errors import Problem, nearest, show


def translate_model(file: Translation) -> None:
    """Sets the sections model and tokenizer, and the interleaved stages."""
    _translate_dtype(file)
    if "hf_path" in file.arguments:
        _from_hub(file)
    else:
        _refuse_latent(file)
        _from_sizes(file)
    _translate_recompute(file)
    _translate_layout(file)
    _translate_fp8_gather(file)


def _translate_dtype(file: Translation) -> None:
    fp16, bf16 = (as_flag(file.value(name)) for name in ("fp16", "bf16"))
    for name, value in (("fp16", fp16), ("bf16", bf16)):
        if value is not None and not isinstance(value, bool):
            file.problem((*file.base, name), show(value), "true or false")
    if fp16 and file.arguments.get("bf16"):
        file.problem((*file.base, "fp16"), "fp16 and bf16", "one of the two")
    name = "fp16" if fp16 else "bf16"
    file.set("model.dtype", name if fp16 or bf16 else "fp32", (*file.base, name), name)


def _refuse_latent(file: Translation) -> None:
    given = [name for name in LATENT if file.arguments.get(name) not in (None, False, 0)]
    if given:
        keys = tuple(".".join(str(part) for part in (*file.base, name)) for name in given)
        where = file.document.where((*file.base, given[0]))
        expected = "hf_path: random weights without a config.json have no latent attention"
        found = ", ".join(show(file.arguments[name]) for name in given)
        file.tree.problems.append(Problem(keys, found, expected, "", where))


def _from_hub(file: Translation) -> None:
    for name in SIZES:
        if name in file.arguments:
            found = f"{show(file.arguments[name])} together with hf_path"
            expected = "one of them: the architecture of hf_path is in its config.json"
            file.problem((*file.base, name), found, expected, f"remove {name}")
    others = [name for name in (*DETAILS, *ARCHITECTURE, *LATENT) if name in file.arguments]
    if "model" in file.document.data["modules"][file.module[1]]:
        others.insert(0, "model")
    if others:
        names = ", ".join(others)
        file.note(f"the architecture is that of hf_path's config.json, not used: {names}")
    if file.arguments.get("pretrained_checkpoint") not in (None, False):
        file.note("pretrained_checkpoint: not read, the weights are those of hf_path")


def _preset(file: Translation) -> Preset | None:
    """The preset that the module names; None: there is none, or what it is nobody knows."""
    name = file.document.data["modules"][file.module[1]].get("model")
    if not isinstance(name, str):
        return None
    return PRESETS.get(os.path.basename(name).removesuffix(".yaml"))


def _from_sizes(file: Translation) -> None:
    """Random weights of the sizes that the arguments and the preset give."""
    preset, place = _preset(file), file.document.where((*file.module, "model"))
    hub_id = f"hf_path: {preset.hub_id}" if preset else "hf_path: <directory or hub id>"
    if file.arguments.get("pretrained_checkpoint") not in (None, False):
        found = f"{show(file.arguments['pretrained_checkpoint'])} without hf_path"
        expected = "the Hugging Face model that the checkpoint was made of"
        path = (*file.base, "pretrained_checkpoint")
        file.problem(path, found, expected, hub_id)
        # What the sizes lack would be said a second time.
        file.tree.set(("model", "path"), preset.hub_id if preset else "hf_path", ValueOrigin(""))
        return
    file.check_fixed(ARCHITECTURE)
    sizes = [name for name in SIZES if name in file.arguments]
    facts = preset.arguments if preset else {}
    if not sizes and not facts:
        _point_at_preset(file, preset, place, hub_id)
        return
    if preset and facts and set(sizes) != set(SIZES):
        file.note(f"no hf_path: random weights, and sizes of {preset.hub_id} where none is given")
    for name, target in {**SIZES, **DETAILS}.items():
        if name in file.arguments:
            file.set_argument(name, target)
        elif name in facts:
            origin = ValueOrigin(place, name)
            file.tree.set(tuple(target.key.split(".")), target.convert(facts[name]), origin)
        else:
            origin = ValueOrigin(file.document.where(file.base), name)
            file.tree.origins[tuple(target.key.split("."))] = origin
    if preset and "tokenizer_model" not in file.arguments:
        origin = ValueOrigin(place, "tokenizer_model")
        file.tree.set(("tokenizer", "path"), preset.hub_id, origin)
    _translate_groups(file, bool(facts))


def _point_at_preset(file: Translation, preset: Preset | None, place: str, fix: str) -> None:
    if preset is None:
        # The "neither path nor shape" error then points at the preset, which is not known.
        file.tree.origins[("model", "path")] = ValueOrigin(place, "hf_path")
        names = file.document.data["modules"][file.module[1]].get("model")
        near = nearest(str(names).removesuffix(".yaml"), PRESETS)
        if near:
            file.note(f"model: {names} is no preset that is known; did you mean {near}.yaml?")
        return
    found = f"{preset.hub_id} without hf_path, so with random weights"
    expected = "its weights, or model.random_init=true for random ones of that architecture"
    file.problem((*file.module, "model"), found, expected, fix)
    file.tree.set(("model", "path"), preset.hub_id, ValueOrigin(place))


def _translate_groups(file: Translation, is_preset: bool) -> None:
    heads, groups = (file.arguments.get(n) for n in ("num_attention_heads", "num_query_groups"))
    grouped = as_flag(file.value("group_query_attention"))
    if grouped is False and groups not in (None, heads):
        path = (*file.base, "num_query_groups")
        file.problem(path, f"{show(groups)} with group_query_attention false", show(heads))
    if heads is not None and groups is None and (grouped is False or not (grouped or is_preset)):
        key = SIZES["num_query_groups"].key
        file.set(key, heads, (*file.base, "num_attention_heads"), "num_attention_heads")


def _translate_recompute(file: Translation) -> None:
    """Megatron's granularity and method together are model.recompute."""
    granularity, method = (
        file.arguments.get(name) for name in ("recompute_granularity", "recompute_method")
    )
    layers, modules = (
        file.arguments.get(name) for name in ("recompute_num_layers", "recompute_modules")
    )
    names = [n for n in ("recompute_method", "recompute_num_layers") if n in file.arguments]
    path = (*file.base, "recompute_granularity")
    if granularity is None:
        if names:
            file.note(f"no effect without recompute_granularity full: {', '.join(names)}")
        return
    if method not in (None, "uniform", "block"):
        file.problem((*file.base, "recompute_method"), show(method), "uniform or block")
        return
    if granularity == "full" and method == "block":
        file.set("model.recompute", "block", path, "recompute_granularity")
        layers_path = (*file.base, "recompute_num_layers")
        file.set("model.recompute_layers", layers, layers_path, "recompute_num_layers")
        return
    file.set("model.recompute", granularity, path, "recompute_granularity")
    if layers not in (None, 1):
        file.note("recompute_num_layers: no effect without recompute_method block")
    if granularity == "selective" and isinstance(modules, list):
        parts: list[Any] = [RECOMPUTED.get(str(part), part) for part in modules]
        modules_path = (*file.base, "recompute_modules")
        file.set("model.recompute_modules", parts, modules_path, "recompute_modules")
    elif modules is not None:
        found, expected = show(modules), "a list, with recompute_granularity selective"
        file.problem((*file.base, "recompute_modules"), found, expected)


def _translate_layout(file: Translation) -> None:
    """A layout such as Et*5|t*6|t*6|t*5L."""
    layout, path = (
        file.arguments.get("pipeline_model_parallel_layout"),
        (*file.base, "pipeline_model_parallel_layout"),
    )
    if layout is None:
        return
    stages = _stages(layout)
    ranks = file.value("pipeline_model_parallel_size") or 1
    if stages is None or type(ranks) is not int or len(stages) % ranks != 0:
        expected = "stages such as Et*8|t*8|t*8|t*8L, as many as the ranks or a multiple"
        file.problem(path, show(layout), expected, "remove pipeline_model_parallel_layout")
        return
    if len(set(stages)) > 1:
        file.set("parallel.stage_layers", stages, path, "pipeline_model_parallel_layout")
    if len(stages) > ranks:
        key = "parallel.virtual_pipeline"
        file.set(key, len(stages) // ranks, path, "pipeline_model_parallel_layout")


def _stages(layout: Any) -> list[int] | None:
    """Layers of each stage; None: it is no layout, or has more than layers, embedding and head."""
    if not isinstance(layout, str):
        return None
    stages = layout.replace(",", "").split("|")
    if not stages[0].startswith("E") or not stages[-1].endswith("L"):
        return None
    stages[0], stages[-1] = stages[0][1:], stages[-1][:-1]
    counts = []
    for stage in stages:
        letters, _, count = stage.partition("*")
        if count and letters == "t" and count.isdecimal():
            counts.append(int(count))
        elif not count and set(letters) <= {"t"}:
            counts.append(len(letters))
        else:
            return None
    return counts


def _translate_fp8_gather(file: Translation) -> None:
    gather = as_flag(file.arguments.get("fp8_param_gather"))
    if gather in (None, False):
        return
    path = (*file.base, "fp8_param_gather")
    if gather is not True:
        file.problem(path, show(gather), "true or false")
    elif file.arguments.get("fp8") in (None, False, 0):
        file.problem(path, "true without fp8", "fp8: hybrid", "remove fp8_param_gather")
    else:
        file.note("fp8_param_gather: weights are gathered in bf16, and made 8 bits on each rank")
