"""What a network's answer may depend on is asked once: no alarm for honest ones, one sentence for each other kind."""

import math
import warnings

import pytest
import torch
from program_networks import NETWORKS
from torch import nn

import fastscore as fs
from fastscore.estimator.plausible import NUMBERS
from fastscore.estimator.probe import COPIES, MOST_NUMBERS, MOST_ROWS, NetworkWarning
from fastscore.estimator.resolution import ROWS

SCHEDULE = fs.VP()


class Net(nn.Module):
    """A small network of x, t and a label, some function of whose inputs is wrong."""

    def __init__(self, wrong=None):
        super().__init__()
        self.first, self.last, self.label = nn.Linear(4, 16), nn.Linear(16, 3), nn.Embedding(11, 16)
        self.norm, self.wrong, self.rows = nn.BatchNorm1d(16), wrong, []
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x, t, y=None):
        self.rows.append(len(x))
        if self.wrong == "first time":
            t = t[:1].expand(len(t))
        if self.wrong == "largest time":
            t = t.max().expand(len(t))
        if self.wrong == "smallest time":
            t = t.min().expand(len(t))
        if self.wrong == "first label" and y is not None:
            y = y[:1].expand(len(y))
        if self.wrong == "label dropout" and y is not None:
            y = torch.where(torch.rand(len(y)) < 0.1, 10, y)
        if self.wrong == "centred batch":
            x = x - x.mean(0)
        h = self.first(torch.cat([x, t[:, None]], 1))
        if y is not None:
            h = h + 3 * self.label(y)
        if self.wrong == "all labels dropped at once" and torch.rand(()) < 0.1:
            h = self.first(torch.cat([x, t[:, None]], 1))
        if self.wrong == "batch norm":
            h = self.norm(h)
        if self.wrong == "attention over the batch":
            h = torch.softmax(0.1 * h @ h.T, 1) @ h
        if self.wrong == "a weak mean":
            h = h + 1e-3 * h.mean(0)
        if self.wrong == "a mean of three hundredths":
            h = h + 0.03 * h.mean(0)
        if self.wrong == "a weaker largest entry":
            h = h + 1e-4 * h.amax(0)
        if self.wrong == "one random shift a call":
            h = h + torch.randn((), generator=self.generator)
        return self.last(torch.tanh(h))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("first time", r"the time of the first row alone \(t\[0\]\)"),
        ("first label", r"the condition of the first row alone \(such as y\[0\]\)"),
        ("largest time", "lets the rows of a batch see each other"),
        ("smallest time", "lets the rows of a batch see each other"),
        ("label dropout", "the same row in one batch: it draws random numbers, as dropout and label dropout"),
        ("batch norm", "lets the rows of a batch see each other.*call model.eval"),
        ("attention over the batch", "lets the rows of a batch see each other"),
        ("a weak mean", "lets the rows of a batch see each other"),
        ("a weaker largest entry", "lets the rows of a batch see each other"),
        ("one random shift a call", "the same batch is evaluated again: it draws random numbers"),
    ],
)
@pytest.mark.parametrize("call", ["estimate", "log_prob", "compare", "fit"])
def test_each_kind_of_coupling_gets_its_sentence_once(wrong, said, call):
    torch.manual_seed(0)
    net, x, y = Net(wrong), torch.randn(40, 3), torch.arange(40) % 10
    net.train(wrong == "batch norm")
    density = fs.ScoreDensity(net, SCHEDULE, "eps", program=False)
    run = {
        "estimate": lambda: density.estimate(x, nfe=16, y=y),
        "log_prob": lambda: density.log_prob(x, nfe=16, y=y),
        "compare": lambda: density.compare(x, {"y": y}, {"y": y}, nfe=16),
        "fit": lambda: density.fit(x, evaluations=3000, y=y, progress=False),
    }[call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers in train mode another sentence says so
        warnings.filterwarnings("error", category=NetworkWarning)
        with pytest.raises(NetworkWarning, match=said):
            run()
        run()  # once


@pytest.mark.parametrize("wrong", ["centred batch", "largest time", "attention over the batch"])
def test_rows_that_see_each_other_are_seen_with_a_single_sample(wrong):
    torch.manual_seed(0)
    with pytest.warns(NetworkWarning, match="lets the rows of a batch see each other"):
        fs.ScoreDensity(Net(wrong), SCHEDULE, "eps", program=False).estimate(torch.randn(1, 3), nfe=8)


def test_labels_that_are_dropped_for_a_whole_call_are_called_random():
    said = []
    for seed in range(60):
        torch.manual_seed(seed)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            net = Net("all labels dropped at once")
            fs.ScoreDensity(net, SCHEDULE, "eps", program=False).estimate(torch.randn(4, 3), nfe=8, y=torch.arange(4))
        said += [str(w.message) for w in found if issubclass(w.category, NetworkWarning)]
    # One of three calls is dropped in 27 % of the trials; in 8 % of these all three are again as they were.
    assert len(said) >= 8
    random = ["the same batch is evaluated again: it draws random numbers" in text for text in said]
    assert sum(random) >= 0.75 * len(said)


def test_a_label_that_is_dropped_in_a_tenth_of_the_rows_is_seen_nearly_always():
    seen = 0
    for seed in range(60):
        torch.manual_seed(seed)
        density = fs.ScoreDensity(Net("label dropout"), SCHEDULE, "eps", program=False)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            density.estimate(torch.randn(4, 3), nfe=8, y=torch.arange(4))
        seen += any(issubclass(w.category, NetworkWarning) for w in found)
    # Of 48 rows in two batches the chance that none is dropped is 0.6 %.
    assert seen >= 57


def test_the_cost_in_forward_passes():
    net = Net().eval()
    density = fs.ScoreDensity(net, SCHEDULE, "eps", program=False)
    density.estimate(torch.randn(4, 3), nfe=8)
    first, net.rows = sum(net.rows), []
    density.estimate(torch.randn(4, 3), nfe=8)
    # Two batches of eight rows' copies, a large one and one of three; two samples' rows at the least noise, and at both
    # ends; the others measure the memory of one.
    ends = 2 * 2 * math.ceil(NUMBERS / 3)
    assert first - sum(net.rows) <= 16 * COPIES + MOST_ROWS + 3 + 2 * ROWS + ends + 24


def test_rows_of_many_numbers_are_few():
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.rows = nn.Parameter(torch.ones(())), []

        def forward(self, x, t):
            self.rows.append(len(x))
            return self.weight * x

    net = Images()
    fs.ScoreDensity(net, SCHEDULE, "eps", program=False).estimate(torch.randn(2, 3, 32, 32), nfe=8)
    assert MOST_NUMBERS // 3072 < 3  # rows, of which there are three at least
    assert max(net.rows) <= 2 * ROWS  # of two samples at the least noise


class Experts(nn.Module):
    """Two networks for two ranges of time: one number of the batch's times chooses between them for all rows."""

    def __init__(self, boundary, choose):
        super().__init__()
        self.net, self.boundary, self.choose = Net(), boundary, choose

    def forward(self, x, t):
        out = self.net(x, t)
        return out if bool(self.choose(t / SCHEDULE.time_range[1]) >= self.boundary) else 0.9 * out


@pytest.mark.parametrize(
    ("choose", "said"),
    [
        (lambda t: t[0], r"the time of the first row alone \(t\[0\]\)"),
        (torch.max, "one choice for all its times"),
        (torch.min, "one choice for all its times"),
        (torch.mean, "one choice for all its times"),
    ],
    ids=["first", "largest", "smallest", "mean"],
)
@pytest.mark.parametrize("boundary", [0.02, 0.1, 0.3, 0.5, 0.7, 0.875, 0.97])
def test_one_of_two_experts_for_all_rows_is_seen_wherever_their_boundary_is(boundary, choose, said):
    torch.manual_seed(0)
    with pytest.warns(NetworkWarning, match=said):
        fs.ScoreDensity(Experts(boundary, choose), SCHEDULE, "eps", program=False).estimate(torch.randn(4, 3), nfe=8)


@pytest.mark.parametrize("kind", ["capacity", "large batches"])
def test_a_limit_on_the_rows_of_a_batch_is_seen(kind):
    class Limited(Net):
        def forward(self, x, t):
            out = super().forward(x, t)
            if kind == "large batches":
                return out if len(x) < 100 else 0.9 * out
            late = (x[:, :1] > 0).cumsum(0) > 32  # what is above it goes through no expert
            return torch.where(late & (x[:, :1] > 0), 0.9 * out, out)

    torch.manual_seed(0)
    x = torch.randn(4, 3)
    with pytest.warns(NetworkWarning, match="lets the rows of a batch see each other.*or a limit on its rows"):
        fs.ScoreDensity(Limited(), SCHEDULE, "eps", program=False).estimate(x, nfe=256)


class Placed(Net):
    """Adds noise of a fixed seed: what a row gets depends on its place."""

    def forward(self, x, t):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        return super().forward(x, t) + 0.1 * noise


class Cached(Net):
    """Averages with the last answer of the same shape, as caches of features between two steps do."""

    def forward(self, x, t):
        out = super().forward(x, t)
        last = getattr(self, "last_answer", None)
        if last is not None and last.shape == out.shape:
            out = 0.9 * out + 0.1 * last
        self.__dict__["last_answer"] = out.detach()
        return out


@pytest.mark.parametrize(
    ("make", "said", "unsaid"),
    [
        (Placed, "at two places of one batch, and the same when that is evaluated again: .*the row's place", "random"),
        (Cached, "evaluated again: it draws random numbers.*or it keeps something from call to call", "places"),
    ],
)
def test_a_network_that_draws_nothing_is_not_said_to(make, said, unsaid):
    torch.manual_seed(0)
    with pytest.warns(NetworkWarning, match=said) as found:
        fs.ScoreDensity(make(), SCHEDULE, "eps", program=False).estimate(torch.randn(4, 3), nfe=8)
    assert not any(unsaid in str(w.message) for w in found if issubclass(w.category, NetworkWarning))


def test_an_error_of_a_probe_speaks_of_the_conditions_as_given():
    density = fs.ScoreDensity(Net(), SCHEDULE, "eps", program=False)
    y = torch.tensor([0, 1, 2, 1, 0, 11])  # of eleven labels
    with pytest.raises(ValueError, match=r"conditions y \(\) a sample: IndexError"):
        density.estimate(torch.randn(6, 3), nfe=8, y=y)


@pytest.mark.parametrize(
    ("wrong", "dtype"), [("a mean of three hundredths", torch.bfloat16), ("a weak mean", torch.float64)]
)
def test_a_weak_coupling_is_seen_in_every_dtype(wrong, dtype):
    """As far as the dtype holds it: bfloat16 has three digits."""
    torch.manual_seed(0)
    net = Net(wrong).to(dtype)
    with pytest.warns(NetworkWarning, match="lets the rows of a batch see each other"):
        fs.ScoreDensity(net, SCHEDULE, "eps", program=False, time_dtype=dtype).estimate(torch.randn(4, 3), nfe=8)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_alarm_for_real_networks_in_bfloat16(name):
    make, shape, own, shared = NETWORKS[name]
    torch.manual_seed(0)
    net, schedule = make().eval().bfloat16(), fs.EDM() if "EDM" in name else SCHEDULE

    def cast(value):
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.bfloat16() if floats else value

    cond = {k: fs.per_sample(cast(f(4))) for k, f in own.items()} | {
        k: fs.shared(cast(f(1))) for k, f in shared.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=NetworkWarning)
        density = fs.ScoreDensity(net, schedule, "eps", program=False, time_dtype=torch.bfloat16)
        density.estimate(torch.randn(4, *shape), nfe=8, **cond)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_alarm_for_real_networks(name):
    make, shape, own, shared = NETWORKS[name]
    torch.manual_seed(0)
    net, schedule = make().eval(), fs.EDM() if "EDM" in name else SCHEDULE
    cond = {k: fs.per_sample(f(4)) for k, f in own.items()} | {k: fs.shared(f(1)) for k, f in shared.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=NetworkWarning)
        fs.ScoreDensity(net, schedule, "eps", program=False).estimate(torch.randn(4, *shape), nfe=8, **cond)


def test_random_numbers_of_the_caller_are_left_alone():
    net = Net("label dropout")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with pytest.warns(NetworkWarning):
        fs.ScoreDensity(net, SCHEDULE, "eps", program=False).estimate(torch.zeros(4, 3), nfe=8, y=torch.arange(4))
    assert torch.equal(torch.rand(4), expected)


class DropsLater(nn.Module):
    """The exact network of N(y, 1/4) that may drop the label, as lucidrains' networks do."""

    def forward(self, x, t, y=None, cond_drop_prob=0.0, mode="all"):
        alpha, sigma = (v[:, None] for v in SCHEDULE.alpha_sigma(t))
        mean = torch.zeros(len(x), 1).double() if y is None else y.double()[:, None]
        mean = torch.where(torch.rand(len(x), 1) < cond_drop_prob, -1.0, mean)
        if mode == "batch":
            mean = mean - mean.mean() + 1
        return (sigma * (x.double() - alpha * mean) / (alpha**2 / 4 + sigma**2)).to(x)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({}, {"y": torch.ones(50), "cond_drop_prob": 0.5}, "draws random numbers"),
        ({"y": torch.ones(50)}, {"y": torch.ones(50), "cond_drop_prob": 0.5}, "draws random numbers"),
        ({"cond_drop_prob": 0}, {"cond_drop_prob": 0.3}, "draws random numbers"),
        ({"cond_drop_prob": torch.tensor(0.0)}, {"cond_drop_prob": torch.tensor(0.3)}, "draws random numbers"),
        ({"mode": "all"}, {"mode": "batch", "y": torch.linspace(0, 2, 50)}, "rows of a batch see each other"),
    ],
)
def test_a_network_is_asked_again_with_other_options_and_conditions(before, after, said):
    density, x = fs.ScoreDensity(DropsLater(), SCHEDULE, "eps"), 0.5 * torch.randn(50, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NetworkWarning)
        density.estimate(x, nfe=16, **before)
        density.estimate(x, nfe=16, **before)
    with pytest.warns(NetworkWarning, match=said):
        density.estimate(x, nfe=16, **after)


def test_an_option_that_is_another_at_every_call_is_not_asked_about_for_ever():
    net = Net()
    net.forward = lambda x, t, scale: (net.rows.append(len(x)), 0.1 * scale * x)[1]
    density, x = fs.ScoreDensity(net, SCHEDULE, "eps", program=False), torch.randn(5, 3)
    for i in range(300):
        density.estimate(x, nfe=4, scale=1 + i / 1000)
    before = len(net.rows)
    density.estimate(x, nfe=4, scale=2.0)
    assert len(net.rows) == before + 1
