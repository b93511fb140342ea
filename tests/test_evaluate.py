"""Blocks, resuming and merging: the same numbers as one estimate, and the same bytes however often interrupted."""

import math
import os
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from torch import nn
from torch.masked import masked_tensor

import fastscore as fs
from fastscore.runs.evaluate import Interrupted, evaluate_dataset
from fastscore.runs.run_folder import RunFolder

N, BATCH = 50, 8
COLUMNS = ["sample_index", "log_prob", "stderr", "nfe", "truncation", "discretization"]
OPTIONS = {"nfe": 32, "seed": 3, "batch": BATCH}


class Net(nn.Module):
    """A smooth network of (x_t, t) that presses Ctrl-C after a number of calls."""

    def __init__(self, d=2, calls=10**9):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(d, d, generator=generator) / d)
        self.calls = calls

    def forward(self, x, t):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return torch.tanh(x @ self.weight) + 0.1 * t[:, None]


def density(schedule=None, **options):
    return fs.ScoreDensity(Net(**options), schedule or fs.VP(), "eps")


def samples(count=N, d=2, dtype=torch.float32, seed=0):
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spy(target, name):
    """Record the calls of a method of one object, and pass them on."""
    calls, original = [], getattr(target, name)

    def recorded(*args, **kwargs):
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    object.__setattr__(target, name, recorded)
    return calls


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"batch": 1},
        {"batch": 1000},
        {"method": "discrete"},
        {"method": "elbo"},
        {"target_stderr": 1.2, "max_nfe": 256},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_one_estimate_of_all(tmp_path, case, dtype):
    x, options = samples(dtype=dtype), OPTIONS | case
    result = evaluate_dataset(density(), x, tmp_path / "r.npz", **options)
    whole = density().estimate(x, **{name: value for name, value in options.items() if name != "batch"})
    with np.load(tmp_path / "r.npz") as stored:
        assert list(stored) == COLUMNS
        assert stored["log_prob"].dtype == (np.float32 if dtype == torch.float32 else np.float64)
        np.testing.assert_array_equal(stored["sample_index"], np.arange(N))
        np.testing.assert_allclose(stored["log_prob"], whole.log_prob, rtol=1e-5)
        np.testing.assert_allclose(stored["stderr"], whole.stderr, rtol=1e-5)
        np.testing.assert_array_equal(stored["nfe"], whole.nfe)
        np.testing.assert_array_equal(stored["log_prob"], result.log_prob)
    if "target_stderr" in case:
        assert len(set(whole.nfe.tolist())) > 1  # samples stopped at different numbers of evaluations
    assert result.truncation == pytest.approx(whole.truncation, rel=1e-5)
    assert result.discretization == pytest.approx(whole.discretization, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(result.log_snr_curve.mean, whole.log_snr_curve.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.log_snr_curve.stderr, whole.log_snr_curve.stderr, rtol=1e-4, atol=1e-6)
    assert (result.dims, result.method, result.noise) == (whole.dims, whole.method, whole.noise)
    assert not (tmp_path / "r.npz.partial").exists()


def test_csv_equals_npz(tmp_path):
    levels = fs.Levels(256, -2 + 2 / 256, 2 - 2 / 256)  # dequantized in [-2, 2)
    for suffix, of_bins in (("npz", {"bins": 256, "low": -2.0, "high": 2.0}), ("csv", {"bins": levels})):
        evaluate_dataset(density(), samples(), tmp_path / f"r.{suffix}", **of_bins, **OPTIONS)
    header, *lines = (tmp_path / "r.csv").read_text().splitlines()
    table = dict(zip(header.split(","), np.array([line.split(",") for line in lines]).T))
    with np.load(tmp_path / "r.npz") as stored:
        assert list(table) == list(stored) == [*COLUMNS, "bits_per_dim"]
        for name in stored:
            np.testing.assert_array_equal(table[name].astype(stored[name].dtype), stored[name], err_msg=name)
        bits = -(stored["log_prob"] / 2 + math.log(4 / 256)) / math.log(2)
        np.testing.assert_allclose(stored["bits_per_dim"], bits, rtol=1e-6)


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False])], ids=["all", "masked"])
def test_data_outside_of_the_levels_are_warned_of_once(tmp_path, recwarn, mask):
    x = samples(20).clamp(-0.99, 0.99)
    options = OPTIONS | {"bins": 256, "mask": mask}
    evaluate_dataset(density(), x, tmp_path / "inside.npz", **options)
    x[3], x[9, 0], x[15] = 1.0, -1.0, -1.5  # high is outside, low inside
    evaluate_dataset(density(), x, tmp_path / "none.npz", **options | {"bins": None})
    untrained = "the noise that the network predicts is off"
    assert [str(warning.message) for warning in recwarn if untrained not in str(warning.message)] == []
    evaluate_dataset(density(), x, tmp_path / "r.npz", **options)
    (warning,) = (warning for warning in recwarn if untrained not in str(warning.message))
    outside, entries = (4, 40) if mask is None else (2, 20)
    assert str(warning.message).startswith(
        f"{outside} of {entries} entries of the data lie outside [low, high) = [-1, 1), where the 256 levels are"
    )
    assert warning.filename == __file__


