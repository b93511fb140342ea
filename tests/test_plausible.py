"""A network that is not what it was said to be gives itself away at the ends of the range, before any fit."""

import warnings

import pytest
import torch
from analytic import ExactNet, mixture
from torch import nn

import fastscore as fs
from fastscore.estimator.network_density import network_of
from fastscore.estimator.plausible import WORSE, missed_shares

D = 8
TARGET = mixture(D)
X = TARGET.sample(40, seed=1)
SAID = r"off by .* of the noise's mean square, where a Gaussian's is by .*does it predict '{predicts}'"


def shares(net, schedule, predicts, x=X, **options):
    density = fs.ScoreDensity(net, schedule, predicts, program=False)
    samples = density.check(x, None, {}, **options)
    return missed_shares(network_of(density), samples, density.reference).mean(1)


@pytest.mark.parametrize("schedule", [fs.VP(), fs.DDPM.linear(1000), fs.FlowMatching(), fs.EDM()], ids=str)
@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "score", "denoiser"])
def test_exact_networks_miss_nothing_at_the_noisy_end_and_no_more_than_all_at_the_clean_one(schedule, predicts):
    scale = 0.5 if isinstance(schedule, fs.EDM) else 1.0
    x = scale * X
    noisy, clean = shares(ExactNet(scaled(scale), schedule, predicts), schedule, predicts, x).tolist()
    # 0.005 is the signal that data of variance 1.5 have at DDPM's noisiest time; at the clean end the mean square of
    # 256 numbers is within 0.35, four standard errors, of 1, and the two differ by less than a tenth of that.
    assert max(noisy) < 0.005
    assert clean == pytest.approx([1, 1], abs=0.35)
    assert abs(clean[0] - clean[1]) < 0.035


def scaled(factor):
    return type(TARGET)(TARGET.weight, factor * TARGET.mean, factor**2 * TARGET.cov)


class Altered(nn.Module):
    """A network that gets another time than it is called with."""

    def __init__(self, net, time):
        super().__init__()
        self.net, self.time = net, time

    def forward(self, x_t, t):
        return self.net(x_t, self.time(t))


VP = fs.VP()
WRONG = {
    "x0 for eps": (ExactNet(TARGET, VP, "x0"), VP, "eps"),
    "eps for x0": (ExactNet(TARGET, VP, "eps"), VP, "x0"),
    "v for eps": (ExactNet(TARGET, VP, "v"), VP, "eps"),
    "x0 for v": (ExactNet(TARGET, VP, "x0"), VP, "v"),
    "eps for score": (ExactNet(TARGET, VP, "eps"), VP, "score"),
    "the other direction for flow": (ExactNet(TARGET, VP, "flow"), fs.FlowMatching(), "flow"),
    "time reversed": (Altered(ExactNet(TARGET, VP), lambda t: 1 - t), VP, "eps"),
    "time in other units": (Altered(ExactNet(TARGET, VP), lambda t: t / 1000), VP, "eps"),
    "untrained": (Altered(nn.Identity(), lambda t: t), VP, "eps"),
}
WRONG["untrained"][0].net.forward = lambda x_t, t: 0 * x_t


@pytest.mark.parametrize("name", WRONG)
def test_another_network_than_was_said_is_warned_of_once(name):
    net, schedule, predicts = WRONG[name]
    density = fs.ScoreDensity(net, schedule, predicts, program=False)
    with pytest.warns(UserWarning, match=SAID.format(predicts=predicts)):
        density.estimate(X, nfe=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        density.estimate(X, nfe=16)


def test_most_wrong_pairs_of_predictions_are_told():
    told = []
    for schedule in (fs.VP(), fs.DDPM.linear(1000), fs.FlowMatching()):
        kinds = [kind for kind in ("eps", "v", "x0", "score", "flow") if kind != "flow" or not schedule.discrete]
        for own in kinds:
            for said in {*kinds, "denoiser"} - {own}:
                noisy, clean = shares(ExactNet(TARGET, schedule, own), schedule, said).tolist()
                told.append(any(own - other > WORSE * max(1, other) for own, other in (noisy, clean)))
    assert (sum(told), len(told)) == (54, 66)  # as docs/limits.md has it


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
def test_a_right_network_is_not_warned_of_whatever_the_data(scale):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fs.ScoreDensity(ExactNet(TARGET, VP), VP, "eps", program=False).estimate(scale * X, nfe=16)
        fs.ScoreDensity(ExactNet(TARGET, VP), VP, "eps", program=False).estimate(X[:1], nfe=16)


def test_entries_outside_of_a_mask_do_not_count():
    mask = torch.arange(D) < 3
    target = type(TARGET)(TARGET.weight, TARGET.mean[:, :3], TARGET.cov[:, :3, :3])

    class Padded(nn.Module):
        def forward(self, x_t, t):
            out = torch.full_like(x_t, torch.nan)
            out[:, :3] = ExactNet(target, VP)(x_t[:, :3], t)
            return out

    found = shares(Padded(), VP, "eps", mask=mask)
    assert max(found[0].tolist()) < 0.005
    assert found[1].tolist() == pytest.approx([1, 1], abs=0.6)  # of 96 numbers


def test_nothing_is_asked_after_fit(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "fastscore.estimator.network_density.warn_if_implausible", lambda network, *_: asked.append(network)
    )
    density = fs.ScoreDensity(ExactNet(TARGET, VP), VP, "eps", program=False)
    density.estimate(X, nfe=16)
    assert len(asked) == 1
    density.fit(X.repeat(4, 1), evaluations=8000, progress=False)
    density.estimate(X, nfe=16)
    assert len(asked) == 1
