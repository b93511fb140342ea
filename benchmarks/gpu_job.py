"""The command line of `make gpu-check` and `make gpu-bench`: their options, the tables they write, and the summary."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import record
import steps
from markdown import markdown
from steps import Outcome, Step, report

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 265.0  # for the steps of one command; with the installation and the imports under five minutes
REHEARSED = 4.0  # so many times as long a rehearsal may take: Triton's interpreter, and a CPU that others use


class Found:
    """What the steps of a job reported: tables, written whenever a number comes, and the tests that failed."""

    def __init__(self, folder: Path):
        self.folder, self.environment = folder, {}
        self.tables: dict[str, dict[str, dict]] = {}
        self.failed: dict[str, dict[str, object]] = {}
        self.failures: dict[str, list[str]] = {}
        self.latest: dict[tuple[str, str], str] = {}  # of a step in a table: the name of its latest row

    def hear(self, step: Step, told: dict) -> None:
        """Take in one report of a step."""
        if "environment" in told:
            self.environment = told["environment"]
        elif "failure" in told:
            self.failures.setdefault(step.name, []).append(f"{told['failure']}: {told['why']}")
        else:
            table, part = told["table"], told.get("part")
            name = f"{step.name}, {part}" if part else step.name
            if table not in self.tables:
                self.tables[table], self.failed[table] = record.read_steps(self.folder, table, self.environment)
            self.tables[table][name] = told["row"]
            self.failed[table].pop(name, None)
            if told["failed"]:
                self.failed[table][name] = told["failed"]
            self.latest[step.name, table] = name
            self.write(table)

    def settle(self, outcomes: list[Outcome]) -> None:
        """Keep of the rows that a step did not finish why it did not."""
        ended = {outcome.name: outcome for outcome in outcomes}
        for (step, table), name in self.latest.items():
            failed = self.failed.setdefault(table, {})
            told = any(row == step or row.startswith(f"{step}, ") for row in failed)
            if ended[step].state == "stopped" or (ended[step].state == "failed" and not told):
                failed.setdefault(name, {"step": ended[step].why})
                self.write(table)

    def write(self, table: str) -> None:
        rows, failed = self.tables[table], self.failed.get(table)
        more = {"steps": list(rows)} | ({"failed": failed} if failed else {})
        record.write(self.folder, table, self.environment, list(rows.values()), **more)


def describe() -> None:
    """The first step: tell what the numbers were measured on; exit with an error without a GPU."""
    import torch

    rehearsing = os.environ.get("FASTSCORE_REHEARSE") == "1"
    if not rehearsing and not torch.cuda.is_available():
        sys.exit("no CUDA device: see --rehearse")
    found = record.environment() | ({"rehearsed": True} if rehearsing else {})
    report(environment=found)
    print(", ".join(f"{key} {value}" for key, value in found.items() if key != "versions"))
    print(", ".join(f"{package} {version}" for package, version in found["versions"].items()))


def main(what: str, page: str, make_steps: Callable[[], list[Step]]) -> int:
    """Run a job; return its exit code: 1 if a step failed or had to be stopped, else 0.

    Arguments:
        what: name of the table of outcomes, and of the log.
        page: what the command does; its first line is shown with the options.
        make_steps: returns the steps after the first; called when the environment is set.
    """
    parser = argparse.ArgumentParser(description=page.splitlines()[0])
    parser.add_argument("--only", metavar="NAMES", help="steps to run, by the beginnings of their names: a,b,...")
    parser.add_argument("--seconds", type=float, help=f"for all steps together (default: {SECONDS:g})")
    parser.add_argument("--rehearse", action="store_true", help="run every line on a CPU; no number counts")
    parser.add_argument("--out", type=_folder, help="folder of tables and log (default: benchmarks/results, build)")
    options = parser.parse_args()
    _prepare(options.rehearse)
    build = ROOT / "build" / ("rehearsal" if options.rehearse else what)
    folder, logs = options.out or (build if options.rehearse else record.RESULTS), options.out or build
    slower = REHEARSED if options.rehearse else 1.0
    chosen = [Step("machine", describe, 60, least=0, needed=True), *_choose(make_steps(), options.only, parser)]
    chosen = [replace(step, seconds=slower * step.seconds) for step in chosen]
    seconds = slower * SECONDS if options.seconds is None else options.seconds
    found = Found(folder)
    logs.mkdir(parents=True, exist_ok=True)
    tracebacks = logs / f"{what}-tracebacks.txt"
    tracebacks.unlink(missing_ok=True)
    os.environ["FASTSCORE_TRACEBACKS"] = str(tracebacks.resolve())
    with open(logs / f"{what}.log", "w") as log:

        def show(text: str) -> None:
            log.write(text)
            log.flush()
            with contextlib.suppress(OSError):  # whoever read it is gone
                sys.stdout.write(text)
                sys.stdout.flush()

        outcomes = steps.run(chosen, seconds, found.hear, show)
        found.settle(outcomes)
        show(_summary(outcomes, found, logs))
    if found.environment:
        _record(what, outcomes, found)
    return int(any(outcome.state in ("failed", "stopped") for outcome in outcomes))


def _folder(path: str) -> Path:
    return Path(path).resolve()


def _prepare(rehearse: bool) -> None:
    """Set what steps inherit, before any of them imports torch or Triton."""
    places = [str(ROOT / "benchmarks"), str(ROOT / "tests")]
    sys.path[:0] = places
    os.environ["PYTHONPATH"] = os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["TRITON_INTERPRET"] = "1" if rehearse else "0"
    # Steps compile in parallel themselves; a pool of processes for each would cost more than it saves.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if rehearse:
        os.environ |= {"FASTSCORE_REHEARSE": "1", "CUDA_VISIBLE_DEVICES": ""}
        import fastscore  # noqa: F401  once for all steps, which is safe where no import can touch a GPU before a fork
    for number in (signal.SIGTERM, signal.SIGHUP):  # whoever ends the job, or hangs up, still gets its summary
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    os.chdir(ROOT)


def _choose(every: list[Step], only: str | None, parser: argparse.ArgumentParser) -> list[Step]:
    if only is None:
        return [step for step in every if not step.asked]
    beginnings = [name.strip() for name in only.split(",")]
    unknown = [name for name in beginnings if not (name and any(step.name.startswith(name) for step in every))]
    if unknown:
        parser.error(f"no step begins with {unknown[0]!r}; there are: {', '.join(step.name for step in every)}")
    return [replace(step, needed=False) for step in every if step.name.startswith(tuple(beginnings))]


def _summary(outcomes: list[Outcome], found: Found, logs: Path) -> str:
    """Return tables, then every step with the failures that it reported, then one line that counts them."""
    lines = [""]
    for name, rows in found.tables.items():
        lines += [f"== {name}", markdown(list(rows.values())), ""]
    lines += ["== summary"]
    for outcome in outcomes:
        lines += [steps.line(outcome), *(f"    {failure}" for failure in found.failures.get(outcome.name, ()))]
    counts = {state: sum(o.state == state for o in outcomes) for state in ("passed", "failed", "stopped", "skipped")}
    counted = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return "\n".join([*lines, f"{len(outcomes)} steps: {counted}; log and tracebacks in {logs}", ""])


def _record(what: str, outcomes: list[Outcome], found: Found) -> None:
    """Write how every step ended."""
    rows = [{"step": o.name, "state": o.state, "s": round(o.seconds, 1), "why": o.why} for o in outcomes]
    record.write(found.folder, what, found.environment, rows, failures=found.failures)