def test_result_holds_no_date(tmp_path):
    evaluate_dataset(density(), samples(), tmp_path / "r.npz", **OPTIONS)
    with zipfile.ZipFile(tmp_path / "r.npz") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_indices_keep_the_noise_of_the_data_set(tmp_path):
    whole = evaluate_dataset(density(), samples(), tmp_path / "r.npz", **OPTIONS)
    for rank in range(3):
        out = tmp_path / f"{rank}.npz"
        part = evaluate_dataset(density(), samples(), out, indices=range(rank, N, 3), **OPTIONS)
        torch.testing.assert_close(part.log_prob, whole.log_prob[rank::3], rtol=1e-5, atol=0)
        np.testing.assert_array_equal(np.load(out)["sample_index"], np.arange(rank, N, 3))


def test_numpy_data_of_any_shape_and_byte_order(tmp_path):
    class Image(Net):
        def forward(self, x, t):
            return super().forward(x.flatten(1), t).reshape(x.shape)

    x = samples(d=12)
    expected = fs.ScoreDensity(Image(12), fs.VP(), "eps").estimate(x.reshape(N, 3, 2, 2), nfe=32, seed=3)
    for number, data in enumerate([x.numpy().astype(">f4"), np.asfortranarray(x.numpy())]):
        image = fs.ScoreDensity(Image(12), fs.VP(), "eps")
        result = evaluate_dataset(image, data.reshape(N, 3, 2, 2), tmp_path / f"{number}.npz", **OPTIONS)
        torch.testing.assert_close(result.log_prob, expected.log_prob, rtol=1e-5, atol=0)
        assert result.dims == 12


@pytest.fixture
def interrupted(tmp_path):
    """An unfinished run with some blocks, and the bytes of an uninterrupted one."""
    evaluate_dataset(density(), samples(), tmp_path / "whole.npz", **OPTIONS)
    with pytest.raises(Interrupted, match=r"3 of 7 blocks are kept in .*r\.npz\.partial"):
        evaluate_dataset(density(calls=12), samples(), tmp_path / "r.npz", **OPTIONS)  # nine calls are the probes
    return tmp_path / "r.npz", (tmp_path / "whole.npz").read_bytes()


def test_resumes_with_the_missing_blocks(interrupted, capsys):
    out, expected = interrupted
    again = density()
    calls = spy(again, "estimate")
    evaluate_dataset(again, samples(), out, progress=True, **OPTIONS)
    done = torch.cat([options["sample_index"] for _, options in calls])
    np.testing.assert_array_equal(done, np.arange(3 * BATCH, N))
    assert out.read_bytes() == expected
    assert "resuming: 3 of 7 blocks done" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [lambda b: b[:-40], lambda b: b[:10], lambda b: b"", lambda b: bytes(len(b))])
def test_damaged_blocks_are_computed_again(interrupted, damage):
    out, expected = interrupted
    block = RunFolder(out).block(1)
    block.write_bytes(damage(block.read_bytes()))
    again = density()
    calls = spy(again, "estimate")
    evaluate_dataset(again, samples(), out, **OPTIONS)
    assert [int(options["sample_index"][0]) for _, options in calls] == [8, 24, 32, 40, 48]
    assert out.read_bytes() == expected


def test_a_flipped_bit_is_found(interrupted):
    out, expected = interrupted
    block = RunFolder(out).block(2)
    content = bytearray(block.read_bytes())
    content[content.index(np.load(block)["log_prob"].tobytes())] ^= 1
    block.write_bytes(content)
    evaluate_dataset(density(), samples(), out, **OPTIONS)
    assert out.read_bytes() == expected


