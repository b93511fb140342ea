"""Steps: named things to do one after another within a budget of time, each in a process of its own.

A step that raises, crashes or hangs costs itself alone. Each is a function in a forked process, which costs no start-up
beyond what the parent has imported already; the parent must not have touched CUDA, whose contexts survive no fork. It
leads a process group, and whatever is left of the group when the step ends, or has to be stopped, is killed. What it
prints is shown, and what it `report`s is handed on, while it runs: nothing of that is lost with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPORTS = "FASTSCORE_STEP_REPORTS"  # names the file that a step's reports go to
POLL = 0.05  # seconds between two looks at a step
GRACE = 3.0  # seconds that an interrupted step has to say where it was, and a killed one to be gone
INTERRUPTED = "interrupted"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # what ends a job before its time
LAST_LINE = 300  # characters of the last line that an outcome quotes
MOST_OUTPUT = 16 << 20  # bytes that a step may print, or report: one that floods its output is stopped
TOLD = 70  # exit code of a part that has reported itself why it failed
SAFE_PATH = (
    ["-P"] if sys.version_info >= (3, 11) else []
)  # keeps the working directory off the path; 3.10 has no such flag
PYTHON = [sys.executable, *SAFE_PATH]


@dataclass(frozen=True)
class Step:
    """Something to do.

    Arguments:
        name: what `--only` calls it.
        run: a function without arguments. It fails if it raises, or exits with another code than 0.
        seconds: its time limit.
        least: with less time left, seconds, it is skipped.
        needed: whether the rest is skipped when it fails.
        why_not: a reason to skip it here, if there is one.
        sums_up: whether its last line says what was done, so that it belongs into the outcome of a step that passed.
        asked: whether it runs only where it is asked for by name.
    """

    name: str
    run: Callable[[], object]
    seconds: float
    least: float = 5.0
    needed: bool = False
    why_not: str = ""
    sums_up: bool = False
    asked: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "passed", "failed", "stopped" at its limit or "skipped", after how many seconds, and why."""

    name: str
    state: str
    seconds: float = 0.0
    why: str = ""


def report(**data: object) -> None:
    """Hand data from a step to whoever runs it, at once; without one, nothing happens."""
    path = os.environ.get(REPORTS)
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(data) + "\n")


def said(error: BaseException) -> str:
    """Return an exception's name with the first line of its message: CUDA's and Triton's go on for many."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:LAST_LINE]
    return f"{type(error).__name__}: {line}"


def program(*command: str, **environment: str) -> Callable[[], None]:
    """Return a step's function that becomes another program, with further environment variables."""
    return lambda: os.execvpe(command[0], command, os.environ | environment)


def parallel(parts: dict[str, Callable[[], object]], at_once: int) -> None:
    """Run the parts of one step in processes of their own, so many at once; exit with an error if one failed.

    They belong to the step's process group, and end with it.
    """
    waiting, running, failed = list(parts.items()), {}, []
    while waiting or running:
        if waiting and len(running) < at_once:
            name, run = waiting.pop(0)
            running[_fork(lambda part=name, run=run: _run_part(part, run))] = name
            continue
        pid, status = os.wait()
        name, code = running.pop(pid, None), os.waitstatus_to_exitcode(status)
        if name and code:
            failed.append(name)
            if code != TOLD:
                report(failure=name, why=_cause(code))
    if failed:
        sys.exit(f"{len(failed)} of {len(parts)} failed: " + ", ".join(failed))


def _run_part(name: str, run: Callable[[], object]) -> None:
    try:
        run()
    except Exception as error:
        report(failure=name, why=said(error))
        traceback.print_exc()
        sys.exit(TOLD)


def run(
    steps: list[Step], seconds: float, heard: Callable[[Step, dict], None], shown: Callable[[str], None]
) -> list[Outcome]:
    """Run steps in order within a budget.

    Arguments:
        seconds: of all steps together. Where less is left than a step's own limit, that is its limit.
        heard: called with every report of a step as it comes.
        shown: called with the text that steps print, as it comes.
    """
    end, outcomes, stop = time.monotonic() + seconds, [], ""
    for step in steps:
        left = end - time.monotonic()
        if stop or step.why_not:
            outcome = Outcome(step.name, "skipped", why=step.why_not or stop)
        elif left < step.least:
            why = f"{max(left, 0):.0f} s are left, it takes {step.least:g} or more"
            outcome = Outcome(step.name, "skipped", why=why)
        else:
            shown(f"\n== {step.name}\n")
            outcome = _Running(step, min(step.seconds, left), heard, shown).outcome()
            stop = f"{step.name} failed" if step.needed and outcome.state != "passed" else stop
            stop = INTERRUPTED if outcome.why == INTERRUPTED else stop
        outcomes.append(outcome)
        shown(line(outcome) + "\n" if not stop or outcome.state != "skipped" else "")
    return outcomes


