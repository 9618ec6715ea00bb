"""For every tier: a failed test shows the end of the logs of the networks that it ran."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from tests.harness import network


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Add the logs to the report while the network still lives."""
    report = yield
    if report.when in ("setup", "call") and report.failed:
        for one in network.LIVE:
            report.sections.append((f"logs of the network in {one.root}", one.logs()))
    return report