def test_block_of_other_samples_is_not_used(interrupted):
    out, expected = interrupted
    run = RunFolder(out)
    run.block(0).write_bytes(run.block(1).read_bytes())
    evaluate_dataset(density(), samples(), out, **OPTIONS)
    assert out.read_bytes() == expected


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"nfe": 64}, "nfe is 32 there and 64 here"),
        ({"seed": 4}, "seed is 3 there and 4 here"),
        ({"method": "elbo"}, "method is density there and elbo here"),
        ({"batch": 16}, "batch is 8 there and 16 here"),
        ({"data": samples(60)}, r"data is float32 \(50, 2\) \w+ there and float32 \(60, 2\) \w+ here"),
        ({"target_stderr": 0.1}, "target_stderr is None there and 0.1 here"),
        ({"indices": range(0, N, 2)}, r"indices is all there and 25 \w+ here"),
        ({"identity": {"model": "abc"}}, "model is None there and abc here"),
        ({"fit": samples(30)}, r"fit data is None there and \w+ here"),
        ({"data": samples(seed=1)}, r"data is float32 \(50, 2\) \w+ there and float32 \(50, 2\) \w+ here"),
        ({"data": samples(dtype=torch.float64)}, r"data is float32 \(50, 2\) \w+ there and float64 \(50, 2\) \w+ here"),
        ({"schedule": fs.VP(0.2)}, r"schedule is VP\(beta_min=0.1, beta_max=20\) [^;]* here"),
        ({"weight": 2.0}, r"network is \w+ there and \w+ here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_arguments_are_refused_and_no_more_is_named_than_differs(interrupted, change, named):
    out, _ = interrupted
    change = dict(change)
    other = density(change.pop("schedule", None))
    with torch.no_grad():
        other.model.weight *= change.pop("weight", 1.0)
    data = change.pop("data", samples())
    with pytest.raises(ValueError, match=rf"3 finished blocks of another run: {named}\. Give another out.*restart"):
        evaluate_dataset(other, data, out, **OPTIONS | change)
    assert len(RunFolder(out).blocks()) == 3


def test_less_memory_goes_on_with_the_same_run(interrupted):
    out, _ = interrupted
    log_prob = evaluate_dataset(density(), samples(), out, memory="300KB", **OPTIONS).log_prob
    # The finished blocks are the other run's; chunks of another size round in another order.
    torch.testing.assert_close(log_prob, density().estimate(samples(), nfe=32, seed=3).log_prob, rtol=1e-5, atol=1e-4)


def test_restart_discards_an_unfinished_run(interrupted, tmp_path):
    out, _ = interrupted
    evaluate_dataset(density(), samples(), out, restart=True, **OPTIONS | {"seed": 4})
    evaluate_dataset(density(), samples(), tmp_path / "4.npz", **OPTIONS | {"seed": 4})
    assert out.read_bytes() == (tmp_path / "4.npz").read_bytes()


def test_a_result_is_replaced_only_on_request(tmp_path):
    out = tmp_path / "r.npz"
    evaluate_dataset(density(), samples(), out, **OPTIONS)
    before = out.read_bytes()
    with pytest.raises(FileExistsError, match="is there already; give another out, or replace it with restart"):
        evaluate_dataset(density(), samples(), out, **OPTIONS | {"seed": 4})
    assert out.read_bytes() == before
    assert not RunFolder(out).folder.exists()
    evaluate_dataset(density(), samples(), out, restart=True, **OPTIONS | {"seed": 4})
    assert out.read_bytes() != before


def test_foreign_files_stay(tmp_path):
    folder = tmp_path / "r.npz.partial"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    evaluate_dataset(density(), samples(), tmp_path / "r.npz", **OPTIONS)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_fits_once(tmp_path):
    train, counting = samples(100, seed=1), density()
    fitted = evaluate_dataset(counting, samples(), tmp_path / "whole.npz", fit=train, **OPTIONS)
    calls = 10**9 - counting.model.calls
    direct = density().fit(train, seed=3, progress=False)
    torch.testing.assert_close(fitted.log_prob, direct.estimate(samples(), nfe=32, seed=3).log_prob, rtol=1e-5, atol=0)
    assert fitted.noise == "sobol"  # which only a calibrated density uses
    with pytest.raises(Interrupted, match=r"[1-6] of 7 blocks"):
        evaluate_dataset(density(calls=calls - 3), samples(), tmp_path / "r.npz", fit=train, **OPTIONS)
    again = density()
    fits = spy(again, "fit")
    evaluate_dataset(again, samples(), tmp_path / "r.npz", fit=train, **OPTIONS)
    assert fits == []
    assert (tmp_path / "r.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_one_process_at_a_time(tmp_path):
    run = RunFolder(tmp_path / "r.npz")
    run.folder.mkdir()
    hold = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]): print(1, flush=True); input()"
    command = [sys.executable, "-c", hold, run.folder / "lock"]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        (run.folder / "pid").write_text(str(holder.pid))
        with pytest.raises(BlockingIOError, match=rf"process {holder.pid} is working on .*r\.npz; wait until it ends"):
            evaluate_dataset(density(), samples(), run.out, **OPTIONS)
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    evaluate_dataset(density(), samples(), run.out, **OPTIONS)  # the lock of a dead process is free
    assert run.out.exists()


