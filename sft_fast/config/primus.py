"""Primus experiment files (a top-level key `modules`) translated into our keys."""

import logging
import os
import re
from typing import Any

from sft_fast.config.primus_arguments import (
    ARCHITECTURE,
    COMBINED,
    DEFAULTS,
    DETAILS,
    FIXED,
    IGNORED,
    OFF,
    SIZES,
    TARGETS,
    Fixed,
    Target,
    as_flag,
)
from sft_fast.config.validation import Tree, ValueOrigin
from sft_fast.config.yaml_source import Document, KeyPath, dotted, parse_value
from sft_fast.errors import ConfigError, Problem, nearest, show
from sft_fast.redact import is_secret_name

logger = logging.getLogger(__name__)

MODULE_FILE = "sft_trainer.yaml"
TOP_KEYS = ("exp_name", "modules", "user_name", "work_group", "workspace")
MODULE_KEYS = ("config", "framework", "model", "overrides")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::([^{}]*))?\}")


def translate(document: Document) -> Tree:
    """Returns a Primus experiment file as a tree of our keys.

    What is wrong goes into the tree's problems, under the names that the file uses.

    Raises:
        ConfigError: `modules` does not hold exactly one module.
    """
    return _Translation(document).run()


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
        logger.warning("no evaluation: name its data with data.eval=<file or hub id>")


