"""Primus experiment files (a top-level key `modules`) translated into our keys."""

import math
import os
import re
from pathlib import Path
from typing import Any

from sft_fast.config.primus_arguments import (
    ARCHITECTURE,
    COMBINED,
    DETAILS,
    FIXED,
    IGNORED,
    LATENT,
    MODULE_FILE,
    NOTED,
    OFF,
    SIZES,
    TARGETS,
    TEMPLATES,
    Fixed,
    as_flag,
)
from sft_fast.config.primus_bridge import FRAMEWORK, as_native
from sft_fast.config.primus_bridge import TOP_KEYS as BRIDGE_KEYS
from sft_fast.config.primus_lora import translate_lora
from sft_fast.config.primus_model import translate_model
from sft_fast.config.primus_translation import Translation
from sft_fast.config.validation import Tree, ValueOrigin
from sft_fast.config.yaml_source import Document, KeyPath, parse_value, read_yaml
from sft_fast.errors import ConfigError, Problem, nearest, show
from sft_fast.redact import is_secret_name

TOP_KEYS = ("exp_name", "modules", "user_name", "work_group", "workspace")
MODULE_KEYS = ("config", "framework", "model", "overrides")
KNOWN = {
    *(*TARGETS, *SIZES, *DETAILS, *ARCHITECTURE, *FIXED, *OFF, *IGNORED, *COMBINED),
    *(*NOTED, *LATENT),
}
"""Every argument that has a meaning here, with the prefixes of OFF."""
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::([^{}]*))?\}")
_ENVIRONMENT = re.compile(r"[A-Z][A-Z0-9_]*")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_primus(document: Document) -> bool:
    """Whether a file is a Primus experiment, or extends one."""
    return "modules" in document.data or "extends" in document.data


def translate(document: Document) -> Tree:
    """Returns a Primus experiment file as a tree of our keys.

    What is wrong goes into the tree's problems, under the names that the file uses, and what means
    something else here into its notes.

    Raises:
        ConfigError: `modules` does not hold exactly one module, or a file that it extends cannot
            be read.
    """
    document, given = _extended(document, ())
    return _Experiment(document).run(given)


def drop_idle_evaluation(tree: Tree) -> None:
    """Removes the evaluation schedule of the file when no evaluation data is named.

    Primus has no argument for evaluation data, so only `data.eval` on the command line gives it.
    """
    if (tree.data.get("data") or {}).get("eval") is not None:
        return
    idle = [
        key
        for key in ("every_steps", "max_samples")
        if tree.origins.get(("evaluation", key), ValueOrigin("")).name
    ]
    for key in idle:
        tree.remove("evaluation", key)
    if idle:
        tree.notes.append("no evaluation: name its data with data.eval=<file or hub id>")


def _extended(document: Document, seen: tuple[str, ...]) -> tuple[Document, list[str]]:
    """The file laid over those that it extends, and the arguments at the top of one that does."""
    if "extends" not in document.data:
        return document, []
    parents = document.data.pop("extends")
    parents = [parents] if isinstance(parents, str) else parents
    where = document.where(("extends",))

    def fail(found: str, expected: str) -> ConfigError:
        return ConfigError([Problem(("extends",), found, expected, "", where)], document.name)

    if not isinstance(parents, list) or not all(isinstance(name, str) for name in parents):
        raise fail(show(parents), "a file, or a list of files, relative to this one")
    seen = (*seen, os.path.realpath(document.name))
    merged, given = Document(document.name), [key for key in document.data if key in KNOWN]
    for name in parents:
        path = Path(document.name).parent / name
        if os.path.realpath(path) in seen:
            raise fail(f"{name}, which extends this file", "files that do not extend each other")
        try:
            parent, more = _extended(read_yaml(path), seen)
        except ConfigError as error:
            raise fail(f"{name}: {error.problems[0].found}", "files that can be read") from None
        _lay_over(merged, parent)
        given += more
    _lay_over(merged, document)
    return merged, given


def _lay_over(below: Document, above: Document) -> None:
    """Gives `below` what `above` has: mappings are merged, all else is replaced."""

    def merge(old: dict[str, Any], new: dict[str, Any]) -> None:
        for key, value in new.items():
            if isinstance(value, dict) and isinstance(old.get(key), dict):
                merge(old[key], value)
            else:
                old[key] = value

    merge(below.data, above.data)
    below.lines.update(above.lines)
    below.problems += above.problems
    below.files.update({path: above.files.get(path, above.name) for path in above.lines})


