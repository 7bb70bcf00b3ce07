"""A plug-in of the evaluation tests."""

from sft_fast.registry import SampleOutputs, register_metric


@register_metric("whole_answer", greater_is_better=True)
def whole_answer(sample: SampleOutputs) -> tuple[float, float]:
    return float(sample.correct.all()), 1.0


@register_metric("first_entropy", greater_is_better=False)
def first_entropy(sample: SampleOutputs) -> tuple[float, float]:
    return float(sample.entropies[0] - sample.logprobs[-1]) + float(sample.labels[0]), 1.0
