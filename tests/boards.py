"""Boards: rows that are promised, each with the outcome of the tests that are marked with its name.

`pytest tests/faults --board` prints faults and what is done about them, `pytest tests/needs --board` what people need
who come from other tools. A test names its rows by `@pytest.mark.fault("F01", ...)` and `@pytest.mark.need("A1", ...)`;
all tests of a row must pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest


class Board:
    """A pytest plugin that counts the tests marked `marker(*rows)`.

    Args:
        marker: name of the mark.
        rows: name of a row to its columns, which are printed.
        open: rows that nothing is promised about yet, and why.
    """

    def __init__(self, marker: str, rows: Mapping[str, tuple[str, ...]], open: Mapping[str, str] | None = None) -> None:
        self.marker, self.rows, self.open = marker, rows, dict(open or {})
        self.outcomes: dict[str, list[str]] = {}

    def pytest_configure(self, config: pytest.Config) -> None:
        config.addinivalue_line("markers", f"{self.marker}(*rows): rows of the board that a test proves")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers(self.marker):
                if unknown := set(mark.args) - set(self.rows):
                    names = ", ".join(sorted(unknown))
                    raise pytest.UsageError(f"{item.nodeid} is marked {self.marker} {names}: no row of that board")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo):
        report = yield
        if report.when == "call" or report.outcome != "passed":
            marks = item.iter_markers(self.marker)
            report.user_properties += [(self.marker, row) for mark in marks for row in mark.args]
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Also called for what another process of `pytest -n 2` ran."""
        for name, value in report.user_properties if report.when == "call" or report.outcome != "passed" else ():
            if name == self.marker:
                self.outcomes.setdefault(str(value), []).append(report.outcome)

    def result(self, row: str) -> str:
        """What came about: "right (3)" for three tests that passed, else "WRONG", "open" or "not run"."""
        outcomes = self.outcomes.get(row, [])
        if not outcomes:
            return self.open.get(row, "not run")
        if set(outcomes) == {"passed"}:
            return f"right ({len(outcomes)})"
        return f"WRONG ({', '.join(sorted(set(outcomes)))})"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        if not config.getoption("--board") or not self.outcomes:
            return
        widths = [max(map(len, column)) for column in zip(*self.rows.values(), strict=True)]
        terminalreporter.section(f"{self.marker} board")
        for row, columns in self.rows.items():
            cells = [column.ljust(width) for column, width in zip(columns, widths, strict=True)]
            terminalreporter.write_line(" | ".join([f"{row:4}", *cells, self.result(row)]))
        right = sum(self.result(row).startswith("right") for row in self.rows)
        terminalreporter.write_line(f"{right} of {len(self.rows)} right")
