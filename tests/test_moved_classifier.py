"""A classifier's nodes cover the range that its density has when it is called, whatever happened to it since."""

import pytest
import torch
from mixtures import ExactEps, Mixture
from torch import nn

import fastscore as fs

STDS = torch.tensor([[0.5, 1.0]])
MEANS = torch.tensor([[-0.3, 0.0], [0.3, 0.0]])
BOTH = {"y": torch.arange(2)}


class TwoClasses(nn.Module):
    """The exact network of one Gaussian a class; keeps the lowest and the highest time that it was asked for."""

    def __init__(self, schedule, scale=1.0):
        super().__init__()
        self.targets = [Mixture(scale * mean[None], scale * STDS) for mean in MEANS]
        self.nets, self.asked = [ExactEps(target, schedule) for target in self.targets], []

    def forward(self, x_t, t, y):
        self.asked += [float(t.min()), float(t.max())]
        out = torch.empty_like(x_t)
        for c, net in enumerate(self.nets):
            out[y == c] = net(x_t[y == c], t[y == c])
        return out


def density_of(schedule, scale=1.0):
    return fs.ScoreDensity(TwoClasses(schedule, scale), schedule, "eps", program=False)


def drawn(count, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([Mixture(scale * mean[None], scale * STDS).sample(count, generator) for mean in MEANS])


def fitted(density, scale):
    y = torch.arange(2).repeat_interleave(200)
    return density.fit(drawn(200, 1, scale), evaluations=10_000, progress=False, y=y)


def posteriors(classifier, x, nfe=256):
    found = classifier.classify(x, nfe=nfe, error=None, progress=False)
    return found.log_posterior.double(), found.log_posterior_stderr.double()


@pytest.mark.parametrize("how", ["fitted", "loaded"])
@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_a_classifier_made_before_its_density_was_fitted_is_one_of_the_fitted_density(how, scale):
    density = density_of(fs.LogSNR(), scale)
    early = fs.DiffusionClassifier(density, BOTH)
    if how == "fitted":
        fitted(density, scale)
    else:
        density.load_state_dict(fitted(density_of(fs.LogSNR(), scale), scale).state_dict())
    x = drawn(50, 2, scale)
    found, stderr = posteriors(early, x)
    truth = torch.stack([target.log_prob(x) for target in density.model.targets], 1).log_softmax(1)
    # 200 errors of two classes, with few draws a bar: 95 % of them within 1.96 bars, and 1e-4 nats lie outside.
    assert float(((found - truth).abs() < 1.96 * stderr + 1e-4).double().mean()) > 0.9
    assert float((found - truth).abs().max()) < 0.5
    expected, _ = posteriors(fs.DiffusionClassifier(density, BOTH), x)
    assert torch.equal(found, expected)


def set_hi(schedule):
    schedule.hi = 10.0


def set_lo(schedule):
    schedule.lo = -4.0


def set_sigmas(schedule):
    schedule.sigma_min, schedule.sigma_max = 0.2, 10.0


MOVES = [
    pytest.param(lambda: fs.LogSNR(-10, 2), set_hi, id="hi grows"),
    pytest.param(lambda: fs.LogSNR(-10, 12), set_lo, id="lo shrinks"),
    pytest.param(lambda: fs.EDM(0.002, 80.0, 1.0), set_sigmas, id="sigmas shrink"),
]


@pytest.mark.parametrize(("made", "move"), MOVES)
def test_a_classifier_follows_its_schedules_ends(made, move):
    schedule, x = made(), drawn(20, 2)
    classifier = fs.DiffusionClassifier(density_of(schedule), BOTH)
    before, _ = posteriors(classifier, x)
    move(schedule)
    classifier.density.model.asked.clear()
    found, _ = posteriors(classifier, x)
    expected, _ = posteriors(fs.DiffusionClassifier(density_of(schedule), BOTH), x)
    # Nodes that grow keep their old end as an edge between two bins, of the same density to rounding.
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    assert float((found - before).abs().max()) > 1e-3
    assert_inside(schedule, classifier.density.model.asked)


def assert_inside(schedule, asked):
    lowest, highest = sorted(schedule.time_range)
    assert lowest - 1e-6 * abs(lowest) <= min(asked)  # times are float32
    assert max(asked) <= highest + 1e-6 * abs(highest)


def test_fitted_nodes_are_cut_and_come_back():
    schedule, x = fs.EDM(0.002, 80.0, 1.0), drawn(20, 2)
    classifier = fs.DiffusionClassifier(density_of(schedule), BOTH)
    classifier.fit(drawn(30, 3), progress=False)
    before, _ = posteriors(classifier, x)
    set_sigmas(schedule)
    classifier.density.model.asked.clear()
    posteriors(classifier, x)
    assert_inside(schedule, classifier.density.model.asked)
    schedule.sigma_min, schedule.sigma_max = 0.002, 80.0
    again, _ = posteriors(classifier, x)
    assert torch.equal(again, before)


def test_a_fit_after_a_move_asks_the_network_inside_of_its_range():
    schedule = fs.EDM(0.002, 80.0, 1.0)
    classifier = fs.DiffusionClassifier(density_of(schedule), BOTH)
    set_sigmas(schedule)
    classifier.fit(drawn(30, 3), progress=False)
    assert_inside(schedule, classifier.density.model.asked)
    # Within a hundredth of a unit two ends are one.
    assert classifier.nodes.log_snr_range == pytest.approx(schedule.log_snr_range, abs=0.01)


@pytest.mark.parametrize("order", ["made, loaded", "loaded, made"])
def test_a_state_dict_of_a_wider_schedules_density_asks_nothing_outside(order):
    narrow, x = fs.EDM(0.02, 20.0, 1.0), drawn(20, 2)
    density, wide = density_of(narrow), density_of(fs.EDM(0.002, 80.0, 1.0))
    state = fitted(wide, 1.0).state_dict()
    if order == "made, loaded":
        classifier = fs.DiffusionClassifier(density, BOTH)
        density.load_state_dict(state)
    else:
        density.load_state_dict(state)
        classifier = fs.DiffusionClassifier(density, BOTH)
    posteriors(classifier, x)
    assert_inside(narrow, density.model.asked)


def test_a_loaded_classifier_keeps_to_its_own_schedule():
    wide, narrow = fs.EDM(0.002, 80.0, 1.0), fs.EDM(0.02, 20.0, 1.0)
    classifiers = [fs.DiffusionClassifier(density_of(schedule), BOTH) for schedule in (wide, narrow)]
    classifiers[0].fit(drawn(30, 3), progress=False)
    classifiers[1].load_state_dict(classifiers[0].state_dict())
    posteriors(classifiers[1], drawn(20, 2))
    assert_inside(narrow, classifiers[1].density.model.asked)


def test_nodes_of_which_nothing_is_left_are_even_pairs():
    schedule, x = fs.LogSNR(-10, -2), drawn(20, 2)
    classifier = fs.DiffusionClassifier(density_of(schedule), BOTH)
    schedule.time_range = (8.0, -1.0)
    found, _ = posteriors(classifier, x)
    expected, _ = posteriors(fs.DiffusionClassifier(density_of(schedule), BOTH), x)
    assert torch.equal(found, expected)


def test_a_range_that_does_not_go_up_is_refused():
    """All noise of this network hides data as small as these."""
    density = density_of(fs.EDM(2.0, 80.0, 1.0))
    classifier = fs.DiffusionClassifier(density, BOTH)
    density.reference = fs.Reference.isotropic(1e-5)
    with pytest.raises(ValueError, match=r"must go up from the noisy end to the clean one, got \(9.0.*scale the data"):
        classifier.classify(drawn(4, 2), nfe=32, error=None)
