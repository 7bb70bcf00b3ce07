"""The figures of a step as text."""

import math
from collections.abc import Mapping
from datetime import timedelta
from typing import Any


def line(figures: dict[str, Any]) -> str:
    """The figures of a step as text."""
    mfu = "" if figures["mfu"] is None else f"  mfu {figures['mfu']:.1%}"
    skipped = f"  {warning(figures)}" if figures["warning"] else ""
    return (
        f"loss {figures['loss']:.4f}  lr {figures['lr']:.2e}  grad_norm {figures['grad_norm']:.3f}"
        f"  tokens/s {figures['tokens_per_s']:,.0f} "
        f"(trained {figures['supervised_tokens_per_s']:,.0f}, "
        f"computed {figures['capacity_tokens_per_s']:,.0f})"
        f"  padding {figures['padding']:.1%}{mfu}  memory {figures['memory_gib']:.1f} GiB"
        f"  wait {figures['data_wait']:.1%}  eta {duration(figures['eta_s'])}{skipped}"
    )


def warning(figures: Mapping[str, Any]) -> str:
    """What is wrong with the step; empty: nothing."""
    if not figures["warning"]:
        return ""
    return f"{'SKIPPED' if figures['was_skipped'] else 'WARNING'}: {figures['warning']}"


def duration(seconds: float) -> str:
    """3725.2 -> "1:02:05"."""
    return str(timedelta(seconds=round(seconds)))


def finite(value: Any) -> Any:
    """The value, or None where it is a float that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
