"""Steps of a job: whatever one does, the others run, what it told is kept, and nothing of it is left running."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
PROLOGUE = """
import json, os, signal, subprocess, sys, time
import steps
from steps import Step, parallel, program, report

def stay():
    time.sleep(600)

def leave_children():
    # One child of the same program and one of another; neither heeds Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for start in (os.fork, lambda: subprocess.Popen(["sleep", "600"]).pid):
        pid = start()
        if pid == 0:
            stay()
        with open("children", "a") as file:
            print(pid, file=file)

def illegal():
    raise RuntimeError("CUDA error: an illegal memory access\\nCompile with TORCH_USE_CUDA_DSA")

def hang():
    leave_children()
    report(number=7)
    print("a word before the end", flush=True)
    stay()
"""
EPILOGUE = """
heard = []
outcomes = steps.run(found, SECONDS, lambda step, told: heard.append([step.name, told]), sys.stdout.write)
print("RESULT" + json.dumps({"outcomes": [vars(outcome) for outcome in outcomes], "heard": heard}))
"""


def script(listed, seconds=60):
    return f"{PROLOGUE}\nfound = [{listed}]\n" + EPILOGUE.replace("SECONDS", str(seconds))


def run(tmp_path, listed, seconds=60, sigint=signal.SIG_DFL):
    """Run steps in a program of their own; return the outcomes by name, what was heard, and what was shown."""
    done = subprocess.run(
        [sys.executable, "-c", script(listed, seconds)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS)},
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, sigint),
    )
    assert done.returncode == 0, done.stderr
    shown, _, result = done.stdout.partition("RESULT")
    found = json.loads(result)
    return {outcome["name"]: outcome for outcome in found["outcomes"]}, found["heard"], shown


def ended(tmp_path):
    """Return whether the children that a step left are gone, or are zombies that nobody waits for."""
    pids = (tmp_path / "children").read_text().split()
    assert len(pids) == 2
    states = [Path(f"/proc/{pid}/stat") for pid in pids]
    return all(not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z" for stat in states)


def test_a_step_that_fails_crashes_or_hangs_costs_itself_alone(tmp_path):
    outcomes, heard, shown = run(
        tmp_path,
        """
        Step("raises", lambda: 1 / 0, 20),
        Step("exits", lambda: sys.exit("it says why"), 20),
        Step("crashes", lambda: os.kill(os.getpid(), signal.SIGSEGV), 20),
        Step("hangs", hang, 1),
        Step("other program", program("sh", "-c", "echo $A", A="B"), 20, sums_up=True),
        Step("passes", lambda: report(number=8), 20),
        """,
    )
    states = {name: (outcome["state"], outcome["why"]) for name, outcome in outcomes.items()}
    assert states == {
        "raises": ("failed", "exit code 1: ZeroDivisionError: division by zero"),
        "exits": ("failed", "exit code 1: it says why"),
        "crashes": ("failed", "ended by SIGSEGV"),
        "hangs": ("stopped", "not done after 1 s: a word before the end"),
        "other program": ("passed", "B"),
        "passes": ("passed", ""),
    }
    assert heard == [["hangs", {"number": 7}], ["passes", {"number": 8}]]
    assert "in <lambda>" not in shown.partition("== exits")[2]
    assert ended(tmp_path)
    # Its second, and three that an interrupted step has, which this one ignores.
    assert 1 <= outcomes["hangs"]["seconds"] < 10


def test_a_step_that_floods_its_output_costs_itself_alone(tmp_path):
    outcomes, heard, shown = run(
        tmp_path,
        """
        Step("prints", program("yes", "no end"), 50),
        Step("reports", lambda: [report(number=1, text="x" * 10**6) for _ in iter(int, 1)], 50),
        Step("passes", lambda: report(number=8), 20),
        """,
        seconds=100,
    )
    for name in ("prints", "reports"):
        assert outcomes[name]["state"] == "stopped"
        assert outcomes[name]["why"].startswith("more than 16 MB of output")
        assert outcomes[name]["seconds"] < 30
    assert len(shown) < 18 << 20
    assert heard[-1] == ["passes", {"number": 8}]


def test_whatever_a_step_leaves_behind_the_next_one_runs(tmp_path):
    outcomes, heard, shown = run(
        tmp_path,
        """
        Step("real time", lambda: os.kill(os.getpid(), 40), 20),
        Step("half a report", lambda: open(os.environ[steps.REPORTS], "a").write('{"nu\\n'), 20),
        Step("passes", lambda: report(number=8), 20),
        """,
    )
    assert outcomes["real time"]["why"] == "ended by signal 40"
    assert outcomes["half a report"]["state"] == outcomes["passes"]["state"] == "passed"
    assert "unreadable report: {" in shown
    assert heard == [["passes", {"number": 8}]]


def test_of_a_long_message_the_first_line_counts(tmp_path):
    outcomes, heard, _ = run(
        tmp_path, 'Step("alone", illegal, 20), Step("parts", lambda: parallel({"a": illegal}, at_once=1), 20)'
    )
    first = "RuntimeError: CUDA error: an illegal memory access"
    assert outcomes["alone"]["why"] == f"exit code 1: {first}"
    assert heard == [["parts", {"failure": "a", "why": first}]]


@pytest.mark.parametrize("sigint", [signal.SIG_DFL, signal.SIG_IGN], ids=["foreground", "background"])
def test_a_step_that_hangs_says_where(tmp_path, sigint):
    # A shell's background job ignores Ctrl-C, which is how a step is asked to end.
    outcomes, _, shown = run(tmp_path, 'Step("hangs", stay, 0.5)', sigint=sigint)
    assert outcomes["hangs"]["state"] == "stopped"
    assert ", in stay\n" in shown
    assert shown.splitlines()[-2].startswith("KeyboardInterrupt")


def test_what_a_step_leaves_running_ends_with_it(tmp_path):
    outcomes, _, _ = run(tmp_path, 'Step("passes", leave_children, 20)')
    assert outcomes["passes"]["state"] == "passed"
    assert ended(tmp_path)


def test_the_budget_bounds_all_steps_together(tmp_path):
    start = time.monotonic()
    outcomes, _, shown = run(
        tmp_path,
        """
        Step("long", stay, 100, least=0.5),
        Step("needs more", stay, 100, least=50),
        Step("elsewhere", stay, 100, why_not="there is no such machine"),
        """,
        seconds=2,
    )
    assert time.monotonic() - start < 30
    assert outcomes["long"]["why"].startswith("not done after 2 s")
    assert outcomes["needs more"] | {"why": ""} == {"name": "needs more", "state": "skipped", "seconds": 0, "why": ""}
    assert outcomes["needs more"]["why"] == "0 s are left, it takes 50 or more"
    assert outcomes["elsewhere"]["why"] == "there is no such machine"
    assert "skipped  needs more" in shown


def test_nothing_goes_on_without_what_is_needed(tmp_path):
    outcomes, _, _ = run(tmp_path, 'Step("machine", lambda: sys.exit("none"), 9, needed=True), Step("work", stay, 9)')
    assert (outcomes["work"]["state"], outcomes["work"]["why"]) == ("skipped", "machine failed")


def test_parts_in_parallel_are_reported_each(tmp_path):
    outcomes, heard, _ = run(
        tmp_path,
        """
        Step("parts", lambda: parallel({"good": lambda: report(good=1), "bad": lambda: 1 / 0,
             "worse": lambda: os.kill(os.getpid(), signal.SIGKILL)}, at_once=2), 20),
        Step("all good", lambda: parallel({str(i): lambda: time.sleep(0.5) for i in range(4)}, at_once=4), 20),
        """,
    )
    assert outcomes["parts"]["state"] == "failed"
    assert outcomes["parts"]["why"] in {f"exit code 1: 2 of 3 failed: {both}" for both in ("bad, worse", "worse, bad")}
    told = [report for _, report in heard]
    assert {"good": 1} in told
    assert {"failure": "bad", "why": "ZeroDivisionError: division by zero"} in told
    assert {"failure": "worse", "why": "ended by SIGKILL"} in told
    assert outcomes["all good"]["state"] == "passed"


def test_a_job_that_is_ended_still_sums_up_and_leaves_nothing(tmp_path):
    text = script('Step("hangs", hang, 100), Step("later", stay, 100)')
    text = "import signal; signal.signal(signal.SIGTERM, signal.default_int_handler)\n" + text
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", text],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS)},
    )
    while "a word before the end" not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    result, _ = process.communicate(timeout=60)
    outcomes = json.loads(result.partition("RESULT")[2])["outcomes"]
    assert [(o["state"], o["why"]) for o in outcomes] == [("stopped", "interrupted"), ("skipped", "interrupted")]
    assert ended(tmp_path)


def test_a_run_of_some_steps_adds_to_the_table_of_all(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_job
    from steps import Step

    machine = {"date": "2026-01-01", "device": "NVIDIA H200", "versions": {"torch": "2.11"}}

    def run(machine, **numbers):
        found = gpu_job.Found(tmp_path)
        found.hear(Step("machine", print, 1), {"environment": machine})
        for step, number in numbers.items():
            failed = {} if number else {"ms": "out of memory"}
            found.hear(Step(step, print, 1), {"table": "kernels", "row": {"ms": number}, "failed": failed})
        return json.loads((tmp_path / "nvidia-h200-kernels.json").read_text())

    run(machine, first=1.0, second=None, third=3.0)
    again = run(machine | {"date": "2026-01-02"}, second=2.5)
    assert again["steps"] == ["first", "second", "third"]
    assert again["rows"] == [{"ms": 1.0}, {"ms": 2.5}, {"ms": 3.0}]
    assert "failed" not in again
    other = run(machine | {"versions": {"torch": "2.13"}}, first=0.5)
    assert other["steps"] == ["first"]  # numbers of two versions do not stand in one table
