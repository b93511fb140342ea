"""`make gpu-check` and `make gpu-bench` without a GPU: every line runs, in Triton's interpreter, and records nothing.

A failure and a hang are planted in both, to see that they are reported and that the rest is.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
PLANTED_TESTS = """
import time
import pytest
from steps import report

@pytest.mark.parametrize("number", range(3))
def test_planted(number):
    assert number != 1, f"number {number}\\nis planted"

def test_that_hangs():
    time.sleep(600)
"""
# The seconds of a rehearsal are four times those given here.
PLANTED = {
    "check": """
    import gpu_check as job
    def planted():
        tests = job.pytest_step("planted tests", 5, TESTS)
        broken = job.pytest_step("planted import", 10, TESTS + "missing", spread=False)
        return [Step("planted hang", lambda: time.sleep(600), 0.3), tests, broken, *job.make_steps()]
    """,
    "bench": """
    import gpu_bench as job
    def number(value):
        if value == "fails":
            raise RuntimeError("the kernel is planted\\nand here is more")
        time.sleep(600 if value == "hangs" else 0)
        return 1.5
    def row(*values):
        from measuring import Row
        found = Row("planted", values=" ".join(values))
        for value in values:
            found.measure(value, lambda: number(value))
        return found
    def planted():
        return [Step("planted failure", job.measured(row, "before", "fails", "after"), 5),
                Step("planted hang", job.measured(row, "before", "hangs"), 0.5),
                Step("planted crash", lambda: os.kill(os.getpid(), signal.SIGSEGV), 5), *job.make_steps()]
    """,
}


def job(name, *options, planted=False, folder=None):
    """Run a job, with what is planted in it."""
    command = [str(ROOT / "benchmarks" / f"gpu_{name}.py")]
    if planted:
        tests = folder / "test_planted.py"
        tests.write_text(PLANTED_TESTS)
        lines = re.sub(r"(?m)^    ", "", PLANTED[name]).replace("TESTS", repr(str(tests)))
        text = f"import os, signal, sys, time\nsys.path[:0] = [{str(ROOT / 'benchmarks')!r}]\nimport gpu_job\n"
        text += f"from steps import Step\n{lines}\nsys.exit(gpu_job.main('gpu-{name}', job.__doc__, planted))"
        command = ["-c", text]
    return subprocess.run(
        [sys.executable, *command, *options], capture_output=True, text=True, cwd=ROOT, timeout=900, env=environment()
    )


def environment():
    """Return this one, as a shell has it."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON", "COV"))}


def outcomes(done, counted):
    """Return state and reason of every step from the summary that ends the output."""
    *lines, last = done.stdout.partition("== summary\n")[2].splitlines()
    assert last.startswith(counted), done.stdout[-3000:] + done.stderr[-3000:]
    found = [re.match(r"(passed|failed|stopped|skipped) +(\S.*?) +[\d.]+ s *(.*)", line) for line in lines]
    return {match[2]: (match[1], match[3]) for match in found if match}


@pytest.fixture
def untouched():
    """The recorded results are as they were."""
    results = ROOT / "benchmarks" / "results"
    before = {path: path.read_bytes() for path in results.iterdir()}
    yield
    assert {path: path.read_bytes() for path in results.iterdir()} == before


@pytest.mark.long
def test_rehearsal_of_the_check(tmp_path, untouched):
    done = job("check", "--rehearse", "--out", str(tmp_path / "out"), planted=True, folder=tmp_path)
    assert done.returncode == 1, done.stderr
    found = outcomes(done, "8 steps: 5 passed, 1 failed, 2 stopped; ")
    for step in ("machine", "info", "public calls", "launches"):
        assert found[step] == ("passed", "")
    assert re.match(r"\d+ passed", found["graph"][1])
    assert found["planted hang"] == ("stopped", "not done after 1.2 s")
    assert found["planted tests"][0] == "stopped"
    assert found["planted import"][0] == "failed"
    file = f"{tmp_path}/test_planted.py"
    recorded = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    assert recorded["rehearsed"]
    (failed, hung), told = recorded["failures"]["planted tests"], done.stdout.partition("== summary\n")[2]
    assert re.fullmatch(r".*test_planted\.py::test_planted\[1\]: AssertionError: number 1", failed)
    assert re.fullmatch(r".*test_planted\.py::test_that_hangs: still running when it was stopped", hung)
    assert f"    {failed}\n    {hung}\n" in told
    tracebacks = (tmp_path / "out" / "gpu-check-tracebacks.txt").read_text()
    assert "is planted" in tracebacks
    assert Path(file).name in tracebacks
    assert (tmp_path / "out" / "gpu-check.log").read_text() == done.stdout


