"""Whatever an argument is given, a public call runs or says in a sentence of its own what is wrong with it."""

import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from test_refusals import X, density
from torch import nn
from torch.distributions import transforms as of_torch

import fastscore as fs
from fastscore.process.alpha_sigma import AlphaSigma
from fastscore.support.host import positive
from fastscore.transforms import Logit, Whitening, whiten, zscore

PACKAGE = str(Path(fs.__file__).parent)
BARE = object()
WRONG = [True, 2, -1, 1.5, float("nan"), "a", None, [1, 2], np.ones(3), torch.ones(2, 3), {}, BARE, fs.VP, 1j, 10**400]


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 + 2, 3)

    def forward(self, x, t, c):
        return self.layer(torch.cat([x, c], 1))


class Labelled(nn.Module):
    def forward(self, x, t, y):
        return torch.tanh(x) * y[:, None]


TOKENS, CONDITIONS = torch.randn(2, 5, 3), torch.randn(2, 5, 2)
MASK = torch.tensor([[True, False, True, True, False], [True, True, False, False, True]])
MADE, TABLE, LEVELS = density(), fs.DDPM.linear(10), fs.Levels(8, -3, 3)
LOSS = fs.DiffusionLoss(Head(), predicts="eps")
CLASSIFIER = fs.DiffusionClassifier(fs.ScoreDensity(Labelled(), fs.VP(), "eps"), {"y": torch.arange(3.0)})
FOUND, CLASSES = MADE.estimate(X, nfe=16), CLASSIFIER.classify(X[:2], nfe=16)
K = torch.zeros(4, 3, dtype=torch.int64)
NORMAL = {"weight": torch.ones(1), "mean": torch.zeros(1, 4), "variance": torch.ones(1, 4)}
WHITE = {"mean": torch.zeros(3), "basis": torch.eye(3), "std": torch.ones(3)}

# What is called, with what of arguments that are right, and which of them are given what is wrong.
CALLS = {
    "density_loss": (fs.density_loss, {"density": MADE, "x": X, "seed": 0}, "draws antithetic nodes mask seed"),
    "score_regularization": (fs.score_regularization, {"density": MADE, "x": X, "seed": 0}, "draws antithetic x"),
    "DiffusionLoss()": (LOSS, {"x": TOKENS, "z": CONDITIONS, "seed": 0}, "x z mask reduction"),
    "DiffusionLoss": (fs.DiffusionLoss, {"head": Head(), "predicts": "eps"}, "head schedule draws condition"),
    "DiffusionLoss.log_prob": (LOSS.log_prob, {"x": TOKENS, "z": CONDITIONS, "nfe": 16}, "z mask sample_index"),
    "AdaptiveNodes": (fs.AdaptiveNodes, {}, "schedule"),
    "density_weights": (fs.density_weights, {"schedule": TABLE, "t": K, "predicts": "eps"}, "schedule t predicts rule"),
    "elbo_weights": (fs.elbo_weights, {"schedule": TABLE, "t": K, "predicts": "eps"}, "schedule t"),
    "DiffusionClassifier": (
        fs.DiffusionClassifier, {"density": CLASSIFIER.density, "classes": {"y": K[:, 0]}}, "density classes prior",
    ),
    "classify": (CLASSIFIER.classify, {"x": X[:2], "nfe": 16}, "x nfe error weighting mask progress"),
    "classifier's fit": (CLASSIFIER.fit, {"data": X, "evaluations": 1}, "data evaluations"),
    "topk": (CLASSES.topk, {}, "k"),
    "isotropic": (fs.Reference.isotropic, {}, "std"),
    "Reference": (fs.Reference, NORMAL, "weight mean variance basis factors"),
    "DDPM": (fs.DDPM, {}, "alphas_cumprod"),
    "from_betas": (fs.DDPM.from_betas, {}, "betas"),
    "DDPM.cosine": (fs.DDPM.cosine, {"steps": 10}, "shift max_beta"),
    "VE": (fs.VE, {}, "sigma_min sigma_max"),
    "FlowMatching": (fs.FlowMatching, {}, "data_at"),
    "LogSNR": (fs.LogSNR, {}, "lo hi"),
    "whiten": (whiten, {"data": X}, "data floor"),
    "Whitening": (Whitening, WHITE, "mean basis std"),
    "Logit": (Logit, {}, "low high"),
    "zscore": (zscore, {"mean": 0.0, "std": 1.0}, "mean std"),
    "Transformed's fit": (fs.Transformed(MADE, zscore(0, 1)).fit, {"data": X, "evaluations": 0}, "data"),
    "interval": (FOUND.interval, {}, "level"),
    "bits_per_dim": (FOUND.bits_per_dim, {"bins": 8}, "bins low high"),
    "save": (FOUND.save, {}, "path"),
    "fit": (MADE.fit, {"data": X, "evaluations": 0, "progress": False}, "data evaluations reference seed"),
    "estimate": (MADE.estimate, {"x": X, "nfe": 16}, "nfe seed sample_index control progress target_stderr"),
    "ScoreDensity": (
        fs.ScoreDensity, {"model": nn.Identity(), "schedule": fs.VP(), "predicts": "eps"}, "noise backend program",
    ),
    "dequantize": (LEVELS.dequantize, {"k": K}, "dtype sample_index"),
}  # fmt: skip


