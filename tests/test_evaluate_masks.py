"""Data sets with masks: the numbers of one masked estimate, however they are cut, interrupted, shared or stored."""

import math
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fastscore as fs
from fastscore.runs.evaluate import Interrupted, evaluate_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

N, LENGTH, WIDTH = 30, 4, 3
OPTIONS = {"nfe": 16, "seed": 3, "batch": 8}
X = torch.randn(N, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
THERE = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (N, 1), generator=torch.Generator().manual_seed(1))
MASK = THERE[..., None].expand(X.shape)


class Net(nn.Module):
    """A network that does not look at padding; it presses Ctrl-C after a number of calls."""

    def __init__(self, calls=10**9):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.eye(WIDTH) / 2), calls

    def forward(self, x, t):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return torch.tanh(x @ self.weight) + 0.1 * t[:, None, None]


def density(**options):
    return fs.ScoreDensity(Net(**options), fs.VP(), "eps", program=False)


def whole(mask=MASK, **options):
    return density().estimate(X, nfe=16, seed=3, mask=mask, **options)


FORMS = {
    "places": THERE,
    "column": THERE[..., None],
    "entries": MASK,
    "numbers": THERE.float(),
    "numpy": THERE.numpy(),
    "bytes": THERE.numpy().astype(">i2"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_mask_of_one_estimate(form, tmp_path):
    found, expected = evaluate_dataset(density(), X, tmp_path / "r.npz", mask=FORMS[form], **OPTIONS), whole()
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=1e-5, atol=1e-4)  # float32, in other batches
    assert torch.equal(found.dims, expected.dims)
    assert torch.equal(found.dims, WIDTH * THERE.sum(1))
    stored = np.load(tmp_path / "r.npz")
    assert stored["dims"].tolist() == expected.dims.tolist()


def test_bits_are_by_each_samples_own_number_of_entries(tmp_path):
    found = evaluate_dataset(density(), X, tmp_path / "r.npz", mask=THERE, bins=256, low=-4, high=4, **OPTIONS)
    bits = torch.from_numpy(np.load(tmp_path / "r.npz")["bits_per_dim"])
    expected = -(found.log_prob / (WIDTH * THERE.sum(1)) + math.log(8 / 256)) / math.log(2)
    torch.testing.assert_close(bits, expected)


@pytest.mark.parametrize("mask", [THERE[0], MASK[0], MASK[:1], torch.tensor([1, 0, 1])], ids=lambda m: str(m.shape))
def test_a_mask_that_all_share(mask, tmp_path):
    own = mask[:, None] if mask.shape == (LENGTH,) else mask
    if mask.shape == (LENGTH,):  # of places without their width: it fits nothing
        with pytest.raises(ValueError, match=r"mask must broadcast to data \(30, 4, 3\), got \(4,\)"):
            evaluate_dataset(density(), X, tmp_path / "r.npz", mask=mask, **OPTIONS)
    found = evaluate_dataset(density(), X, tmp_path / "r.npz", mask=own, **OPTIONS)
    expected = whole(own if own.ndim == 3 else own[None].expand(X.shape) if own.ndim == 2 else own)
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=1e-5, atol=1e-4)
    assert torch.equal(found.dims, expected.dims)


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_batch_order_and_indices_change_nothing(batch, tmp_path):
    options = OPTIONS | {"batch": batch}
    found, expected = evaluate_dataset(density(), X, tmp_path / "r.npz", mask=THERE, **options), whole()
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=1e-5, atol=1e-4)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))[:11]
    part = evaluate_dataset(density(), X, tmp_path / "p.npz", mask=THERE, indices=order.tolist(), **options)
    torch.testing.assert_close(part.log_prob, expected.log_prob[order], rtol=1e-5, atol=1e-4)
    assert torch.equal(part.dims, expected.dims[order])