def line(outcome: Outcome) -> str:
    """Return an outcome as a line of a table."""
    return f"{outcome.state:<8} {outcome.name:<31} {outcome.seconds:6.1f} s  {outcome.why}".rstrip()


class _Running:
    """A step while it runs."""

    def __init__(self, step: Step, limit: float, heard: Callable, shown: Callable):
        self.step, self.limit, self.heard, self.shown, self.end_of_output = step, limit, heard, shown, ""

    def outcome(self) -> Outcome:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            self.output, self.reports = (_Tail(Path(folder) / name) for name in ("output", "reports"))
            # Python drops what a handler raises within the functions that it calls after a fork: none comes there.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
            self.pid = self.group = _fork(self.step.run, lambda: _lead(self.output.path, self.reports.path, mask))
            with contextlib.suppress(OSError):  # it has done so itself, or is gone
                os.setpgid(self.group, self.group)
            try:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # raises what has come in the meantime
                code = self._wait(self.limit)
                state, why = ("passed" if code == 0 else "failed"), _cause(code)
                last = self._last_line() if code != 0 or self.step.sums_up else ""
                if code is None:
                    flooded = self.output.full or self.reports.full
                    late = f"not done after {self.limit:.3g} s"
                    state, why = "stopped", f"more than {MOST_OUTPUT >> 20} MB of output" if flooded else late
                    self._interrupt()
            except KeyboardInterrupt:
                state, why, last = "stopped", INTERRUPTED, ""
            finally:
                self._kill()
        return Outcome(self.step.name, state, time.monotonic() - start, ": ".join(part for part in (why, last) if part))

    def _wait(self, seconds: float) -> int | None:
        """Return the exit code, negative for a signal, or None if it is not there in time, or prints too much."""
        end = time.monotonic() + seconds
        while True:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self._follow()
            if ended:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end or self.output.full or self.reports.full:
                return None
            time.sleep(POLL)

    def _follow(self) -> None:
        """Pass on what is new."""
        for entry in self.reports.lines():
            try:
                told = json.loads(entry)
            except ValueError:  # of a process that was killed while it wrote
                self.shown(f"unreadable report: {entry[:LAST_LINE]}\n")
            else:
                self.heard(self.step, told)
        text = self.output.text()
        if text:
            self.shown(text)
            self.end_of_output = (self.end_of_output + text)[-LAST_LINE:]

    def _last_line(self) -> str:
        """Return the last line that says something: pytest's dots do not."""
        lines = [line.strip() for line in self.end_of_output.splitlines()]
        return next((line for line in reversed(lines) if any(map(str.isalnum, line))), "")

    def _interrupt(self) -> None:
        """Ask it as Ctrl-C does: Python says where it was, pytest sums up."""
        os.kill(self.pid, signal.SIGINT)
        self._wait(GRACE)

    def _kill(self) -> None:
        """Kill what is left of the process group. What even that does not end, the driver holds: it is left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)
        if self.pid:
            self._wait(GRACE)
        self._follow()


class _Tail:
    """A file that grows, read as far as it goes; of one that grows without end the first `MOST_OUTPUT` bytes."""

    def __init__(self, path: Path):
        self.path, self.read = path, 0
        path.touch()

    @property
    def full(self) -> bool:
        return self.path.stat().st_size > MOST_OUTPUT

    def text(self) -> str:
        """Return what is new."""
        found = self._rest()
        self.read += len(found)
        return found.decode(errors="replace")

    def lines(self) -> list[str]:
        """Return the whole lines among what is new; an unfinished one is for the next time."""
        found = self._rest().rpartition(b"\n")[0]
        self.read += len(found) + bool(found)
        return found.decode(errors="replace").splitlines()

    def _rest(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.read)
            return file.read(MOST_OUTPUT - self.read)  # to the end alone would have no end while a step keeps writing


def _fork(run: Callable[[], object], before: Callable[[], None] = lambda: None) -> int:
    """Run a function in a new process, after another that makes it ready; return its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        before()
        run()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException as error:
        traceback.print_exc()
        if len(str(error).strip().splitlines()) > 1:
            print(said(error), file=sys.stderr)  # the last line is the one that an outcome quotes
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # nothing that belongs to the parent is cleaned up here


def _lead(output: Path, reports: Path, mask: set[signal.Signals]) -> None:
    """Make this process the leader of a group of its own that prints and reports to files, and that Ctrl-C stops."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    writes = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(writes, 1)
    os.dup2(writes, 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ |= {REPORTS: str(reports), "PYTHONUNBUFFERED": "1"}


def _cause(code: int | None) -> str:
    """Return why a process with this exit code failed, or nothing for 0."""
    if not code:
        return ""
    if code > 0:
        return f"exit code {code}"
    named = -code in {known.value for known in signal.Signals}  # those of real time have no name
    return f"ended by {signal.Signals(-code).name if named else f'signal {-code}'}"
