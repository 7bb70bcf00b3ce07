"""What the section `router` and a model's config.json say of the balance of experts."""

from collections.abc import Iterator, Mapping
from typing import Any

from sft_fast.config.sections import LoraConfig, RouterConfig
from sft_fast.errors import ConfigError, Problem
from sft_fast.models.architecture import Architecture


def check_router(architecture: Architecture, router: RouterConfig, lora: LoraConfig) -> None:
    """Raises ConfigError with everything that `router_problems` yields."""
    if problems := list(router_problems(architecture, router, lora)):
        raise ConfigError(problems, "the router of this model")


def router_problems(
    architecture: Architecture, router: RouterConfig, lora: LoraConfig
) -> Iterator[Problem]:
    """Yields what the section `router` asks of a model that does not have it."""
    if not architecture.num_experts:
        for name, value in router.model_dump().items():
            if value > 0:
                key = f"router.{name}"
                yield Problem((key,), f"{value} for a model without experts", "0", f"{key}=0")
        return
    if router.bias_update_rate == 0:
        return
    found, off = str(router.bias_update_rate), "router.bias_update_rate=0"
    if not architecture.has_expert_bias:
        yield Problem(
            ("router.bias_update_rate",),
            f"{found} for a model whose experts have no bias",
            "0, or a loss that balances them",
            f"{off} router.aux_loss_coef=0.001",
        )
    if lora.rank > 0:
        yield Problem(
            ("router.bias_update_rate", "lora.rank"),
            f"{found} with LoRA, whose adapters could not be used with the model they came from",
            "0, as all that LoRA does not train",
            off,
        )


def router_note(hf_config: Mapping[str, Any], router: RouterConfig) -> str:
    """What transformers would train beside the loss of tokens and this run does not; "" = nothing.

    Args:
        hf_config: the config.json of the model.
        router: section of the configuration.
    """
    coefficient = aux_loss_coef(hf_config)
    if not hf_config.get("output_router_logits") or not coefficient or router.aux_loss_coef > 0:
        return ""
    return (
        "config.json says output_router_logits, with which transformers adds "
        f"{coefficient} times the load-balancing loss to that of tokens; here it is off: "
        f"router.aux_loss_coef={coefficient} turns it on"
    )


def aux_loss_coef(hf_config: Mapping[str, Any]) -> float | None:
    """The factor of the load-balancing loss in a config.json; None = it names none."""
    value: object = hf_config.get("router_aux_loss_coef")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)
