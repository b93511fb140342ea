"""Several processes with one run: the same numbers, each reads its share, a dead one ends the run and loses nothing."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from command_line import ARGUMENTS, ZOO
from processes import free_port
from torch import nn

import fastscore as fs
from fastscore.cli import commands as cli
from fastscore.runs.evaluate import evaluate_dataset
from fastscore.runs.ranks import OtherRankFailed, Ranks
from fastscore.runs.run_folder import RunFolder

N, BATCH = 90, 8
OPTIONS = {"nfe": 32, "seed": 3, "batch": BATCH}


@dataclass
class ThreadRanks(Ranks):
    """Ranks in the threads of one process; they meet at a barrier, as processes do in all_gather_object."""

    barrier: threading.Barrier = field(default=None, repr=False)
    board: list = None

    def gather(self, do):
        try:
            self.board[self.rank] = do(), None
        except Exception as error:
            self.board[self.rank] = None, error
        self.barrier.wait(240)
        found = list(self.board)
        self.barrier.wait(240)
        failed = [rank for rank, (_, error) in enumerate(found) if error is not None]
        if failed:
            raise found[self.rank][1] if failed[0] == self.rank else OtherRankFailed(f"rank {failed[0]} failed")
        return [value for value, _ in found]


def together(size, call):
    """Return what `call(ranks)` returned or raised on each of `size` ranks."""
    barrier, board, results = threading.Barrier(size), [None] * size, [None] * size

    def one(rank):
        try:
            results[rank] = call(ThreadRanks(rank, size, barrier=barrier, board=board))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    return results


class Net(nn.Module):
    """A smooth network whose weights depend on a seed."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, 3, generator=generator, dtype=dtype))

    def forward(self, x, t):
        return torch.tanh(x @ self.weight) + 0.1 * t[:, None]


def density(dtype=torch.float32, seed=0):
    return fs.ScoreDensity(Net(dtype, seed), fs.VP(), "eps")