@pytest.mark.long
def test_rehearsal_of_the_measurements(tmp_path, untouched):
    done = job("bench", "--rehearse", "--out", str(tmp_path / "out"), planted=True, folder=tmp_path)
    assert done.returncode == 1, done.stderr
    found = outcomes(done, "26 steps: 23 passed, 2 failed, 1 stopped; ")
    failure = "fails: RuntimeError: the kernel is planted"
    assert found.pop("planted failure") == ("failed", f"exit code 1: {failure}")
    assert found.pop("planted hang") == ("stopped", "not done after 2 s: before: 1.5")
    assert found.pop("planted crash") == ("failed", "ended by SIGSEGV")
    assert {state for state, _ in found.values()} == {"passed"}
    tables = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert set(tables) == {"gpu-bench", "ceilings", "kernels", "estimates", "calls", "memory", "precisions", "launches",
                           "ODE", "planted"}  # fmt: skip
    assert tables["planted"]["rows"] == [
        {"values": "before fails after", "before": 1.5, "fails": None, "after": 1.5},
        {"values": "before hangs", "before": 1.5},
    ]
    assert tables["planted"]["failed"] == {
        "planted failure": {"fails": "RuntimeError: the kernel is planted"},
        "planted hang": {"step": "not done after 2 s: before: 1.5"},
    }
    for table in tables.values():
        assert {"date", "device", "versions", "rehearsed"} <= set(table)
    assert len(tables["kernels"]["rows"]) == 2
    assert all(row["Triton, ms"] > 0 and row["Triton, error"] < 0.02 for row in tables["kernels"]["rows"])
    assert all(row["ms"] > 0 and row["its ms"] > 0 for row in tables["calls"]["rows"])
    states = {row["step"]: row["state"] for row in tables["gpu-bench"]["rows"]}
    assert states["planted crash"] == "failed"


@pytest.mark.parametrize("name", ["check", "bench"])
def test_without_a_gpu_it_says_so(name, tmp_path, untouched):
    if os.path.exists("/dev/nvidia0"):
        pytest.skip("there is a GPU")
    done = job(name, "--out", str(tmp_path))
    assert done.returncode == 1
    found = outcomes(done, "")
    assert found.pop("machine") == ("failed", "exit code 1: no CUDA device: see --rehearse")
    assert len(found) > 8
    assert {reason for state, reason in found.values() if state == "skipped"} >= {"machine failed"}
    assert {state for state, _ in found.values()} == {"skipped"}
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("end", ["hang up", "nobody reads"])
def test_a_job_whose_terminal_is_gone_still_sums_up(tmp_path, end):
    text = f"""
import os, signal, sys, time
sys.path[:0] = [{str(ROOT / "benchmarks")!r}]
import gpu_job
from steps import Step
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup, which the job would heed
os.register_at_fork(after_in_parent=lambda: time.sleep(0.5))  # Python drops what is raised in here, as in torch's own
hang = Step("hang", lambda: [os.kill(os.getppid(), signal.SIGHUP), time.sleep(600)], 20)
talk = Step("talk", lambda: [print("x" * 10**6), time.sleep(0.5), print("x")], 20)
sys.exit(gpu_job.main("gpu-check", "A test.", lambda: [{"hang" if end == "hang up" else "talk"}]))
"""
    command = [sys.executable, "-c", text, "--rehearse", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment())
    process.stdout.close()
    process.wait(timeout=100)
    state = {"hang up": r"stopped  hang .* interrupted$", "nobody reads": "passed   talk"}[end]
    assert re.search(state, (tmp_path / "gpu-check.log").read_text().partition("== summary\n")[2], re.MULTILINE)
    assert (tmp_path / "gpu-check.json").exists()


COMMANDS = f"""
import json, sys
sys.path[:0] = [{str(ROOT / "benchmarks")!r}]
import gpu_bench, gpu_check, gpu_job

for name, *options in json.loads(sys.argv[1]):
    job = {{"bench": gpu_bench, "check": gpu_check}}[name]
    sys.argv = [name, "--rehearse", *options]
    try:
        code = gpu_job.main("gpu-" + name, job.__doc__, job.make_steps)
    except SystemExit as error:
        code = error.code
    for stream in sys.stdout, sys.stderr:
        print(f"== exit code {{code}}", file=stream, flush=True)
"""


@pytest.mark.long
def test_options(tmp_path):
    """All in one process: what a job imports takes it some five seconds, and these steps one tenth of a second each."""
    commands = [
        ("bench", "--only", "ceilings,memory 2", "--seconds", "100"),
        ("bench", "--only", "ceilings,compiling", "--seconds", "12"),
        ("bench", "--only", "ceilings", "--seconds", "0"),
        ("check", "--only", "graph,"),
        ("check", "--only", "graf"),
    ]
    text = json.dumps([(*command, "--out", str(tmp_path)) for command in commands])
    command = [sys.executable, "-c", COMMANDS, text]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900, env=environment())
    assert done.returncode == 0, done.stderr
    streams = [re.split(r"== exit code (\d)\n", text) for text in (done.stdout, done.stderr)]
    codes = map(int, streams[0][1::2])
    ended = map(subprocess.CompletedProcess, commands, codes, *(texts[::2] for texts in streams))
    ran, short, none, empty, wrong = ended
    assert ran.returncode == 0, ran.stderr
    assert list(outcomes(ran, "4 steps: 4 passed; ")) == ["machine", "ceilings", "memory 256MB", "memory 2048MB"]
    assert outcomes(short, "3 steps: 2 passed, 1 skipped; ")["compiling"][1].endswith("it takes 15 or more")
    assert outcomes(none, "2 steps: 2 skipped; ")["ceilings"][1].endswith("it takes 5 or more")
    assert empty.returncode == 2  # an empty name would be every step's beginning
    assert wrong.returncode == 2
    assert re.search(r"no step begins with 'graf'; there are: info, .*graph", wrong.stderr)