class _Experiment(Translation):
    """The frame of a file, and all arguments that are not the model's or the adapters'."""

    def run(self, given: list[str]) -> Tree:
        """The tree; `given` are arguments at the top of a file that extends another."""
        self.document.data = self._expand(self.document.data, ())
        self._read_top(given)
        module = self._only_module()
        if module is None:
            raise ConfigError(self.tree.problems, self.document.name)
        self._read_module(module, given)
        self._translate_arguments()
        return self.tree

    def _expand(self, value: Any, path: KeyPath) -> Any:
        """Replaces ${VAR} and ${VAR:default} in every string."""
        if isinstance(value, dict):
            return {key: self._expand(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self._expand(item, (*path, index)) for index, item in enumerate(value)]
        if not isinstance(value, str) or not _VARIABLE.search(value):
            return value
        text = _VARIABLE.sub(lambda match: self._variable(match, path), value)
        try:
            expanded = parse_value(text)
        except ValueError:
            return text
        return text if isinstance(expanded, dict | list) else expanded

    def _variable(self, match: re.Match[str], path: KeyPath) -> str:
        name, default = match.groups()
        if is_secret_name(name):
            self.problem(path, f"${{{name}}}", "no secrets in a configuration, it is saved")
            return ""
        value = os.environ.get(name, default)
        if value is None:
            fix = f"export {name}=..., or write ${{{name}:default}}"
            self.problem(path, f"${{{name}}}, which is not set", "a variable that is set", fix)
            return ""
        return value

    @property
    def is_bridge(self) -> bool:
        """Whether the file is for Megatron-Bridge."""
        modules = self.document.data.get("modules")
        listed = modules.values() if isinstance(modules, dict) else ()
        return any(isinstance(m, dict) and m.get("framework") == FRAMEWORK for m in listed)

    def _read_top(self, given: list[str]) -> None:
        top = self.document.data
        for key in top:
            if key in BRIDGE_KEYS and self.is_bridge:
                continue
            if key not in TOP_KEYS and key not in given:
                near = nearest(key, TOP_KEYS)
                fix = f"did you mean {near}?" if near else "arguments belong into overrides"
                expected = f"one of {', '.join(TOP_KEYS)} in a Primus experiment file"
                self.problem((key,), "an unknown key", expected, fix)
        names = ("workspace", "work_group", "user_name", "exp_name")
        parts = [str(top[name]) for name in names if top.get(name) not in (None, "")]
        if parts:
            key = next(name for name in reversed(names) if name in top)
            self.set("output_dir", os.path.normpath(os.path.join(*parts)), (key,), key)

    def _only_module(self) -> dict[str, Any] | None:
        modules = self.document.data.get("modules")
        if not isinstance(modules, dict) or len(modules) != 1:
            found = f"modules {', '.join(modules)}" if isinstance(modules, dict) else show(modules)
            self.problem(("modules",), found, "exactly one module, for example post_trainer")
            return None
        name, module = next(iter(modules.items()))
        self.module = self.base = ("modules", name)
        if not isinstance(module, dict):
            self.problem(self.base, show(module), f"keys {', '.join(MODULE_KEYS)}")
            return None
        return module

    def _read_module(self, module: dict[str, Any], given: list[str]) -> None:
        for key in module:
            if key not in MODULE_KEYS:
                near = nearest(key, MODULE_KEYS)
                fix = f"did you mean {near}?" if near else "arguments belong into overrides"
                self.problem((*self.base, key), "an unknown key", ", ".join(MODULE_KEYS), fix)
        config = module.get("config", MODULE_FILE)
        if not isinstance(config, str) or os.path.basename(config) != MODULE_FILE:
            fix = "other module files are not read: write their keys into overrides"
            self.problem((*self.base, "config"), show(config), MODULE_FILE, fix)
        if module.get("framework") is None:
            self.problem((*self.base, "framework"), "nothing", "a framework, e.g. megatron")
        else:
            backend = "megatron" if self.is_bridge else module["framework"]
            self.set("backend", backend, (*self.base, "framework"), "framework")
        overrides = module.get("overrides") or {}
        if isinstance(overrides, dict):
            overrides = self._with_top(overrides, given)
            if self.is_bridge:
                self.base = (*self.base, "overrides")
                overrides = as_native(self, module, overrides)
                self.base = self.module
            self.arguments = {key: value for key, value in overrides.items() if value is not None}
            # null takes an argument's default away, as it does in Primus.
            self.defaults = {k: v for k, v in self.defaults.items() if k not in overrides}
            self._check_names(overrides)
        else:
            self.problem((*self.base, "overrides"), show(overrides), "a mapping of arguments")
        self.base = (*self.base, "overrides")

    def _with_top(self, overrides: dict[str, Any], given: list[str]) -> dict[str, Any]:
        """Arguments with those that stand at the top of a file which extends the module's."""
        for name in dict.fromkeys(given):
            value, old = self.document.data[name], overrides.get(name)
            if isinstance(value, dict) and isinstance(old, dict):
                value = {**old, **value}
            overrides = {**overrides, name: value}
            path: KeyPath = (*self.base, "overrides", name)
            for line in [line for line in self.document.lines if line[0] == name]:
                self.document.lines[(*path, *line[1:])] = self.document.lines[line]
                file = self.document.files.get(line, self.document.name)
                self.document.files[(*path, *line[1:])] = file
        if given:
            names = ", ".join(dict.fromkeys(given))
            self.note(f"at the top of the file, taken as overrides of the module: {names}")
        return overrides

    def _check_names(self, overrides: dict[str, Any]) -> None:
        variables = sorted(name for name in overrides if _ENVIRONMENT.fullmatch(name))
        for name in overrides:
            path = (*self.base, "overrides", name)
            if name in KNOWN or any(name.startswith(prefix) for prefix in OFF):
                continue
            if is_secret_name(name):
                self.problem(path, "a key that looks like a secret", "no secrets in a file")
                continue
            if name in variables:
                continue
            near = nearest(name, KNOWN)
            found = f"an unknown argument with {show(overrides[name])}"
            fix = f"did you mean {near}?" if near else f"remove {name}"
            self.problem(
                path, found, "an argument that sft_fast/config/primus_arguments.py names", fix
            )
        if variables:
            names = ", ".join(variables)
            self.note(f"names of environment variables, which no file sets: {names}")

    def _translate_arguments(self) -> None:
        for name, target in TARGETS.items():
            if name in self.arguments or name in self.defaults:
                self.set_argument(name, target)
        self.set("stage", self.arguments.get("stage", "sft"), (*self.base, "stage"), "stage")
        translate_model(self)
        translate_lora(self)
        self._translate_warmup()
        self._translate_data()
        self._translate_packing()
        self._translate_sequence_parallel()
        self._translate_evaluation()
        self._translate_resume()
        self._translate_weight_decay()
        self._translate_guard()
        self.check_fixed(FIXED)
        self._check_off()
        self._say_what_has_no_effect()

    def _say_what_has_no_effect(self) -> None:
        by_reason: dict[str, list[str]] = {}
        for name, reason in NOTED.items():
            if self.arguments.get(name) not in (None, False, 0, "fp32"):
                by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            self.note(f"{', '.join(names)}: {reason}")
        ignored = sorted(IGNORED & self.arguments.keys())
        if ignored:
            self.note(f"no effect on the weights, not used: {', '.join(ignored)}")

    def _translate_warmup(self) -> None:
        fraction = self.arguments.get("lr_warmup_fraction")
        path = (*self.base, "lr_warmup_fraction")
        if fraction is None:
            return
        if type(fraction) not in (int, float) or not 0 <= fraction < 1:
            self.problem(path, show(fraction), "a number from 0 up to, not including, 1")
            return
        if self.arguments.get("lr_warmup_iters", 0) != 0:
            found = f"{show(fraction)} beside lr_warmup_iters"
            self.problem(path, found, "one of the two", "remove lr_warmup_iters")
            return
        end = self.value("lr_decay_iters") or self.value("train_iters")
        if type(end) is not int:
            return
        # 0.07 * 100 is not 7 in floating point.
        steps = round(fraction * end)
        self.set("optim.warmup_steps", steps, path, "lr_warmup_fraction")
        if not math.isclose(steps, fraction * end, rel_tol=1e-9):
            found = f"{show(fraction)} of {end} steps, which is {fraction * end:g}"
            fix = f"replace it by lr_warmup_iters: {steps}"
            self.problem(path, found, "a whole number of warm-up steps", fix)

    def _translate_data(self) -> None:
        form, name = self.value("sft_conversation_format"), self.value("sft_dataset_name")
        if isinstance(form, str) and form in TEMPLATES:
            path = (*self.base, "sft_conversation_format")
            self.set("tokenizer.chat_template", TEMPLATES[form], path, "sft_conversation_format")
        part, path = self.arguments.get("sft_dataset_config"), (*self.base, "sft_dataset_config")
        if part is None:
            return
        if not isinstance(part, str) or not isinstance(name, str) or not _HUB_ID.fullmatch(name):
            found, expected = f"{show(part)} of {show(name)}", "a name, of a hub id owner/name"
            self.problem(path, found, expected)
        else:
            self.set("data.train", f"{name}:{part}", path, "sft_dataset_config")

    def _translate_packing(self) -> None:
        if as_flag(self.value("enable_packed_sequences")) is True:
            together = as_flag(self.arguments.get("use_packed_attention"))
            if together is False:
                self.note("use_packed_attention false: samples of a pack never see each other here")
            else:
                reason = "samples of a pack never see each other here"
                fixed = {"use_packed_attention": Fixed((True,), reason)}
                self.check_fixed(fixed)
        context = self.value("context_parallel_size")
        if type(context) is int and context > 1:
            path = (*self.base, "context_parallel_size")
            self.set("packing.alignment", 2 * context, path, "context_parallel_size")

    def _translate_sequence_parallel(self) -> None:
        # Megatron turns it off on its own where there is no tensor parallelism.
        if self.value("tensor_model_parallel_size") in (None, 1):
            self.tree.remove("parallel", "sequence")
            if as_flag(self.value("sequence_parallel")) is True:
                self.note("sequence_parallel is off: tensor_model_parallel_size is 1")

    def _translate_evaluation(self) -> None:
        batches, rows = self.value("eval_iters"), self.value("global_batch_size")
        path = (*self.base, "eval_iters")
        if batches == 0:
            self.tree.remove("evaluation", "every_steps")
        elif batches is not None:
            is_count = type(batches) is int and type(rows) is int
            samples = batches * rows if is_count else batches
            self.set("evaluation.max_samples", samples, path, "eval_iters")

    def _translate_resume(self) -> None:
        load, path = self.arguments.get("load"), (*self.base, "load")
        if load is not None and self.arguments.get("finetune", True):
            expected = "finetune: false to resume a run of this trainer, or hf_path for weights"
            self.problem(path, f"{show(load)} with finetune true", expected)
        elif load is not None:
            self.set("checkpoint.resume", load, path, "load")
        elif "auto_continue_train" in self.arguments:
            path = (*self.base, "auto_continue_train")
            mode = "auto" if as_flag(self.value("auto_continue_train")) is True else "never"
            self.set("checkpoint.resume", mode, path, "auto_continue_train")

    def _translate_weight_decay(self) -> None:
        names = ("start_weight_decay", "end_weight_decay")
        style = self.arguments.get("weight_decay_incr_style", "constant")
        path = (*self.base, "weight_decay_incr_style")
        missing = [name for name in names if name not in self.arguments]
        if style == "constant":
            for name in names:
                if name not in missing:
                    expected = "null with weight_decay_incr_style constant"
                    self.problem((*self.base, name), show(self.arguments[name]), expected)
            return
        if missing:
            self.problem(path, f"{show(style)} without {' and '.join(missing)}", "all three")
            return
        self.set("optim.weight_decay_growth", style, path, "weight_decay_incr_style")
        start, name = self.arguments["start_weight_decay"], "start_weight_decay"
        self.set("optim.weight_decay", start, (*self.base, name), name)
        if "weight_decay" in self.arguments:
            self.note("weight_decay: no effect beside start_weight_decay")

    def _translate_guard(self) -> None:
        sanitize, path = (
            as_flag(self.arguments.get("sft_sanitize_nan_grads")),
            (*self.base, "sft_sanitize_nan_grads"),
        )
        if sanitize in (None, False):
            return
        if sanitize is not True:
            self.problem(path, show(sanitize), "true or false")
            return
        steps = self.value("train_iters")
        if type(steps) is int and steps > 0:
            self.set("guard.max_skips", steps, path, "sft_sanitize_nan_grads")
        self.note(
            "sft_sanitize_nan_grads: a step whose gradients are not finite is left out as a whole"
        )

    def _check_off(self) -> None:
        for name, value in self.arguments.items():
            prefix = next((prefix for prefix in OFF if name.startswith(prefix)), None)
            exact = name in KNOWN and name not in OFF
            if prefix and not exact and value not in (False, 0):
                expected = f"null or false, because {OFF[prefix]}"
                self.problem((*self.base, name), show(value), expected, f"remove {name}")