def samples(count=N, dtype=torch.float32, seed=0):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("case", [{}, {"target_stderr": 1.2, "max_nfe": 128}, {"fit": 100}], ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_one_two_and_three_give_the_same(tmp_path, dtype, rtol, case):
    options = OPTIONS | case
    if "fit" in case:
        options["fit"] = samples(case["fit"], dtype, seed=1)
    whole = evaluate_dataset(density(dtype), samples(dtype=dtype), tmp_path / "1.npz", **options)
    for size in (2, 3):
        out = tmp_path / f"{size}.npz"

        def call(ranks, out=out):
            return evaluate_dataset(density(dtype), samples(dtype=dtype), out, ranks=ranks, **options)

        found, *others = together(size, call)
        assert others == [None] * (size - 1)
        with np.load(out) as many, np.load(tmp_path / "1.npz") as one:
            np.testing.assert_array_equal(many["sample_index"], np.arange(N))
            for name in ("log_prob", "stderr", "nfe"):
                np.testing.assert_allclose(many[name], one[name], rtol=rtol)
        np.testing.assert_allclose(found.mean(), whole.mean(), rtol=rtol)
        assert found.truncation == pytest.approx(whole.truncation, rel=rtol)
        assert found.discretization == pytest.approx(whole.discretization, rel=10 * rtol)  # a difference of two sums
        torch.testing.assert_close(found.log_snr_curve.mean, whole.log_snr_curve.mean, rtol=rtol, atol=rtol)
        assert not RunFolder(out).folder.exists()


class Watched(np.ndarray):
    """An array that records which of its rows are read."""

    def __getitem__(self, index):
        if getattr(self, "seen", None) is not None:
            self.seen.update(np.arange(len(self))[index].tolist())
        return super().__getitem__(index)


def test_each_rank_reads_and_evaluates_its_share_alone(tmp_path, capsys):
    work = {rank: [] for rank in range(3)}
    data = {rank: samples().numpy().view(Watched) for rank in range(3)}

    def call(ranks):
        data[ranks.rank].seen = set()
        mine = density()
        estimate = mine.estimate
        object.__setattr__(
            mine, "estimate", lambda x, **kw: work[ranks.rank].append(kw["sample_index"]) or estimate(x, **kw)
        )
        return evaluate_dataset(mine, data[ranks.rank], tmp_path / "r.npz", ranks=ranks, progress=True, **OPTIONS)

    raised = [found for found in together(3, call) if isinstance(found, BaseException)]
    assert raised == []
    bar = capsys.readouterr().err
    assert bar.count("density, 1 of 3 processes:   0%") == 1  # of rank 0 alone
    assert "| 32/32 [" in bar
    assert "/26 [" not in bar  # the share of rank 2
    blocks = torch.arange(N).split(BATCH)
    for rank in range(3):
        share = torch.cat(blocks[rank::3]).tolist()
        assert torch.cat(work[rank]).tolist() == share
        assert data[rank].seen == {0, *share}  # the first sample shows whether the network takes the data


def test_an_unfinished_run_is_shared_equally_by_another_number(tmp_path):
    out, calls = tmp_path / "r.npz", []
    whole = evaluate_dataset(density(), samples(), tmp_path / "1.npz", **OPTIONS)

    class Stops(Ranks):
        def share(self, work):
            return work[:5] if isinstance(work, list) else work

        def gather(self, do):
            calls.append(do)
            if len(calls) == 4:  # the meeting after the work
                raise KeyboardInterrupt
            return [do()]

    with pytest.raises(KeyboardInterrupt, match="5 of 12 blocks are kept"):
        evaluate_dataset(density(), samples(), out, ranks=Stops(), **OPTIONS)
    shares = [0, 0, 0]

    def resume(ranks):
        mine = density()
        estimate = mine.estimate

        def counted(*args, **kwargs):
            shares[ranks.rank] += 1
            return estimate(*args, **kwargs)

        object.__setattr__(mine, "estimate", counted)
        return evaluate_dataset(mine, samples(), out, ranks=ranks, **OPTIONS)

    found = together(3, resume)[0]
    assert sorted(shares) == [2, 2, 3]
    torch.testing.assert_close(found.log_prob, whole.log_prob, rtol=1e-6, atol=0)
    assert out.read_bytes() == (tmp_path / "1.npz").read_bytes()


def test_a_block_that_an_earlier_run_still_writes_is_not_used(tmp_path):
    out = tmp_path / "r.npz"
    expected = evaluate_dataset(density(), samples(), tmp_path / "1.npz", **OPTIONS)
    stale = []

    class Late(Ranks):
        """Rank 0 of a run into which another process writes before the blocks are merged."""

        def gather(self, do):
            result, run = do(), RunFolder(out)
            if run.blocks() and not stale:
                stale.append(run.read_arrays(run.block(0)))
                run.write_arrays(run.block(0), stale[0] | {"log_prob": stale[0]["log_prob"] + 1, "run": "other"})
            return [result]

    found = evaluate_dataset(density(), samples(), out, ranks=Late(), **OPTIONS)
    assert len(stale) == 1
    assert torch.equal(found.log_prob, expected.log_prob)


def test_processes_that_differ_are_refused(tmp_path):
    found = together(
        3, lambda ranks: evaluate_dataset(density(seed=ranks.rank), samples(), tmp_path / "r.npz", ranks=ranks)
    )
    for error in found:
        assert isinstance(error, ValueError)
        assert str(error).startswith("the processes do not do the same work: network is ")
        assert "seed a network that is random at its start" in str(error)
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_said_by_the_rank_that_has_it_and_ends_all(tmp_path):
    x = samples()
    x[BATCH + 3, 1] = torch.nan  # in the second block, which is rank 1's
    found = together(3, lambda ranks: evaluate_dataset(density(), x, tmp_path / "r.npz", ranks=ranks, **OPTIONS))
    assert [type(error) for error in found] == [OtherRankFailed, ValueError, OtherRankFailed]
    assert str(found[1]) == "data has NaN or inf in sample 11; remove such samples"
    assert str(found[0]) == "rank 1 failed"
    evaluate_dataset(density(), samples(), tmp_path / "r.npz", **OPTIONS)
    found = together(2, lambda ranks: evaluate_dataset(density(), samples(), tmp_path / "r.npz", ranks=ranks))
    assert [type(error) for error in found] == [FileExistsError, OtherRankFailed]


def test_one_process_needs_no_torchrun():
    with Ranks.of_environment() as ranks:
        assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)
        assert ranks.share([1, 2, 3]) == [1, 2, 3]
        assert ranks.gather(lambda: 5) == [5]
        with pytest.raises(ZeroDivisionError):
            ranks.on_first(lambda: 1 / 0)


def test_every_process_of_a_machine_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [cli._device("auto", local).index for local in range(4)] == [0, 1, 0, 1]


def test_ranks_without_the_others_are_told_so(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConnectionError, match=r"rank 1 of 2 does not reach the others.*with one torchrun"):
        Ranks.of_environment().__enter__()


MEET = """
import os, sys, torch
from fastscore.runs.ranks import OtherRankFailed, Ranks
with Ranks.of_environment() as ranks:
    assert ranks.gather(lambda: ranks.rank ** 2) == [0, 1]
    assert ranks.on_first(lambda: "first" if ranks.first else 1 / 0) == "first"
    try:
        ranks.gather(lambda: 1 / ranks.rank)
    except ZeroDivisionError:
        assert ranks.rank == 0
    except OtherRankFailed as error:
        assert (ranks.rank, str(error)) == (1, "rank 1: rank 0 failed")
    if ranks.rank == 1:
        os._exit(9)
    try:
        ranks.gather(lambda: None)
    except OtherRankFailed as error:
        print(error)
"""


