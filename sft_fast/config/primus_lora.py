"""The mapping `lora` of a Primus file: adapters beside Megatron's matrices, named as PEFT does."""

from typing import Any

from sft_fast.config.primus_arguments import (
    ALL_LORA_TARGETS,
    LORA,
    LORA_DEFAULTS,
    LORA_FIXED,
    LORA_TARGETS,
    as_flag,
)
from sft_fast.config.primus_translation import Translation
from sft_fast.errors import nearest, show

KEYS = ("enabled", *LORA, "target_modules", *LORA_FIXED)
DIFFERENCE = (
    "lora: q, k and v have an A each, as in PEFT, and so have gate and up (Primus: one for "
    "linear_qkv, one for linear_fc1); A begins uniform in +-1/sqrt(inputs) (Primus: by "
    "lora_A_init_method, whose default is xavier)"
)


def translate_lora(file: Translation) -> None:
    """Sets the section lora where the file switches adapters on."""
    lora = file.arguments.get("lora")
    path = (*file.base, "lora")
    if lora is None or lora is False:
        return
    if not isinstance(lora, dict):
        file.problem(path, show(lora), f"a mapping with {', '.join(KEYS)}", "lora: {enabled: true}")
        return
    for name in lora:
        if name not in KEYS:
            near = nearest(str(name), KEYS)
            fix = f"did you mean {near}?" if near else f"remove {name}"
            file.problem((*path, name), "an unknown key", f"one of {', '.join(KEYS)}", fix)
    enabled = as_flag(lora.get("enabled", False))
    if not isinstance(enabled, bool):
        file.problem((*path, "enabled"), show(enabled), "true or false")
    if enabled is not True:
        if enabled is False and lora.keys() - {"enabled"}:
            file.note("lora: enabled is not true, so its other keys have no effect")
        return
    given = {name: value for name, value in lora.items() if value is not None}
    values = LORA_DEFAULTS | given
    for name, target in LORA.items():
        file.set(target.key, values[name], (*path, name), f"lora.{name}")
    if isinstance(values["alpha"], int) and not isinstance(values["alpha"], bool):
        file.set("lora.alpha", float(values["alpha"]), (*path, "alpha"), "lora.alpha")
    file.check_fixed(LORA_FIXED, given, "lora")
    _translate_targets(file, given.get("target_modules"))
    file.note(DIFFERENCE)


def _translate_targets(file: Translation, targets: Any) -> None:
    path = (*file.base, "lora", "target_modules")
    if targets is None:
        return
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        file.problem(path, show(targets), f"a list of {', '.join(LORA_TARGETS)}")
        return
    if as_flag(file.arguments.get("multi_latent_attention")) is True and "linear_qkv" in targets:
        # Megatron's latent attention has no matrix of that name either.
        targets = [name for name in targets if name != "linear_qkv"]
        file.note(
            "lora.target_modules: latent attention has no linear_qkv; name linear_q_proj, ..."
        )
    if set(targets) == set(ALL_LORA_TARGETS):
        # The default is all of them too, whatever a family calls its matrices.
        return
    names = []
    for target in targets:
        prefix, dot, matrix = target.rpartition(".")
        if matrix not in LORA_TARGETS or (dot and not prefix.startswith("*")):
            near = nearest(matrix, LORA_TARGETS)
            fix = f"did you mean {near}?" if near and near != matrix else f"remove {target}"
            expected = (
                f"among {', '.join(LORA_TARGETS)}, or a pattern such as *.layers.0.*.linear_qkv"
            )
            file.problem(path, target, expected, fix)
            continue
        names += [f"{prefix}{dot}{projection}" for projection in LORA_TARGETS[matrix]]
    if names:
        file.set("lora.targets", list(dict.fromkeys(names)), path, "lora.target_modules")
