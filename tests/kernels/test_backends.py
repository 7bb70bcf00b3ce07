"""The table of kernels: which module an operation gets, and what is said when one is missing."""

import importlib.util
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import get_args

import pytest

from sft_fast.kernels import backends
from sft_fast.kernels.backends import OPERATIONS, Operation, load_backend
from sft_fast.kernels.loss_options import LossBackend

TORCH = "sft_fast.kernels.masked_cross_entropy_torch"
MISSING = "sft_fast.kernels.no_such_module"


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    load_backend.cache_clear()
    yield
    load_backend.cache_clear()


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> str:
    """An operation beside the loss, two of whose modules are missing."""
    modules = {"fastest": MISSING, "triton": MISSING + "_2", "torch": TORCH}
    monkeypatch.setitem(backends.OPERATIONS, "second", Operation("model.second", modules))
    return "second"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_module_exists_and_torch_is_the_last_resort(operation: str) -> None:
    modules = OPERATIONS[operation].modules
    assert list(modules)[-1] == "torch"
    assert all(importlib.util.find_spec(module) for module in modules.values())
    assert load_backend(operation, "auto", "cpu").__name__ == modules["torch"]


def test_auto_gives_one_reason_for_each_operation_that_falls_back(
    second: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    modules = dict.fromkeys(OPERATIONS["masked_cross_entropy"].modules, MISSING) | {"torch": TORCH}
    broken = Operation("loss.backend", modules)
    monkeypatch.setitem(backends.OPERATIONS, "masked_cross_entropy", broken)
    with caplog.at_level(logging.WARNING):
        for operation in ("masked_cross_entropy", second):
            loaded = {load_backend(operation, "auto", "cuda").__name__ for _ in range(3)}
            assert loaded == {TORCH}
    first, other = (record.getMessage() for record in caplog.records)
    assert "loss.backend: auto falls back to torch for masked_cross_entropy" in first
    assert "model.second: auto falls back to torch for second" in other
    assert f"{MISSING}'" in other and f"{MISSING}_2" in other


def test_auto_stops_at_the_first_that_can_be_imported(
    second: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    modules = {"fastest": MISSING, "triton": TORCH, "torch": MISSING}
    monkeypatch.setitem(backends.OPERATIONS, second, Operation("model.second", modules))
    with caplog.at_level(logging.WARNING):
        assert load_backend(second, "auto", "cuda").__name__ == TORCH
    assert len(caplog.records) == 1
    monkeypatch.setitem(backends.OPERATIONS, second, Operation("model.second", {"torch": TORCH}))
    load_backend.cache_clear()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert load_backend(second, "auto", "cuda").__name__ == TORCH
    assert not caplog.records, "nothing was missing"


def test_a_named_backend_that_is_missing_is_an_error(second: str) -> None:
    with pytest.raises(ValueError, match="model.second: 'triton' cannot .*_2.*choose 'torch'"):
        load_backend(second, "triton", "cuda")
    with pytest.raises(ValueError, match="model.second: got 'hip', expected one of auto, fastest"):
        load_backend(second, "hip", "cpu")


def test_the_config_offers_what_the_table_holds() -> None:
    assert set(get_args(LossBackend)) == {"auto", *OPERATIONS["masked_cross_entropy"].modules}


def test_what_the_config_and_plan_import_needs_no_torch() -> None:
    code = (
        "import sft_fast.kernels.backends, sys; assert not {'torch', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