def integers():
    return torch.zeros(5, 2, dtype=torch.uint8)


def broken():
    x = samples()
    x[37, 1] = math.inf
    return x


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (integers(), {}, r"data holds integers \(uint8\), expected float32 or float64.*Levels\(bins\)\.dequantize"),
        (integers().numpy().astype(">i4"), {}, r"data holds integers \(int32\)"),
        (np.zeros((5, 2), bool), {}, "data must be float32 or float64, got bool"),
        (torch.zeros(5), {}, r"data must have the shape \(N, \*shape\) with N >= 1, got \(5,\)"),
        (torch.zeros(0, 2), {}, r"got \(0, 2\)"),
        (broken(), {}, "data has NaN or inf in sample 37"),
        (samples(d=3), {}, r"the network does not take data of shape \(3,\) a sample: RuntimeError: mat1 and mat2"),
        (samples(), {"fit": samples(d=3)}, r"fit data has samples of shape \(3,\), expected \(2,\)"),
        (samples(), {"fit": samples() / 0}, "fit data has NaN or inf in sample 0"),
        (samples(), {"indices": [0, 50]}, "indices must be a list of numbers from 0 to 49"),
        (samples(), {"indices": []}, "indices must be a list of numbers"),
        (samples(), {"batch": 0}, "batch must be at least 1 sample, got 0"),
        (samples(), {"nfe": 2}, "nfe=2 leaves fewer than 4 draws"),
        (samples(), {"memory": "much"}, "memory must be a number of bytes"),
        (samples().to_sparse(), {}, r"data must be a dense tensor, got a sparse_coo one; .to_dense.. makes a dense"),
        (samples().to("meta"), {}, "data must be a dense tensor, got a meta one; give one with values"),
        (torch.nested.nested_tensor([samples()]), {}, "data must be a dense tensor, got a nested one"),
        (samples(), {"fit": masked_tensor(samples(), samples() > 0)}, r"fit data must be .* got a MaskedTensor one"),
        (np.ma.masked_less(samples().numpy(), 0), {}, r"data must be a plain array, got a masked one; give \.filled"),
        (samples(), {"mask": samples().to_sparse()}, "mask must be a dense tensor, got a sparse_coo one"),
        (samples(), {"cond": {"y": samples().to("meta")}}, "cond 'y' must be a dense tensor, got a meta one"),
        (samples(), {"out": "r.txt"}, r"out must be a \.npz or \.csv file, got 'r\.txt'"),
    ],
)
def test_errors_come_before_the_work(tmp_path, monkeypatch, data, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        evaluate_dataset(density(), data, **{"out": "r.npz"} | OPTIONS | options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [({"target_stderr": 0.0}, "target_stderr must be positive"), ({"bins": 4, "low": 1, "high": 0}, "high > low")],
)
def test_what_cannot_be_reported_is_refused_before_the_work(tmp_path, options, message):
    class Untouched(nn.Module):
        def forward(self, x_t, t):
            raise AssertionError("the network has run")

    density = fs.ScoreDensity(Untouched(), fs.LogSNR(-4, 4), "eps")
    with pytest.raises(ValueError, match=message):
        evaluate_dataset(density, torch.zeros(4, 3), tmp_path / "out.npz", **options)
