"""Estimates of batches joined are the estimate of all samples, and one that was saved comes back equal to the bit."""

import dataclasses
import itertools
import pickle
import zipfile

import masked_data
import numpy as np
import pytest
import torch
from analytic import ExactNet, mixture
from pretended_device import PretendedDevice
from test_pretended_device import NaNAbove

import fastscore as fs

D, N = 3, 40
X = mixture(D).sample(N)  # float64
INDEX = torch.arange(100, 100 + N)
SIZES = [7, 1, 20, 12]


def exact(schedule=None):
    schedule = schedule or fs.VP()
    return fs.ScoreDensity(ExactNet(mixture(D), schedule), schedule, "eps", program=False)


def fitted():
    return exact().fit(mixture(D).sample(400).float(), evaluations=120_000, seed=1)


CASES = {
    "a continuous schedule": (exact, {}),
    "a table": (lambda: exact(fs.DDPM.linear(50)), {}),
    "the discrete sum": (lambda: exact(fs.DDPM.linear(50)), {"method": "discrete"}),
    "the bound": (lambda: exact(fs.DDPM.linear(50)), {"method": "elbo"}),
    "fitted": (fitted, {}),
    "samples with evaluations of their own": (exact, {"target_stderr": 0.5, "max_nfe": 4096}),
    "transformed": (lambda: fs.Transformed(exact(), fs.transforms.zscore(0.5, 2.0)), {}),
    "masked": (masked_data.density, {"mask": masked_data.MASK}),
}


@pytest.fixture(params=CASES)
def case(request):
    """One estimate of all samples, and those of batches of unlike sizes with the indices of their samples."""
    make, options = CASES[request.param]
    density, x = make(), masked_data.X if request.param == "masked" else X

    def estimate(chosen):
        cut = {"sample_index": INDEX[chosen]} | options
        if "mask" in options:
            mask = options["mask"][chosen]
            cut |= {"mask": mask, "cond": masked_data.seen(mask)}
        return density.estimate(x[chosen], nfe=32, seed=5, **cut)

    ends = np.cumsum([0, *SIZES])
    return estimate(slice(None)), [estimate(slice(a, b)) for a, b in itertools.pairwise(ends)]


def test_joined_batches_are_one_call(case):
    """To the rounding of float64 sums in another order; a curve's error takes squares of what cancels to 1e-12."""
    whole, parts = case
    joined = fs.Estimate.cat(parts)
    for name in ("log_prob", "stderr", "variance", "jump", "ends"):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name), rtol=1e-9, atol=1e-11)
    assert torch.equal(joined.nfe, whole.nfe)
    assert torch.equal(joined.group, whole.group)
    assert joined.mean() == pytest.approx(whole.mean(), rel=1e-10)
    assert joined.truncation == pytest.approx(whole.truncation, rel=1e-8)
    # A node at the edge of one of its 48 bins falls to either side of it, as its mean log-SNR is rounded.
    assert joined.discretization == pytest.approx(whole.discretization, rel=1e-4, abs=1e-12)
    for found, expected in zip(joined.log_snr_curve, whole.log_snr_curve):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(torch.as_tensor(joined.dims), torch.as_tensor(whole.dims))
    assert (type(joined.dims), joined.method, joined.noise) == (type(whole.dims), whole.method, whole.noise)
    torch.testing.assert_close(joined.bits_per_dim(256), whole.bits_per_dim(256), rtol=1e-9, atol=1e-9)


def test_what_is_saved_comes_back_to_the_bit(case, tmp_path):
    whole, parts = case
    for made in (whole, fs.Estimate.cat(parts)):
        made.save(tmp_path / "x.npz")
        loaded = fs.Estimate.load(tmp_path / "x.npz")
        plain = dataclasses.replace(made, offset=float(made.offset))
        for field in dataclasses.fields(made):
            same(getattr(loaded, field.name), getattr(plain, field.name))
        assert repr(loaded) == repr(made)
        assert (loaded.mean(), loaded.truncation) == (made.mean(), made.truncation)
        assert loaded.discretization == made.discretization
        same(tuple(loaded.log_snr_curve), tuple(made.log_snr_curve))
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]  # no half of one beside it


def same(found, expected):
    assert type(found) is type(expected)
    if dataclasses.is_dataclass(expected):
        found, expected = vars(found), vars(expected)
    if isinstance(expected, dict | tuple):
        assert len(found) == len(expected)
        pairs = zip(found, expected) if isinstance(expected, tuple) else ((found[k], expected[k]) for k in expected)
        for pair in pairs:
            same(*pair)
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert found.numpy().tobytes() == expected.numpy().tobytes()
        assert found.shape == expected.shape
    else:
        assert found == expected