def raised_here(error):
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.filename.startswith(PACKAGE) and last.line.startswith("raise")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_no_argument_ends_in_a_traceback_of_somebody_elses(name):
    call, right, arguments = CALLS[name]
    for argument in arguments.split():
        for value in WRONG:
            error = None
            try:
                call(**right | {argument: value})
            except (TypeError, ValueError) as refusal:
                error = refusal
            assert error is None or raised_here(error), (argument, value, error)


LOSSES = {"density": MADE, "x": X, "seed": 0}


@pytest.mark.parametrize("loss", [fs.density_loss, fs.score_regularization])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"antithetic": 2}, "antithetic must be True or False, got 2"),
        ({"antithetic": -1}, "antithetic must be True or False, got -1"),
        ({"antithetic": "yes"}, "antithetic must be True or False, got 'yes'"),
        ({"antithetic": None}, "antithetic must be True or False, got None"),
        ({"draws": 2.0}, r"draws must be an integer, got 2\.0"),
        ({"draws": True}, "draws must be an integer, got True"),
        ({"draws": 10**9}, r"at most \d+ evaluations for each of 30 samples of 3 numbers.*got \d+; give fewer draws"),
        ({"seed": 2**64}, "seed must be an integer of 64 bits, got one of 65 bits"),
    ],
)
def test_what_a_loss_cannot_draw(loss, options, message):
    with pytest.raises(ValueError, match=message):
        loss(**LOSSES | options)


def test_flags_of_numpy_and_torch_are_flags():
    expected = fs.density_loss(**LOSSES, antithetic=True)
    for flag in (np.True_, torch.tensor(True)):
        assert torch.equal(fs.density_loss(**LOSSES, antithetic=flag), expected)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK * 0.5, r"mask must be True \(or 1\) .* got other numbers"),
        (MASK.int() * 2 - 1, r"mask must be True \(or 1\) .* got other numbers"),
        (MASK.numpy(), "mask must be a tensor of True and False .* got ndarray"),
        (MASK.tolist(), "mask must be a tensor .* got list"),
        (True, "mask must be a tensor .* got bool"),
        (MASK[0], r"of shape \(2, 5\), got 3 True in \(5,\)"),
    ],
)
def test_masks_of_tokens_are_those_of_an_estimate(mask, message):
    for call in (
        lambda: LOSS(TOKENS, CONDITIONS, seed=0, mask=mask),
        lambda: LOSS.log_prob(TOKENS, CONDITIONS, mask=mask),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=message):
        LOSS.estimate(TOKENS, CONDITIONS, mask=mask)


def test_a_mask_of_ones_and_zeros_is_one():
    expected = LOSS.log_prob(TOKENS, CONDITIONS, mask=MASK, nfe=16)
    assert torch.equal(LOSS.log_prob(TOKENS, CONDITIONS, mask=MASK.float(), nfe=16), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": X.numpy().astype(np.longdouble)}, "data must be float32 or float64, got float128"),
        ({"fit": [1, 2]}, "fit data must be one tensor or array of numpy .* got list"),
        ({"fit": [1, 2], "mask": X > 9}, "fit data must be one tensor or array of numpy .* got list"),
        ({"out": None}, "out must be a .npz or .csv file, got None"),
        ({"identity": "a"}, "identity must be a dict .* got 'a'"),
        ({"seed": 1j}, "seed must be an integer, got 1j"),
        ({"restart": "no"}, "restart must be True or False, got 'no'"),
        (
            {"cond": {"y": np.array(["a"] * 30)}},
            "cond 'y' must be an array of numbers that torch has, got str32; convert",
        ),
        (
            {"cond": {"y": np.array([{}] * 30)}},
            "cond 'y' must be an array of numbers that torch has, got object; convert",
        ),
        ({"cond": {"y": fs.shared(np.array(["a"]))}}, "cond 'y' must be an array of numbers that torch has"),
        ({"mask": np.full((30, 3), "a")}, "mask must be an array of numbers that torch has"),
    ],
)
def test_what_a_data_set_cannot_be(options, message, tmp_path):
    given = {"density": MADE, "data": X, "out": tmp_path / "r.npz", "nfe": 16, "progress": False} | options
    with pytest.raises(ValueError, match=message):
        fs.evaluate_dataset(given.pop("density"), given.pop("data"), given.pop("out"), **given)


