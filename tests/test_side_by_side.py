"""Groups of samples have nodes of their own, and a network that runs itself is still called once for all of them."""

import re

import pytest
import torch
from analytic import ExactNet, mixture
from torch import nn

import fastscore as fs
from fastscore.estimator.plan import Plan

TARGET = mixture(3)
COUNT = 150
INDEX = torch.arange(COUNT) * 23  # runs of 64 indices share their nodes: all sixteen groups are there
X = TARGET.sample(COUNT, seed=0)
MASK = torch.arange(3) < 1 + torch.arange(COUNT)[:, None] % 3


class Moved(nn.Module):
    """An exact network of data that each sample's own label moves; rows and calls are counted."""

    def __init__(self, schedule):
        super().__init__()
        self.exact, self.schedule, self.rows = ExactNet(TARGET, schedule), schedule, []

    def forward(self, x, t, by=None):
        self.rows.append(len(x))
        alpha, _ = self.schedule.alpha_sigma(t)
        return self.exact(x if by is None else x - alpha.to(x)[:, None] * by[:, None], t)


def density(schedule, fitted=False, **options):
    made = fs.ScoreDensity(Moved(schedule), schedule, "eps", program=False, **options)
    return made.fit(TARGET.sample(300, seed=1), evaluations=8000, progress=False) if fitted else made


def pieces(found):
    return {name: getattr(found, name) for name in ("log_prob", "stderr", "truncation_per_sample", "jump")}


CALLS = {
    "estimate": lambda d: pieces(d.estimate(X, nfe=20, sample_index=INDEX)),
    "labels": lambda d: pieces(d.estimate(X, nfe=20, sample_index=INDEX, by=torch.arange(COUNT) / COUNT)),
    "mask": lambda d: pieces(d.estimate(X, nfe=20, sample_index=INDEX, mask=MASK)),
    "log_prob": lambda d: {"log_prob": d.log_prob(X, nfe=20, sample_index=INDEX)},
    "compare": lambda d: {
        "difference": d.compare(
            X, {"by": torch.zeros(COUNT)}, {"by": torch.ones(COUNT)}, nfe=20, sample_index=INDEX
        ).difference
    },
    "float32": lambda d: pieces(d.estimate(X.float(), nfe=20, sample_index=INDEX)),
}


@pytest.mark.parametrize("fitted", [False, True], ids=["", "fitted"])
@pytest.mark.parametrize("schedule", [fs.VP(), fs.DDPM.linear(100)], ids=["VP", "table"])
@pytest.mark.parametrize("call", CALLS)
def test_the_numbers_are_those_of_group_after_group(call, schedule, fitted, monkeypatch):
    made = density(schedule, fitted)
    with torch.no_grad():
        found = CALLS[call](made)
        monkeypatch.setattr(Plan, "_side_by_side", lambda *_: None)
        expected = CALLS[call](made)
    rounding = 1e-4 if call == "float32" else 1e-9  # of sums in another order
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rounding, atol=rounding, msg=lambda m, n=name: f"{n}: {m}")


def test_the_network_is_called_once():
    made = density(fs.VP())
    made.estimate(X, nfe=20, sample_index=INDEX)  # asks what it is asked once
    made.model.rows.clear()
    made.estimate(X, nfe=20, seed=1, sample_index=INDEX)
    assert made.model.rows == [20 * COUNT]


def test_what_does_not_fit_goes_group_after_group():
    made = density(fs.VP())
    expected = made.estimate(X, nfe=20, sample_index=INDEX).log_prob
    made.model.rows.clear()
    found = made.estimate(X, nfe=20, sample_index=INDEX, memory=200_000).log_prob
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)  # float64, other sums
    assert max(made.model.rows) < 20 * COUNT


def test_nan_names_its_sample_and_the_time_of_its_own_group():
    class Broken(Moved):
        def forward(self, x, t, by):
            answer = super().forward(x, t)
            return torch.where(((by > 0) & (t > 0.5))[:, None], torch.nan, answer)

    made = fs.ScoreDensity(Broken(fs.VP()), fs.VP(), "eps", program=False)
    bad = torch.zeros(COUNT)
    bad[77] = 1.0
    with pytest.raises(ValueError, match=rf"NaN or inf for sample {77 * 23} at log-SNR") as raised:
        made.estimate(X, nfe=20, sample_index=INDEX, by=fs.per_sample(bad))
    log_snr, t = (float(value) for value in re.search(r"log-SNR (\S+) \(t = (\S+?)\)", str(raised.value)).groups())
    assert t > 0.5
    assert float(fs.VP().log_snr(torch.tensor(t))) == pytest.approx(log_snr, rel=1e-3)  # four digits are printed
