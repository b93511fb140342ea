"""The experiments of `make gpu-bench` without a GPU: what runs, what is compared first, and all on the emulated one."""

import json
import shutil

import experiment_counters
import experiment_launches
import experiment_micro
import gpu_bench
import gpu_experiments
import micro_kernels
import pytest
import report
import torch
from emulator import build as builder
from emulator import comparison
from gpu_job import Found
from measuring import Row
from steps import Outcome, Step
from test_gpu_check import job, outcomes, untouched  # noqa: F401

from fastscore.ops import cuda

EXPERIMENTS = [f"E{number}" for number in range(8)]


def test_all_experiments_are_there_in_order_and_take_five_minutes():
    experiments = gpu_experiments.make_experiments()
    names = [e.name.split()[0] for e in experiments]
    assert list(dict.fromkeys(names)) == EXPERIMENTS
    assert sorted(names) == names
    assert all(0 < e.seconds <= 60 and e.rows and e.decides for e in experiments)
    # With what is compiled before, as long as the command line that the documentation gives.
    seconds = gpu_experiments.PREPARATION + sum(e.seconds for e in experiments)
    assert seconds == 300


def test_they_run_where_they_are_asked_for_alone():
    steps = gpu_bench.make_steps()
    asked = [step for step in steps if step.asked]
    assert asked == steps[-len(asked) :]
    assert all(step.name.startswith("experiments") for step in asked)
    assert not any(step.name.startswith("experiments") or step.needed for step in steps[: -len(asked)])
    assert not any(step.needed for step in asked)  # one that fails stops no other


def row_of_a_launch(error, f=None):
    """Return a row of a stand-in for a launch, and what was called in order."""
    called, launches = [], experiment_launches.Launches.__new__(experiment_launches.Launches)
    launches.experiment, launches.case, launches.first = "E9", experiment_launches.Case("plain", 64, 1), {}
    launches.launch = lambda into, *_: (called.append("launched"), into.fill_(f or 1.0))[1]
    launches.empty = lambda: torch.full((2, 3), float("nan"))
    launches.problem = type("P", (), {"error_of": lambda self, f: (called.append("compared"), error)[1]})()
    return launches, called


@pytest.fixture
def clock(monkeypatch):
    """Times are three calls and a constant."""
    monkeypatch.setattr(experiment_launches, "milliseconds", lambda run, rounds: [run() for _ in range(3)] and 1.0)
    for module in (experiment_launches, experiment_micro):
        monkeypatch.setattr(module, "DEVICE", "cpu")
        monkeypatch.setattr(module, "synchronize", lambda: None)


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_a_launch_whose_numbers_are_wrong_is_not_timed(clock, error):
    launches, called = row_of_a_launch(error)
    row = launches.row("planted")
    assert called == ["launched", "compared"]
    assert (row["error"], "ms" in row, "TFLOP/s" in row) == (None, False, False)
    assert row.failed["error"].startswith("ValueError: the relative error is")


def test_a_launch_is_compared_before_it_is_timed(clock):
    launches, called = row_of_a_launch(1e-3)
    row = launches.row("right")
    assert called == ["launched", "compared", *["launched"] * 3]
    assert list(row)[-3:] == ["error", "ms", "TFLOP/s"]
    assert not row.failed


def test_choices_of_a_launch_that_change_a_number_are_not_timed(clock):
    launches, _ = row_of_a_launch(1e-3)
    assert launches.row("first")["ms"] == 1.0
    launches.launch = lambda into, *_: into.fill_(1.0 + 2.0**-23)
    row = launches.row("another")
    assert "ms" not in row
    assert row.failed == {"error": "ValueError: other numbers than in the first launch"}


def test_a_micro_kernel_whose_numbers_are_wrong_is_not_timed():
    def wrong():
        raise ValueError("planted")

    row = experiment_micro._timed(Row("experiments", "x"), pytest.fail, wrong, pytest.fail)
    assert row == {"error": None}
    assert row.failed == {"error": "ValueError: planted"}


def test_a_row_that_fails_is_told_and_stops_no_other(capsys):
    def rows():
        for part, value in (("bad", 0.0), ("good", 2.0)):
            row = Row("experiments", part)
            row.measure("ms", lambda value=value: 1 / value)
            yield row

    planted = gpu_experiments.Experiment("E9 planted", 1, (rows, rows), "nothing")
    with pytest.raises(SystemExit, match=r"^bad, ms: ZeroDivisionError: .+; bad, ms: Zero"):
        gpu_experiments.measured(planted)()
    assert capsys.readouterr().out.count("ms: 0.5") == 2


def test_stages_are_split_evenly_and_start_at_lines():
    for cluster in (1, 2, 3, 4):
        for kilobytes in (16, 32):
            size = experiment_micro.stage_bytes(kilobytes, cluster)
            assert size % (16 * cluster) == size % 128 == 0  # bulk copies take multiples of 16 bytes
            assert 0.98 < size / (kilobytes << 10) <= 1


