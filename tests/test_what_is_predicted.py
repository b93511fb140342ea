"""What the network returns is said by whoever makes a density: there is no default that could be wrong."""

import inspect

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fastscore as fs
from fastscore.cli.commands import main
from fastscore.process.predictions import PREDICTIONS, check_prediction, what_it_must_say

TABLE = fs.DDPM.linear(10)
CALLS = {
    fs.ScoreDensity.__init__: lambda **said: fs.ScoreDensity(nn.Identity(), fs.VP(), **said),
    fs.ZeroMeanDensity.__init__: lambda **said: fs.ZeroMeanDensity(nn.Identity(), fs.VP(), **said),
    fs.DiffusionLoss.__init__: lambda **said: fs.DiffusionLoss(nn.Identity(), **said),
    fs.density_weights: lambda **said: fs.density_weights(TABLE, torch.arange(10), **said),
    fs.elbo_weights: lambda **said: fs.elbo_weights(TABLE, torch.arange(10), **said),
}


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__qualname__)
def test_a_call_without_it_is_told_what_it_means(function):
    with pytest.raises(TypeError) as told:
        CALLS[function]()
    assert str(told.value) == what_it_must_say()
    assert all(repr(name) in str(told.value) for name in PREDICTIONS)
    CALLS[function](predicts="v")
    with pytest.raises(ValueError, match=r"predicts must be one of .*; got None$"):
        CALLS[function](predicts=None)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("epsilon", "'eps'"),
        ("v_prediction", "'v'"),
        ("sample", "'x0'"),
        ("velocity", "'flow' (the velocity dx_t/dt) or 'v' (alpha eps - sigma x)"),
        ("Score", "'score'"),
        ("denoisr", "'denoiser'"),
        ("noise_prediction", "'eps'"),
        ("pred_eps", "'eps'"),
        ("x0_prediction", "'x0'"),
        ("pred_xstart", "'x0'"),
        ("score_prediction", "'score'"),
        ("pred_score", "'score'"),
        ("velocity_prediction", "'flow' (the velocity dx_t/dt) or 'v' (alpha eps - sigma x)"),
        ("energy_prediction", None),
        ("energy", None),
    ],
)
def test_other_words_for_a_prediction_are_known(word, meant):
    known = f"predicts must be one of {', '.join(sorted(PREDICTIONS))}; got {word!r}"
    with pytest.raises(ValueError, match=r"^predicts must be one of") as told:
        check_prediction(word)
    assert str(told.value) == known + (f"; did you mean {meant}?" if meant else "")
    done = CliRunner().invoke(main, ["evaluate", "nets:build", "x.npy", "--out", "x.npz", "--predicts", word])
    assert f"Error: Invalid value for '--predicts': {told.value}\n" in done.stderr


def test_no_public_function_has_a_default():
    public = [getattr(fs, name) for name in fs.__all__]
    takes = {kind: inspect.signature(kind).parameters.get("predicts") for kind in public if callable(kind)}
    found = {kind.__name__: parameter.default for kind, parameter in takes.items() if parameter is not None}
    assert len(found) == len(CALLS)
    assert set(found.values()) == {inspect.Parameter.empty}


def test_by_position_it_is_the_third():
    assert fs.ScoreDensity(nn.Identity(), fs.VP(), "v").predicts == "v"
    # At one x_t = alpha x + sigma eps with alpha^2 + sigma^2 = 1, v = alpha eps - sigma x has eps - eps_hat =
    # alpha (v - v_hat), so that the weights for v are those for eps times alpha^2.
    t = torch.arange(10)
    alpha, _ = TABLE.alpha_sigma(t)
    for weights in (fs.density_weights, fs.elbo_weights):
        assert torch.allclose(weights(TABLE, t, "v"), weights(TABLE, t, "eps") * alpha**2, rtol=1e-12)
