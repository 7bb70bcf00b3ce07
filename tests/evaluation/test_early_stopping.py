import math

import pytest

from sft_fast.evaluation.early_stopping import EarlyStopping


def after_all(values, greater_is_better=False, min_delta=0.0):
    early_stopping = EarlyStopping()
    for number, value in enumerate(values, start=1):
        early_stopping = early_stopping.after(10 * number, value, greater_is_better, min_delta)
    return early_stopping


@pytest.mark.parametrize(
    "values, greater_is_better, min_delta, best_step, num_since_best",
    [
        ([3.0, 2.0, 1.0], False, 0.0, 30, 0),
        ([1.0, 2.0, 3.0], False, 0.0, 10, 2),
        ([1.0, 2.0, 3.0], True, 0.0, 30, 0),
        ([2.0, 2.0, 2.0], False, 0.0, 10, 2),
        # Small steps are no improvement, until they add up to one.
        ([4.0, 3.5, 3.0, 2.5], False, 0.75, 30, 1),
        ([4.0, 3.75, 3.25], False, 0.75, 10, 2),
        ([math.nan, math.nan, 5.0], False, 0.0, 30, 0),
        ([5.0, math.nan, math.nan], False, 0.0, 10, 2),
        ([math.inf, 5.0], False, 0.0, 20, 0),
    ],
)
def test_best_and_evaluations_since(
    values, greater_is_better, min_delta, best_step, num_since_best
):
    early_stopping = after_all(values, greater_is_better, min_delta)
    assert early_stopping.last_step == 10 * len(values)
    assert (early_stopping.best_step, early_stopping.num_since_best) == (best_step, num_since_best)
    assert early_stopping.best == values[best_step // 10 - 1]


def test_nothing_but_nan_has_no_best():
    early_stopping = after_all([math.nan] * 3)
    assert (early_stopping.best, early_stopping.best_step, early_stopping.num_since_best) == (
        None,
        0,
        3,
    )
    assert (
        early_stopping.should_stop(3)
        and not early_stopping.should_stop(4)
        and not early_stopping.should_stop(None)
    )
