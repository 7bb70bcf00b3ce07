"""The YAML: its sections, what may not go together, where each value comes from, Primus files."""

from sft_fast.config.schema import Config, inspect_config, load_config, save_config

__all__ = ["Config", "inspect_config", "load_config", "save_config"]
