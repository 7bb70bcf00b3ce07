from pathlib import Path

import pytest

from sft_fast.commands.status import lines
from sft_fast.runtime.run_files import RunFiles


@pytest.mark.parametrize(
    ("loss", "text"),
    [(0.0, "0.0000 at step 3"), (1.25, "1.2500 at step 3"), (None, "NaN at step 3")],
)
def test_a_loss_of_zero_is_a_number(loss: float | None, text: str) -> None:
    record = {"kind": "step", "step": 3, "loss": loss, "tokens_per_s": 1.0, "elapsed_s": 1.0}
    assert ("loss", text) in lines(RunFiles(Path("nowhere"), (record,), None, None))
