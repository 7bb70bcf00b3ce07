"""The YAML: its sections, what may not go together, where each value comes from, Primus files."""