def test_the_error_of_the_mean_counts_what_batches_have_in_common():
    """Samples 0 .. 63 share their nodes, hence an error, c^2 = (sum of jumps / n)^2 / 12, in all their batches."""
    density = fs.ScoreDensity(Zero(), fs.LogSNR(-4, 4), "eps", program=False)
    parts = [density.estimate(X[i : i + 20], nfe=8, sample_index=torch.arange(i, i + 20)) for i in (0, 20)]
    joined = fs.Estimate.cat(parts)
    spread, common = float(joined.log_prob.var() / N), float(sum(part.jump.sum() for part in parts) / N) ** 2 / 12
    assert joined.mean()[1] ** 2 == pytest.approx(spread + common, rel=1e-9)
    assert common > 0.01 * spread  # it would be seen if it were missing
    apart = sum(part.mean()[1] ** 2 / 4 for part in parts)  # as if their errors had nothing in common
    assert apart < 0.99 * (spread + common)


class Zero(torch.nn.Module):
    def forward(self, x, t):
        return 0 * x


def test_samples_of_other_sizes_keep_their_dimensions():
    density = fs.ScoreDensity(Zero(), fs.VP(), "eps")
    parts = [density.estimate(torch.ones(2, d), nfe=8, sample_index=torch.arange(d, d + 2)) for d in (3, 5)]
    assert fs.Estimate.cat(parts).dims.tolist() == [3, 3, 5, 5]


def test_batches_that_all_begin_at_zero_are_not_joined():
    density = exact()
    parts = [density.estimate(x, nfe=16) for x in (X[:6], X[6:10])]
    with pytest.raises(
        ValueError, match=r"4 of 10 samples have the seed and the sample_index of another.*arange\(start"
    ):
        fs.Estimate.cat(parts)
    several = fs.Estimate.cat([parts[0], density.estimate(X[6:10], nfe=16, seed=1)])  # whose noise is its own
    assert several.seed.tolist() == 6 * [0] + 4 * [1]
    with pytest.raises(ValueError, match="3 of 13 samples have the seed"):
        fs.Estimate.cat([several, density.estimate(X[:3], nfe=16, seed=1)])


def test_what_cannot_be_one_estimate_is_refused(tmp_path):
    table, x = exact(fs.DDPM.linear(50)), X[:3]
    found = table.estimate(x, nfe=16, seed=2**63)  # of more than 63 bits
    assert found.seed.tolist() == 3 * [-(2**63)]
    for other, message in (
        (table.estimate(x, nfe=16, method="elbo"), "must have the same methods, got density, elbo"),
        (table.estimate(x, nfe=20), "must have the same numbers of draws, got 16, 20"),
        (exact(fs.DDPM.linear(60)).estimate(x, nfe=16), "must have the same tables, got others"),
        (dataclasses.replace(found, noise="sobol"), "must have the same kinds of noise, got independent, sobol"),
    ):
        with pytest.raises(ValueError, match=f"estimates that are joined {message}; call one density"):
            fs.Estimate.cat([found, other])
    with pytest.raises(ValueError, match="there are no estimates to join"):
        fs.Estimate.cat([])
    with pytest.raises(ValueError, match=r"an estimate is saved to a \.npz file, got .*x\.csv"):
        found.save(tmp_path / "x.csv")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*none' for x\.npz; make it first"):
        found.save(tmp_path / "none" / "x.npz")


class Bomb:
    def __reduce__(self):
        return print, ("executed",)


def test_other_files_are_refused_and_nothing_in_them_is_executed(tmp_path, capsys):
    path = tmp_path / "x.npz"
    with pytest.raises(FileNotFoundError):
        fs.Estimate.load(path)
    exact().estimate(X[:3], nfe=16).save(path)
    whole = path.read_bytes()
    with np.load(path) as stored:
        arrays = dict(stored)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"x\.npz is no \.npz file of Estimate\.save, or damaged"):
        fs.Estimate.load(path)
    for written in (pickle.dumps(Bomb()), b""):
        path.write_bytes(written)
        with pytest.raises(ValueError, match=r"is no \.npz file of Estimate\.save, or damaged"):
            fs.Estimate.load(path)
    np.savez(path, **arrays | {"log_prob": np.array([Bomb()] * 3)})
    with pytest.raises(ValueError, match=r"is no \.npz file of Estimate\.save, or damaged .ValueError.; a .csv"):
        fs.Estimate.load(path)
    np.savez(path, log_prob=np.zeros(3), stderr=np.zeros(3))
    with pytest.raises(ValueError, match=r"is no file of Estimate\.save: it has no curve_count, .*, variance"):
        fs.Estimate.load(path)
    fs.evaluate_dataset(exact(), X[:3], path, nfe=16, restart=True)
    with pytest.raises(ValueError, match=r"x\.npz is a result of fastscore evaluate .*; read it with numpy\.load$"):
        fs.Estimate.load(path)
    assert "executed" not in capsys.readouterr().out


