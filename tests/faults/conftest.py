from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from faults.launcher import Launcher
from faults.scorecard import FAULTS

OUTCOMES: dict[str, list[str]] = defaultdict(list)


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("faults"))
    yield launcher
    launcher.close()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = (yield).get_result()  # type: ignore[attr-defined]
    if report.when == "call" or report.outcome != "passed":
        for mark in item.iter_markers("fault"):
            OUTCOMES[mark.args[0]].append(report.outcome)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not OUTCOMES:
        return
    terminalreporter.section("faults")
    for fault, (done, outcome) in FAULTS.items():
        results = OUTCOMES.get(fault, [])
        passed = results.count("passed")
        if results:
            terminalreporter.line(f"{fault:4} {passed}/{len(results)}  {done}: {outcome}")