def both(program, *arguments):
    """Run a program in two processes that meet, and return them with what each wrote."""
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {"PYTHONPATH": str(Path(__file__).parent)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return processes, [process.communicate(timeout=240)[0] for process in processes]


def test_a_process_that_is_gone_is_an_error_at_the_next_meeting_and_no_hang():
    processes, outputs = both(MEET)
    assert [process.returncode for process in processes] == [0, 9]
    assert outputs[0] == "rank 0: another process is gone\n"


ENDS = """
import os, signal, sys
from fastscore.runs.ranks import OtherRankFailed, Ranks
try:
    with Ranks.of_environment() as ranks:
        if ranks.rank == 1:
            os._exit(9)
        if sys.argv[1] == "interrupted":
            os.kill(os.getpid(), signal.SIGTERM)
        ranks.gather(lambda: None)
except (KeyboardInterrupt, OtherRankFailed) as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    print(repr(stop))
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [("alone", "OtherRankFailed('rank 0: another process is gone')"), ("interrupted", "KeyboardInterrupt()")],
)
def test_what_is_said_at_the_end_is_not_interrupted(how, said):
    """A rank may learn of a dead one by itself just before torchrun's SIGTERM, which then finds it speaking."""
    processes, outputs = both(ENDS, how)
    assert [process.returncode for process in processes] == [0, 9]
    assert outputs[0] == f"{said}\n"


LEAVE = """
from fastscore.runs.ranks import Ranks
from processes import gloo_threads
with Ranks.of_environment() as ranks:
    import torch._dynamo  # as the first estimate does; it takes hold of the default group if it can
    ranks.gather(lambda: None)
    print(len(gloo_threads()) > 0)
print(gloo_threads())
"""


def test_no_thread_of_a_group_outlives_the_block():
    """One could abort the process while Python shuts down, after all its work is done."""
    processes, outputs = both(LEAVE)
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs == ["True\n[]\n"] * 2


def torchrun(model, count, out):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += ["-m", "fastscore", "evaluate", model, *ARGUMENTS[1:], "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "count", "victim", "again"),
    [pytest.param("zoo:Net", 3, 1, 2, marks=pytest.mark.long), ("zoo:double", 2, 0, 1)],
    ids=["float32", "float64"],
)
def test_torchrun_survives_kill_9(tmp_path, monkeypatch, model, count, victim, again):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("zoo.py").write_text(ZOO)
    dtype = np.float32 if model == "zoo:Net" else np.float64
    np.save("data.npy", samples(N, torch.float64)[:, :2].numpy().astype(dtype))
    Path("slow").touch()
    process = torchrun(model, count, "r.npz")
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob("r.npz.partial/block-*.npz"))) < 3:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (mark,) = tmp_path.glob(f"rank-{victim}-*")
    os.kill(int(mark.name.split("-")[-1]), signal.SIGKILL)
    _, stderr = process.communicate(timeout=240)
    kept = len(list(tmp_path.glob("r.npz.partial/block-*.npz")))
    assert process.returncode == 1
    assert "Signal 9 (SIGKILL) received by PID" in stderr
    said = re.search(r"(\d+) of 12 blocks are kept in r.npz.partial; run the same again to resume", stderr)
    assert said is not None, stderr
    assert 3 <= int(said[1]) <= kept  # another rank may finish writing a block after the first has counted
    assert not Path("r.npz").exists()
    Path("slow").unlink()

    if again > 1:
        process = torchrun(model, again, "r.npz")
        output, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr
    else:
        result = CliRunner().invoke(cli.main, ["evaluate", model, *ARGUMENTS[1:], "--out", "r.npz"])
        output, stderr = result.stdout, result.stderr
    assert f"resuming: {kept} of 12 blocks done" in stderr
    whole = CliRunner().invoke(cli.main, ["evaluate", model, *ARGUMENTS[1:], "--out", "whole.npz"])
    sys.modules.pop("zoo", None)
    assert whole.exit_code == 0

    def summary(text):
        return [line for line in text.splitlines() if not line.startswith(("seconds", "written"))]

    assert summary(output) == summary(whole.stdout)  # once: the other ranks are silent
    rtol = 1e-6 if dtype == np.float32 else 1e-10
    with np.load("r.npz") as many, np.load("whole.npz") as one:
        assert many["log_prob"].dtype == dtype
        for name in one:
            np.testing.assert_allclose(many[name], one[name], rtol=rtol)
    assert not Path("r.npz.partial").exists()