def test_the_file_is_a_zip_of_plain_arrays(tmp_path):
    exact().estimate(X[:3], nfe=16).save(tmp_path / "x.npz")
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        assert all(b"'|O'" not in archive.read(name)[:128] for name in archive.namelist())


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_on_a_device_joining_waits_for_nothing_and_forgets_no_fault(tmp_path):
    with PretendedDevice() as device:
        density, x = fs.ScoreDensity(NaNAbove(), fs.LogSNR(-8, 8), "eps"), torch.zeros(6, 4, device="cuda")
        x[4] = 100.0
        index = torch.arange(6)
        parts = [density.estimate(x[i : i + 3], nfe=16, sample_index=index[i : i + 3]) for i in (0, 3)]
        with device.counting() as counts:
            joined = fs.Estimate.cat(parts)
        assert (counts.waits, counts.to_host) == (0, 0)
        assert joined.log_prob.device == x.device
        for read in (joined.mean, lambda: joined.save(tmp_path / "x.npz"), joined.check):
            with pytest.raises(ValueError, match="NaN or inf for sample 4 at log-SNR"):
                read()
        good = fs.Estimate.cat([parts[0]])
        good.save(tmp_path / "x.npz")
        assert fs.Estimate.load(tmp_path / "x.npz").log_prob.device.type == "cpu"
        with pytest.raises(ValueError, match="must have the same devices, got cuda:0, cpu"):
            fs.Estimate.cat([parts[0], fs.Estimate.load(tmp_path / "x.npz")])


CHANGED = {
    "log_prob as texts": ("log_prob", lambda v: v.astype(str), "log_prob must be floating point numbers"),
    "log_prob as integers": ("log_prob", lambda v: v.astype(np.int64), "log_prob must be floating point numbers"),
    "too few": ("log_prob", lambda v: v[:3], r"stderr must be .* of shape \(3,\), got float64 of \(40,\)"),
    "a single number": ("log_prob", lambda v: v[0], "log_prob must be|stderr must be"),
    "dims of others": ("dims", lambda v: np.array([1, 2]), r"dims must be integers of shape \(40,\)"),
    "a method of nobody": ("method", lambda v: np.array("foo"), "method must be one of density, discrete, elbo"),
    "noise of nobody": ("noise", lambda v: np.array("white"), "noise must be one of sobol, independent"),
    "ends without their columns": ("ends", lambda v: v[..., 0], "ends must be"),
    "a curve cut off": ("curve_total", lambda v: v[:-1], "curve_total must be"),
    "log_prob of NaN": ("log_prob", lambda v: v * np.nan, r"log_prob must be numbers, got \[nan"),
    "errors below zero": ("stderr", lambda v: -v, "stderr must be 0 or more, got"),
    "variances below zero": ("variance", lambda v: -v, "variance must be 0 or more, got"),
    "no evaluations": ("nfe", lambda v: 0 * v, "nfe must be 1 or more, got"),
    "no dimensions": ("dims", lambda v: 0 * v, "dims must be 1 or more, got"),
    "fewer samples than none": ("curve_count", lambda v: -v, "curve_count must be 0 or more, got"),
    "an offset of NaN": ("offset", lambda v: v * np.nan, "offset must be numbers, got"),
    "bytes in another order": (
        "log_prob",
        lambda v: v.astype(v.dtype.newbyteorder()),
        "log_prob must be numbers of this",
    ),
    "wide numbers": ("variance", lambda v: v.astype(np.longdouble), "variance must be numbers of this machine"),
    "a fraction of evaluations": ("nfe", lambda v: v + 0.5, "nfe must be integers"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_file_that_somebody_changed_is_refused_with_what_is_wrong_in_it(what, tmp_path):
    name, change, message = CHANGED[what]
    exact().estimate(X, nfe=16).save(tmp_path / "saved.npz")
    with np.load(tmp_path / "saved.npz") as stored:
        arrays = {**stored}
    arrays[name] = change(arrays[name])
    np.savez(tmp_path / "changed.npz", **arrays)
    with pytest.raises(ValueError, match=f"changed.npz is no file of Estimate.save, or was changed: ({message})"):
        fs.Estimate.load(tmp_path / "changed.npz")


def test_results_are_equal_to_themselves_alone_and_can_be_kept_in_sets():
    density = exact()
    one, other = density.estimate(X, nfe=16), density.estimate(X, nfe=16)
    assert one == one
    assert one != other
    assert len({one, other, one}) == 2
    compared = density.compare(X, {}, {}, nfe=16)
    assert compared == compared
    assert compared != density.compare(X, {}, {}, nfe=16)


@pytest.mark.parametrize("wrong", [None, 3, "x"])
def test_what_is_no_list_of_estimates_cannot_be_joined(wrong):
    with pytest.raises(TypeError, match=r"Estimate.cat takes a list of estimates, got a (single|list)"):
        fs.Estimate.cat(wrong)


def test_a_folder_is_no_file_to_save_to(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(ValueError, match="an estimate is saved to a file, got the folder"):
        exact().estimate(X, nfe=16).save(tmp_path / "folder.npz")