class _Translation:
    """One file on its way into a tree."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.tree = Tree(document.name, problems=list(document.problems))
        self.base: KeyPath = ()
        self.arguments: dict[str, Any] = {}
        self.defaults = dict(DEFAULTS)

    def run(self) -> Tree:
        self.document.data = self._expand(self.document.data, ())
        self._read_top()
        module = self._only_module()
        if module is None:
            raise ConfigError(self.tree.problems, self.document.name)
        self._read_module(module)
        self._translate_arguments()
        return self.tree

    def _problem(self, path: KeyPath, found: str, expected: str, fix: str = "") -> None:
        where = self.document.where(path)
        self.tree.problems.append(Problem((dotted(path),), found, expected, fix, where))

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
            self._problem(path, f"${{{name}}}", "no secrets in a configuration, it is saved")
            return ""
        value = os.environ.get(name, default)
        if value is None:
            fix = f"export {name}=..., or write ${{{name}:default}}"
            self._problem(path, f"${{{name}}}, which is not set", "a variable that is set", fix)
            return ""
        return value

    def _read_top(self) -> None:
        top = self.document.data
        for key in top:
            if key == "extends":
                self._problem((key,), "extends", "one file", "copy the other file's keys into it")
            elif key not in TOP_KEYS:
                near = nearest(key, TOP_KEYS)
                fix = f"did you mean {near}?" if near else "arguments belong into overrides"
                expected = f"one of {', '.join(TOP_KEYS)} in a Primus experiment file"
                self._problem((key,), "an unknown key", expected, fix)
        names = ("workspace", "work_group", "user_name", "exp_name")
        parts = [str(top[name]) for name in names if top.get(name) not in (None, "")]
        if parts:
            key = next(name for name in reversed(names) if name in top)
            self._set("output_dir", os.path.normpath(os.path.join(*parts)), (key,), key)

    def _only_module(self) -> dict[str, Any] | None:
        modules = self.document.data["modules"]
        if not isinstance(modules, dict) or len(modules) != 1:
            found = f"modules {', '.join(modules)}" if isinstance(modules, dict) else show(modules)
            self._problem(("modules",), found, "exactly one module, for example post_trainer")
            return None
        name, module = next(iter(modules.items()))
        self.base = ("modules", name)
        if not isinstance(module, dict):
            self._problem(self.base, show(module), f"keys {', '.join(MODULE_KEYS)}")
            return None
        return module

    def _read_module(self, module: dict[str, Any]) -> None:
        for key in module:
            if key not in MODULE_KEYS:
                near = nearest(key, MODULE_KEYS)
                fix = f"did you mean {near}?" if near else "arguments belong into overrides"
                self._problem((*self.base, key), "an unknown key", ", ".join(MODULE_KEYS), fix)
        config = module.get("config", MODULE_FILE)
        if not isinstance(config, str) or os.path.basename(config) != MODULE_FILE:
            fix = "other module files are not read: write their keys into overrides"
            self._problem((*self.base, "config"), show(config), MODULE_FILE, fix)
        if module.get("framework") is None:
            self._problem((*self.base, "framework"), "nothing", "a framework, e.g. megatron")
        else:
            self._set("backend", module["framework"], (*self.base, "framework"), "framework")
        overrides = module.get("overrides") or {}
        if isinstance(overrides, dict):
            self.arguments = {key: value for key, value in overrides.items() if value is not None}
            # null takes an argument's default away, as it does in Primus.
            self.defaults = {k: v for k, v in self.defaults.items() if k not in overrides}
            self._check_names(overrides)
        else:
            self._problem((*self.base, "overrides"), show(overrides), "a mapping of arguments")
        self.base = (*self.base, "overrides")

    def _check_names(self, overrides: dict[str, Any]) -> None:
        known = {*TARGETS, *SIZES, *DETAILS, *ARCHITECTURE, *FIXED, *OFF, *IGNORED, *COMBINED}
        for name in overrides:
            path = (*self.base, "overrides", name)
            if name in known or any(name.startswith(prefix) for prefix in OFF):
                continue
            if is_secret_name(name):
                self._problem(path, "a key that looks like a secret", "no secrets in a file")
                continue
            near = nearest(name, known)
            found = f"an unknown argument with {show(overrides[name])}"
            fix = f"did you mean {near}?" if near else f"remove {name}"
            self._problem(
                path, found, "an argument that sft_fast/config/primus_arguments.py names", fix
            )

    def _translate_arguments(self) -> None:
        for name, target in TARGETS.items():
            if name in self.arguments or name in self.defaults:
                self._set_argument(name, target)
        self._set("stage", self.arguments.get("stage", "sft"), (*self.base, "stage"), "stage")
        self._translate_dtype()
        self._translate_shape()
        self._translate_packing()
        self._translate_sequence_parallel()
        self._translate_evaluation()
        self._translate_resume()
        self._check_fixed(FIXED)
        self._check_off()
        ignored = sorted(IGNORED & self.arguments.keys())
        if ignored:
            logger.info("no effect on the result, not used: %s", ", ".join(ignored))

    def _value(self, name: str) -> Any:
        return self.arguments.get(name, self.defaults.get(name))

    def _set(self, key: str, value: Any, path: KeyPath, name: str) -> None:
        self.tree.set(tuple(key.split(".")), value, ValueOrigin(self.document.where(path), name))

    def _set_argument(self, name: str, target: Target) -> None:
        where = self.document.where((*self.base, name))
        if name not in self.arguments:
            where = f"{self.document.where(self.base)} (default of {MODULE_FILE})"
        value = target.convert(self._value(name))
        self.tree.set(tuple(target.key.split(".")), value, ValueOrigin(where, name))

    def _translate_dtype(self) -> None:
        fp16, bf16 = (as_flag(self._value(name)) for name in ("fp16", "bf16"))
        for name, value in (("fp16", fp16), ("bf16", bf16)):
            if value is not None and not isinstance(value, bool):
                self._problem((*self.base, name), show(value), "true or false")
        if fp16 and self.arguments.get("bf16"):
            self._problem((*self.base, "fp16"), "fp16 and bf16", "one of the two")
        name = "fp16" if fp16 else "bf16"
        self._set("model.dtype", name if fp16 or bf16 else "fp32", (*self.base, name), name)

    def _translate_shape(self) -> None:
        sizes = [name for name in SIZES if name in self.arguments]
        others = [name for name in (*DETAILS, *ARCHITECTURE) if name in self.arguments]
        if "hf_path" in self.arguments:
            for name in sizes:
                found = f"{show(self.arguments[name])} together with hf_path"
                expected = "one of them: the architecture of hf_path is in its config.json"
                self._problem((*self.base, name), found, expected, f"remove {name}")
            if others:
                text = "the architecture is that of hf_path's config.json, not used: %s"
                logger.warning(text, ", ".join(others))
            return
        self._check_fixed(ARCHITECTURE)
        if not sizes:
            # The "neither path nor shape" error then points at the preset, which is not read.
            origin = ValueOrigin(self.document.where((*self.base[:2], "model")), "hf_path")
            self.tree.origins[("model", "path")] = origin
            return
        for name, target in {**SIZES, **DETAILS}.items():
            if name in self.arguments:
                self._set_argument(name, target)
            else:
                origin = ValueOrigin(self.document.where(self.base), name)
                self.tree.origins[tuple(target.key.split("."))] = origin
        heads, groups = (self.arguments.get(n) for n in ("num_attention_heads", "num_query_groups"))
        grouped = as_flag(self._value("group_query_attention"))
        if grouped is False and groups not in (None, heads):
            path = (*self.base, "num_query_groups")
            self._problem(path, f"{show(groups)} with group_query_attention false", show(heads))
        if heads is not None and groups is None and not grouped:
            target = SIZES["num_query_groups"]
            self._set(target.key, heads, (*self.base, "num_attention_heads"), "num_attention_heads")

    def _translate_packing(self) -> None:
        if as_flag(self._value("enable_packed_sequences")) is True:
            reason = "samples of a pack never see each other here"
            self._check_fixed({"use_packed_attention": Fixed((True,), reason)})

    def _translate_sequence_parallel(self) -> None:
        # Megatron turns it off on its own where there is no tensor parallelism.
        if self._value("tensor_model_parallel_size") in (None, 1):
            self.tree.remove("parallel", "sequence")
            if as_flag(self._value("sequence_parallel")) is True:
                logger.warning("sequence_parallel is off: tensor_model_parallel_size is 1")

    def _translate_evaluation(self) -> None:
        batches, rows = self._value("eval_iters"), self._value("global_batch_size")
        path = (*self.base, "eval_iters")
        if batches == 0:
            self.tree.remove("evaluation", "every_steps")
        elif batches is not None:
            is_count = type(batches) is int and type(rows) is int
            samples = batches * rows if is_count else batches
            self._set("evaluation.max_samples", samples, path, "eval_iters")

    def _translate_resume(self) -> None:
        load, path = self.arguments.get("load"), (*self.base, "load")
        if load is not None and self.arguments.get("finetune", True):
            expected = "finetune: false to resume a run of this trainer, or hf_path for weights"
            self._problem(path, f"{show(load)} with finetune true", expected)
        elif load is not None:
            self._set("checkpoint.resume", load, path, "load")
        elif "auto_continue_train" in self.arguments:
            path = (*self.base, "auto_continue_train")
            mode = "auto" if as_flag(self._value("auto_continue_train")) is True else "never"
            self._set("checkpoint.resume", mode, path, "auto_continue_train")

    def _check_fixed(self, table: dict[str, Fixed]) -> None:
        for name, fixed in table.items():
            value = self.arguments.get(name)
            if value is not None and value not in fixed.values:
                allowed = " or ".join(show(item) for item in fixed.values) or "null"
                found, path = show(value), (*self.base, name)
                self._problem(path, found, f"{allowed}, because {fixed.reason}", f"remove {name}")

    def _check_off(self) -> None:
        for name, value in self.arguments.items():
            prefix = next((prefix for prefix in OFF if name.startswith(prefix)), None)
            if prefix and name not in (*TARGETS, *SIZES) and value not in (False, 0):
                expected = f"null or false, because {OFF[prefix]}"
                self._problem((*self.base, name), show(value), expected, f"remove {name}")
        lora = self.arguments.get("lora")
        enabled = lora.get("enabled", False) if isinstance(lora, dict) else lora
        if enabled is not None and enabled is not False:
            expected = (
                "false, because all weights are trained; Primus' adapters of fused matrices are "
                "not ours, which are PEFT's: lora.rank=32 on the command line"
            )
            path = (*self.base, "lora", *(("enabled",) if isinstance(lora, dict) else ()))
            self._problem(path, show(enabled), expected, "lora.enabled: false")