def test_a_condition_of_another_library_is_named_by_its_kind(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["y"] = np.arange(30)
        with pytest.raises(ValueError, match=r"a tensor or an array of numpy .* got Dataset of shape \(30,\); what"):
            fs.evaluate_dataset(MADE, X, tmp_path / "r.npz", nfe=16, cond={"y": file["y"]})


@pytest.mark.parametrize(
    "transform",
    [
        of_torch.CorrCholeskyTransform(), of_torch.LowerCholeskyTransform(), of_torch.StickBreakingTransform(),
        of_torch.ReshapeTransform((4,), (2, 2)), of_torch.ReshapeTransform((4,), (4,)),
        of_torch.CatTransform([of_torch.ExpTransform()] * 2, dim=-1, lengths=[2, 3]),
        of_torch.StackTransform([of_torch.ExpTransform()] * 4, dim=-1),
    ],
    ids=lambda transform: type(transform).__name__,
)  # fmt: skip
@pytest.mark.parametrize("x", [X.exp(), torch.eye(3).repeat(4, 1, 1)], ids=["rows", "matrices"])
def test_a_transform_of_samples_of_another_shape(transform, x):
    with pytest.raises((TypeError, ValueError)) as caught:
        fs.Transformed(MADE, transform).estimate(x, nfe=16)
    assert raised_here(caught.value)


@pytest.mark.parametrize("evaluations", [1, 50, 1535])
def test_a_fit_of_too_few_evaluations_says_what_it_takes(evaluations):
    with pytest.warns(
        UserWarning, match=f"nothing but the reference: nodes take 1536 .* got evaluations={evaluations}; "
    ):
        density().fit(X, evaluations=evaluations, progress=False)


def test_a_fit_that_is_asked_for_the_reference_alone_says_nothing():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fit has fitted nothing but the reference")
        density().fit(X, evaluations=0, progress=False)


class Exact(nn.Module):
    """The noise in data of N(0, 1)."""

    def forward(self, x, t):
        return fs.VP().alpha_sigma(t)[1].to(x)[:, None] * x


@pytest.mark.filterwarnings("ignore:fit has", "ignore:the data have", "ignore:most samples are")
def test_the_mean_of_what_no_dtype_holds_has_an_infinite_error():
    """Data of 1e-20 were fitted, and x is of order 1: log_prob is -1e40, and the mean was -inf +- NaN."""
    made = fs.ScoreDensity(Exact(), fs.VP(), "eps").fit(1e-20 * X, evaluations=0, progress=False)
    found = made.estimate(X, nfe=16)
    with pytest.warns(
        UserWarning, match="the mean of these samples is -inf, since a number among them is beyond .*scale of"
    ):
        assert found.mean() == (-torch.inf, torch.inf)


def test_weights_of_a_table_of_ones_own_are_those_of_its_log_snr():
    class Own(fs.Schedule):
        discrete, time_range = True, (0, 9)

        def log_snr(self, t):
            return TABLE.log_snr(torch.as_tensor(t))

    for weights in (fs.density_weights, fs.elbo_weights):
        assert torch.equal(weights(Own(), torch.arange(10), "eps"), weights(TABLE, torch.arange(10), "eps"))


def test_a_schedule_that_is_learned_is_no_contradiction():
    class Learned(AlphaSigma, nn.Module):
        time_range = (0.99, 0.01)

        def __init__(self):
            nn.Module.__init__(self)
            self.power = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def alpha_sigma(self, t):
            return torch.as_tensor(t).double() ** self.power, 1 - torch.as_tensor(t).double() ** self.power

        def time(self, log_snr):
            return torch.sigmoid(0.5 * log_snr) ** (1 / self.power)

    fs.ScoreDensity(nn.Identity(), Learned(), "eps")


@pytest.mark.parametrize("value", [torch.tensor(True), True, "1", None, X])
def test_a_truth_value_and_a_text_are_no_number(value):
    with pytest.raises(ValueError, match="width must be positive"):
        positive("width", value, "nats")