def test_rows_of_one_step_stand_side_by_side_and_its_end_is_told_of_the_last(tmp_path):
    found, step = Found(tmp_path), Step("experiments E9", lambda: None, 1)
    found.hear(step, {"environment": {"device": "CPU"}})
    for part, failed in (("a", {}), ("b", {"ms": "planted"}), ("c", {})):
        found.hear(step, {"table": "t", "part": part, "row": {"variant": part}, "failed": failed})
    found.settle([Outcome(step.name, "failed", 1.0, "exit code 1")])
    written = json.loads((tmp_path / "t.json").read_text())
    assert written["rows"] == [{"variant": part} for part in "abc"]
    assert written["failed"] == {"experiments E9, b": {"ms": "planted"}}
    found.settle([Outcome(step.name, "stopped", 1.0, "not done after 1 s")])
    written = json.loads((tmp_path / "t.json").read_text())
    assert written["failed"]["experiments E9, c"] == {"step": "not done after 1 s"}


# As ncu writes a page of raw values, the numbers made up.
RAW = """==PROF== Connected to process 1
==PROF== Profiling "sm90_steps_64_fwd_kernel": 0%....100% - 9 passes
"ID","Kernel Name","x__y","STALLED_long_scoreboard_PER","STALLED_wait_PER","sm__inst_executed_pipe_alu.sum"
"","","","warp","warp","inst"
"0","sm90_steps_64_fwd_kernel(Steps)","7","0.25","1,250.5","12"
"1","sm90_steps_128_fwd_kernel(Steps)","7","0.75","n/a","13"
==PROF== Disconnected
""".replace("STALLED", "smsp__average_warps_issue_stalled").replace("PER", "per_issue_active.ratio")


def test_counters_are_read_by_name():
    first, second = experiment_counters.read(RAW, ("smsp__", "sm__inst_executed_pipe_"))
    assert experiment_counters.stalls(first) == {"long_scoreboard": 0.25, "wait": 1250.5}
    assert experiment_counters.stalls(second) == {"long_scoreboard": 0.75}  # n/a is no number
    assert (first["sm__inst_executed_pipe_alu.sum"], len(first)) == (12, 3)
    assert experiment_counters.read("==ERROR== No permission", ("smsp__",)) == []


def test_without_a_profiler_the_counters_say_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    (counted,) = [step for step in gpu_experiments.make_steps() if "E7" in step.name]
    assert counted.why_not == "found no ncu on PATH nor in /usr/local/cuda/bin"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_the_micro_kernels_compile_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(micro_kernels, "BUILT", tmp_path)
    library = micro_kernels.load(micro_kernels.build())
    assert all(hasattr(library, name) for name in micro_kernels.FUNCTIONS)
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")
def test_two_and_four_warpgroups_agree_with_the_definition(monkeypatch):
    micro = micro_kernels.load(builder.build(micro_kernels.SOURCES))
    micro.emulator_device(9, 0, 3)
    monkeypatch.setattr(experiment_launches, "micro", lambda: micro)
    for d in (13, 50):  # padded to 16 and 64; four warpgroups fetch keys and x of 64 dimensions for every row
        case = comparison.Case(64, d, 3, 300, 5, maps=2)
        problem = comparison.problem_of_steps(comparison.load(builder.CSRC, "sm90_steps_64"), comparison.HOPPER, case)
        for count in (2, 4):
            problem.f.fill_(float("nan"))
            cuda.launch(experiment_launches.Warpgroups(count), problem.packed, problem.f, 0, 0)
            assert problem.errors().complaint() is None, (d, count)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")
def test_rehearsal_of_the_experiments(tmp_path, untouched):  # noqa: F811
    pytest.importorskip("triton")
    done = job("bench", "--rehearse", "--out", str(tmp_path), "--only", "experiments")
    assert done.returncode == 0, done.stderr
    found = outcomes(done, "12 steps: 11 passed, 1 skipped; ")
    assert {step.split()[1] for step in found if step.startswith("experiments E")} == set(EXPERIMENTS)
    table = json.loads((tmp_path / "experiments.json").read_text())
    assert {"date", "device", "versions", "rehearsed"} <= set(table)
    assert "failed" not in table
    rows = table["rows"]
    assert {row["experiment"] for row in rows} == set(EXPERIMENTS[:-1])  # there is nothing to count
    for row in rows:
        if row["what"] == "nvidia-smi":
            continue
        names = list(row)
        assert names.index("error") < names.index("ms")
        assert 0 <= row["error"] < 0.02
        assert row["ms"] > 0
    clusters = [row["variant"].rpartition(" ")[2] for row in rows if row["experiment"] == "E2"]
    assert clusters == list("1234") * 4
    assert {row["variant"] for row in rows} >= {"2 warpgroups", "4 warpgroups"}
    assert sum("splits" in row["variant"] for row in rows) == 8
    shown = report.results({"experiments": table})
    assert all(f"| {row['variant']} |" in shown for row in rows)
