"""Benchmarks share one thing: tables, printed at the end and written to benchmarks/results with what they ran on."""

import pytest
import record
import torch
from markdown import markdown

TABLES = {}


@pytest.fixture(scope="session")
def table():
    """Return a function that adds one row (a dict) to a named table."""
    return lambda name, row: TABLES.setdefault(name, []).append(row)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter):
    for name, rows in TABLES.items():
        terminalreporter.section(name)
        terminalreporter.write_line(markdown(rows))


def pytest_sessionfinish(session, exitstatus):
    if exitstatus != 0:
        return  # a failed benchmark leaves the last good numbers alone
    for name, rows in TABLES.items():
        path = record.write(record.RESULTS, name, record.environment(), rows)
        path.with_suffix(".md").write_text(markdown(rows) + "\n")
