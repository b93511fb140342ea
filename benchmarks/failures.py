"""A plugin of pytest that says at once how every failed test begins to complain, and at Ctrl-C which ones were running.

    python -m pytest -p failures --tb=no ...

Lines go to the terminal, to whoever runs this as a step (`steps.report`), and whole tracebacks to the file that the
environment variable FASTSCORE_TRACEBACKS names.
"""

from __future__ import annotations

import os

import pytest
import steps

TRACEBACKS = "FASTSCORE_TRACEBACKS"
RUNNING: list[str] = []
CONFIG: list[pytest.Config] = []


def pytest_configure(config: pytest.Config) -> None:
    CONFIG[:] = [config]


def pytest_runtest_logstart(nodeid: str) -> None:
    RUNNING.append(nodeid)


def pytest_runtest_logfinish(nodeid: str) -> None:
    if nodeid in RUNNING:
        RUNNING.remove(nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _tell(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _tell(report)


def pytest_keyboard_interrupt() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        for nodeid in RUNNING:
            _say(nodeid, "still running when it was stopped")


def _tell(found: pytest.TestReport | pytest.CollectReport) -> None:
    if not found.failed or "PYTEST_XDIST_WORKER" in os.environ:  # the workers' reports come to the main process
        return
    pytest_runtest_logfinish(found.nodeid)  # which does not come for a test that took its process with it
    crash = getattr(found.longrepr, "reprcrash", None)
    lines = (crash.message if crash else found.longreprtext).splitlines()
    # xdist begins the report of a process that crashed with its name.
    _say(found.nodeid, next((line.strip() for line in lines if line.strip() and line[:3] != "[gw"), "no message"))
    if os.environ.get(TRACEBACKS):
        with open(os.environ[TRACEBACKS], "a") as file:
            file.write(f"{found.nodeid}\n{found.longreprtext}\n\n")


def _say(nodeid: str, why: str) -> None:
    terminal = CONFIG[0].pluginmanager.get_plugin("terminalreporter")
    terminal.write(f"\nFAILED {nodeid}: {why[:300]}\n")
    steps.report(failure=nodeid, why=why[:300])