def test_a_resumed_run_is_the_same_to_the_byte_and_another_mask_is_refused(tmp_path):
    evaluate_dataset(density(), X, tmp_path / "whole.npz", mask=THERE, **OPTIONS)
    with pytest.raises(Interrupted, match="blocks are kept"):
        evaluate_dataset(density(calls=10), X, tmp_path / "r.npz", mask=THERE, **OPTIONS)
    other = THERE.clone()
    other[3] = True
    for wrong in (other, None, MASK[:1]):
        with pytest.raises(ValueError, match=r"finished blocks of another run: mask is \w+ there and \w+ here\. Give"):
            evaluate_dataset(density(), X, tmp_path / "r.npz", mask=wrong, **OPTIONS)
    with pytest.raises(ValueError, match=r"another run: batch is \d+ there and 3 here\. Give"):
        evaluate_dataset(density(), X, tmp_path / "r.npz", mask=THERE, **OPTIONS | {"batch": 3})
    evaluate_dataset(density(), X, tmp_path / "r.npz", mask=MASK[..., :1].numpy(), progress=False, **OPTIONS)
    assert (tmp_path / "r.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_the_fit_has_a_mask_of_its_own(tmp_path):
    data = torch.randn(60, LENGTH, WIDTH, generator=torch.Generator().manual_seed(5))
    counted = torch.arange(LENGTH) < torch.arange(60)[:, None] % LENGTH + 1
    own = density().fit(data, mask=counted[..., None], seed=3)
    options = {"mask": THERE, "fit": data, "fit_mask": counted}
    found = evaluate_dataset(density(), X, tmp_path / "r.npz", **options, **OPTIONS)
    expected = own.estimate(X, mask=THERE[..., None], nfe=16, seed=3)
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match=r"mask for each sample and the fit data none; give fit_mask \(--fit-mask\)"):
        evaluate_dataset(density(), X, tmp_path / "s.npz", mask=THERE, fit=data, **OPTIONS)
    shared = torch.tensor([1, 0, 1])
    found = evaluate_dataset(density(), X, tmp_path / "s.npz", mask=shared, fit=data, **OPTIONS)
    expected = density().fit(data, mask=shared, seed=3).estimate(X, mask=shared, nfe=16, seed=3)
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=1e-5, atol=1e-4)


SQUARE = torch.zeros(3, 3, 3)


@pytest.mark.parametrize(
    ("data", "mask", "sentence"),
    [
        (X, THERE[:7], r"mask must broadcast to data \(30, 4, 3\), got \(7, 4\).*places count"),
        (SQUARE, torch.ones(3, 3), r"mask \(3, 3\) fits data \(3, 3, 3\) in two ways"),
        (X, THERE * 2, "mask must be True .or 1. where an entry counts"),
        (X, THERE & (torch.arange(N) != 5)[:, None], "at least one entry of every sample, got none in sample 5"),
        (X, torch.zeros(WIDTH), "at least one entry of every sample, got none"),
        (X, [True], "mask must be an array of True and False .or 1 and 0., got list"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_before_the_work(data, mask, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        evaluate_dataset(density(), data, tmp_path / "r.npz", mask=mask, **OPTIONS)
    assert not list(tmp_path.glob("r.npz.partial/block*"))


def test_the_command_line_takes_masks(tmp_path, monkeypatch):
    from fastscore.cli.commands import main

    (tmp_path / "padded_net.py").write_text("import test_evaluate_masks as t\ndef make():\n    return t.density()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "test_evaluate_masks", sys.modules[__name__])
    np.save("x.npy", X.numpy())
    np.savez("there.npz", places=THERE.numpy(), numbers=THERE.numpy().astype("uint8"))
    words = (
        "evaluate padded_net:make x.npy --mask there.npz:numbers --out o.npz --nfe 16 --seed 3 --device cpu --bins 256"
    )
    done = CliRunner().invoke(main, words.split())
    assert done.exit_code == 0, done.output
    stored, expected = np.load("o.npz"), whole()
    torch.testing.assert_close(torch.from_numpy(stored["log_prob"]), expected.log_prob, rtol=1e-5, atol=1e-4)
    assert "dims            3 to 12" in done.output
    mean = float(expected.bits_per_dim(256).mean())
    assert f"bits/dim        {mean:.4f}"[:20] in done.output
    words = "evaluate padded_net:make x.npy --fit x.npy --fit-mask there.npz:places --mask there.npz:places --out f.npz"
    done = CliRunner().invoke(main, (words + " --nfe 16 --device cpu").split())
    assert done.exit_code == 0, done.output
