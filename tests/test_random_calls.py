"""Thousands of random calls: every answer is finite and has its shape, and no company of a sample changes it."""

import math
import random
from functools import lru_cache

import pytest
import torch
from torch import nn

import fastscore as fs

CALLS, SHARES = 1000, 4
SCHEDULES = {
    "VP": fs.VP,
    "VE": lambda: fs.VE(0.01, 50),
    "EDM": fs.EDM,
    "cosine": fs.Cosine,
    "flow": fs.FlowMatching,
    "table": lambda: fs.DDPM.linear(200),
    "cosine table": lambda: fs.DDPM.cosine(100),
}
SHAPES = ((1,), (3,), (2, 2, 2), (17,))


class Net(nn.Module):
    """A smooth network with a condition for each sample and one for all."""

    def __init__(self, shape):
        super().__init__()
        d = math.prod(shape)
        self.layer = nn.Linear(d, d)
        nn.init.normal_(self.layer.weight, std=0.3 / d**0.5, generator=torch.Generator().manual_seed(d))

    def forward(self, x, t, y=None, gain=1.0):
        out = torch.tanh(self.layer(x.flatten(1))).reshape(x.shape) * gain
        return out if y is None else out + 0.1 * y.reshape(-1, *[1] * (x.ndim - 1)).to(x)


@lru_cache
def density(schedule, shape, fitted, dtype):
    net = Net(shape).to(dtype).eval()
    made = fs.ScoreDensity(net, SCHEDULES[schedule](), "eps", program=False)
    if not fitted:
        return made
    data = torch.randn(200, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return made.fit(data, evaluations=fitted, progress=False)


def data(choose, count, shape, dtype):
    generator = torch.Generator().manual_seed(choose.getrandbits(40))
    x = torch.randn(count, *shape, generator=generator, dtype=dtype) * choose.choice([0, 1e-6, 0.1, 1, 1, 1, 30, 1e4])
    if choose.random() < 0.2:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)  # of other strides
    return x.expand(count, *shape)


def options(choose, x):
    """Draw the keyword arguments of an estimate."""
    count = len(x)
    given = {"nfe": choose.choice([8, 9, 16, 31, 64]), "seed": choose.choice([0, 1, 2**31, 2**63 + 5, -3])}
    if choose.random() < 0.3:
        given["method"] = choose.choice(["discrete", "elbo", "density"])
    if choose.random() < 0.3:
        given["sample_index"] = torch.tensor([choose.randrange(10**9) for _ in range(count)])
    if choose.random() < 0.2:
        given["memory"] = choose.choice(["200KB", "3MB", 10**6])
    if choose.random() < 0.15:
        given |= {"target_stderr": 10.0 ** choose.randint(-2, 2), "max_nfe": choose.choice([64, 100])}
    if choose.random() < 0.3:
        given["y"] = fs.per_sample(torch.arange(count, dtype=x.dtype))
    if choose.random() < 0.2:
        given["gain"] = choose.choice([0.5, torch.tensor(0.5, dtype=x.dtype)])
    if choose.random() < 0.2:
        mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(choose.getrandbits(40))) < 0.7
        mask.reshape(count, -1)[:, 0] = True
        given["mask"] = mask
    return given


def part(given, chosen, count):
    """Return the same keyword arguments for some of the samples."""
    index = given.get("sample_index", torch.arange(count))
    found = given | {"sample_index": index[chosen]}
    if "y" in given:
        found["y"] = fs.per_sample(given["y"].value[chosen])
    if "mask" in given:
        found["mask"] = given["mask"][chosen]
    return found


@pytest.mark.slow
# A random network reaches few errors, and explains no data and no noise; any other warning is a failure.
@pytest.mark.filterwarnings(
    "error",
    "ignore:.*above target_stderr",
    "ignore:on these data the network",
    "ignore:at the (noisiest|least noisy) time the noise",
    "ignore:most samples are",
    "ignore:fit has fitted nothing but the reference",
)
@pytest.mark.parametrize("share", [0, 1, *(pytest.param(i, marks=pytest.mark.long) for i in range(2, SHARES))])
def test_random_calls(share, one_thread):
    choose = random.Random(share)
    done = 0
    while done < CALLS // SHARES:
        shape, dtype = choose.choice(SHAPES), choose.choice([torch.float32, torch.float64])
        fitted = choose.choice([0, 0, 1000, 30_000 if shape == (3,) else 1000])
        made = density(choose.choice(list(SCHEDULES)), shape, fitted, dtype)
        x = data(choose, choose.choice([1, 2, 7, 70]), shape, dtype)
        given = options(choose, x)
        if "method" in given and given["method"] != "density" and not made.schedule.discrete:
            del given["method"]  # sums over a table's entries
        if "mask" in given and made.reference.full:
            del given["mask"]  # refused, see test_masks.py
        said = {"share": share, "call": done, "schedule": made.schedule, "x": x.shape, "fit": fitted} | given
        found = made.estimate(x, **given)
        for value in (found.log_prob, found.stderr, found.truncation_per_sample):
            assert value.shape == (len(x),), said
            assert torch.isfinite(value).all(), said
        assert found.log_prob.dtype == found.stderr.dtype == dtype, said
        assert (found.stderr > 0).all(), said
        assert (found.nfe <= given.get("max_nfe", given["nfe"])).all(), said
        done += 1
        if choose.random() < 0.2 and "target_stderr" not in given:
            chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(done))[: 1 + len(x) // 2]
            alone = made.estimate(x[chosen], **part(given, chosen, len(x)))
            rtol, size = (1e-4 if dtype == torch.float32 else 1e-9), x.flatten(1).square().sum(1)[chosen] + 100
            # Sums of terms as large as the squares of the data; matrices of another height are multiplied otherwise.
            gap = (alone.log_prob - found.log_prob[chosen]).abs()
            assert (gap <= rtol * (size + found.log_prob[chosen].abs())).all(), (said, gap)
            done += 1
