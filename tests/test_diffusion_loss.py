"""The loss of a continuous token: a MAR head with a condition per token, beside the formula in plain torch."""

import math

import pytest
import real_networks as nets
import torch
from torch import nn

import fastscore as fs

pytestmark = pytest.mark.usefixtures("one_thread")

D, K, SCHEDULE = 5, 7, fs.DDPM.cosine(1000)


def head(seed=0):
    """A MAR head whose gates and outputs are not small."""
    torch.manual_seed(seed)
    return nets.MARHead(D, 24, 2, K).double()


def tokens(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, n, dtype=torch.float64, generator=generator) for n in (D, K))


def recorded(net):
    """Return a list that gets (x_t, t, z) of every call of the head."""
    calls = []
    net.register_forward_pre_hook(lambda module, args, kwargs: calls.append((*args, kwargs["c"])), with_kwargs=True)
    return calls


def cells(t):
    """Return the weights of timesteps where each stands for all nearer to it than to another."""
    entry, which, count = t.unique(return_inverse=True, return_counts=True)
    log_snr = SCHEDULE.table[entry]
    ends = SCHEDULE.table[:1], (log_snr[1:] + log_snr[:-1]) / 2, SCHEDULE.table[-1:]
    return (-torch.cat(ends).diff() / count)[which]


def inclusions(t):
    """Return the weights of timesteps that were drawn systematically, in proportion to their cells."""
    table = SCHEDULE.table  # falls with the timestep
    cell = -torch.cat([table[:1], (table[1:] + table[:-1]) / 2, table[-1:]]).diff()
    # Entries are drawn in proportion to their cells: those that are drawn in any case share theirs among their draws,
    # all other draws stand for equal parts of what the others cover.
    hits = torch.zeros_like(cell).index_add_(0, t, torch.ones(len(t), dtype=torch.float64))
    certain = len(t) * cell / cell.sum() >= 1
    others = cell[~certain].sum() / hits[~certain].sum()
    return torch.where(certain, cell / hits, others)[t]


def plain_log_prob(net, x, x_t, t, z, weights):
    """The formula written out, for x (D,), its noised rows (S, D) at timesteps t (S,), and its condition (K,)."""
    weight = weights(t)
    alpha, sigma = torch.sigmoid(SCHEDULE.table[t]).sqrt()[:, None], torch.sigmoid(-SCHEDULE.table[t]).sqrt()[:, None]
    eps = (x_t - alpha * x) / sigma
    eps_hat = net(x_t, t, c=z.expand(len(t), K))[:, :D]
    eps_q = sigma * x_t  # of N(0, 1), which also stands for what the table leaves out
    f = (eps - eps_hat).square().sum(1) - (eps - eps_q).square().sum(1)
    return -0.5 * D * math.log(2 * math.pi) - 0.5 * x.square().sum() - 0.5 * weight @ f


def test_log_prob_of_every_token_is_the_plain_formula():
    """On the rows that the head was called with, token by token."""
    net, (x, z) = head(), tokens(2, 4)
    calls = recorded(net)
    with torch.no_grad():
        found = fs.DiffusionLoss(net, predicts="eps", program=False).log_prob(x, z, nfe=200)
        rows = [torch.cat(part) for part in zip(*calls[-1:])]
        assert found.shape == (2, 4)
        assert len(rows[0]) == 8 * 200  # all tokens in one call
        expected = []
        for i in range(8):
            own = slice(200 * i, 200 * (i + 1))
            assert torch.equal(rows[2][own], z.reshape(8, K)[i].expand(200, K))
            expected.append(
                plain_log_prob(net, x.reshape(8, D)[i], rows[0][own], rows[1][own], z.reshape(8, K)[i], inclusions)
            )
    difference = (found.flatten() - torch.stack(expected)).abs() / found.flatten().abs()
    print(f"largest relative difference of 8 tokens: {float(difference.max()):.1e}")
    # float64, and eps read off x_t with an error of 1e-16 over the smallest sigma of 0.006.
    assert float(difference.max()) < 1e-9


def test_log_prob_agrees_with_the_plain_formula_on_other_noise():
    """Once at every timestep of the table, sixteen times."""
    net, (x, z) = head(), tokens(6)
    generator, t = torch.Generator().manual_seed(3), torch.arange(1000)
    bar = torch.sigmoid(SCHEDULE.table)[:, None]
    plain = torch.empty(16, 6, dtype=torch.float64)
    with torch.no_grad():
        for repeat in range(16):
            for i in range(6):
                eps = torch.randn(1000, D, dtype=torch.float64, generator=generator)
                x_t = bar.sqrt() * x[i] + (1 - bar).sqrt() * eps
                plain[repeat, i] = plain_log_prob(net, x[i], x_t, t, z[i], cells)
    found = fs.DiffusionLoss(net, predicts="eps", program=False).estimate(x, z, nfe=4000)
    error = (found.stderr**2 + plain.var(0) / 16).sqrt()
    # 4 standard errors, and half of one more because 16 repetitions know theirs to 18 %.
    assert bool(((found.log_prob - plain.mean(0)).abs() < 4.5 * error).all())


def test_tokens_together_are_tokens_alone():
    net, (x, z) = head(), tokens(6)
    loss = fs.DiffusionLoss(net, predicts="eps", nfe=32)
    with torch.no_grad():
        together, other = loss.log_prob(x, z), loss.log_prob(x, z.roll(1, 0))
        alone = [loss.log_prob(x[i : i + 1], z[i : i + 1], sample_index=torch.tensor([i])) for i in range(6)]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-9)
    assert float((other - together).abs().min()) > 0.1  # the condition is the token's own


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_fused_pass_gives_the_same(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    net, (x, z) = head().float(), (v.float() for v in tokens(4))
    text = fs.explain(net, (D,), SCHEDULE, c=z)
    assert text.startswith("row program of MARHead")
    module = fs.DiffusionLoss(net, predicts="eps", nfe=16, program=False)
    fused = fs.DiffusionLoss(net, predicts="eps", nfe=16, program=True, backend=backend)
    with torch.no_grad():
        # Sums over 16 draws of float32 squares.
        assert torch.allclose(fused.log_prob(x, z), module.log_prob(x, z), rtol=1e-4, atol=1e-3)


def test_the_gradient_is_that_of_the_plain_formula():
    """On the very rows that the head was called with, the noise read off them."""
    net, (x, z) = head(), tokens(16)
    z.requires_grad_()
    calls = recorded(net)
    loss = fs.DiffusionLoss(net, predicts="eps", draws=4)
    parameters = [*net.parameters(), z]
    found = torch.autograd.grad(loss(x, z, seed=3), parameters)
    assert len(calls) == 1  # all tokens and draws in one call
    x_t, t, c = calls[0]
    assert len(x_t) == 4 * 16
    bar = torch.sigmoid(SCHEDULE.table)[t][:, None]
    eps = (x_t - bar.sqrt() * x.repeat(4, 1)) / (1 - bar).sqrt()
    assert torch.equal(c, z.repeat(4, 1))
    lo, hi = SCHEDULE.log_snr_range
    residual = (eps - net(x_t, t, c=z.repeat(4, 1))[:, :D]).square().sum(1)
    expected = torch.autograd.grad(0.5 * (hi - lo) * residual.mean(), parameters)
    for a, b in zip(found, expected):
        # float64, and eps read off x_t with an error of 1e-16 over the smallest sigma of 0.006.
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def test_the_loss_is_an_unbiased_estimate_for_every_token():
    net, (x, z) = head(), tokens(8)
    loss = fs.DiffusionLoss(net, predicts="eps")
    with torch.no_grad():
        losses = torch.stack([loss(x, z, seed=s, reduction="none") for s in range(300)])
        exact = -loss.log_prob(x, z, nfe=8000)
    error = losses.std(0) / 300**0.5
    assert bool(((losses.mean(0) - exact).abs() < 4 * error).all())
    with torch.no_grad():
        scalar, each = (fs.DiffusionLoss(net, predicts="eps")(x, z, seed=5, reduction=r) for r in ("mean", "none"))
    assert float(scalar) == pytest.approx(float(each.mean()), rel=1e-9)


def test_a_mask_chooses_tokens():
    net, (x, z) = head(), tokens(2, 3)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    first, second = fs.DiffusionLoss(net, predicts="eps"), fs.DiffusionLoss(net, predicts="eps")
    assert torch.equal(first(x, z, seed=0, mask=mask), second(x[mask], z[mask], seed=0))
    with pytest.raises(ValueError, match=r"at least one token and of shape \(2, 3\), got 0 True in \(2, 3\)"):
        first(x, z, seed=0, mask=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got \(2, 3, 5\) and \(2, 7\)"):
        first(x, z[:, 0], seed=0)


def test_training_with_it_learns_a_density_that_depends_on_the_condition():
    """Tokens N(m(z), 0.5^2): the head has to find the mean that the condition says."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

        def forward(self, x_t, t, label):
            log_snr = schedule.log_snr(t).to(x_t)[:, None]
            features = torch.cat([x_t, label, log_snr / 8, torch.sigmoid(log_snr)], 1)
            sigma = torch.sigmoid(-log_snr).sqrt()
            return sigma * x_t - (1 - sigma**2).sqrt() * self.net(features)

    schedule = fs.DDPM(torch.sigmoid(torch.linspace(6, -6, 200, dtype=torch.float64)))
    torch.manual_seed(0)
    loss = fs.DiffusionLoss(Small(), schedule, predicts="eps", condition="label")
    optimizer = torch.optim.Adam(loss.parameters(), 3e-3)
    for step in range(300):
        z = torch.randn(128, 1)
        x = z.sin() + 0.5 * torch.randn(128, 1)
        optimizer.zero_grad()
        loss(x, z, seed=step).backward()
        optimizer.step()
    z = torch.randn(400, 1)
    x = z.sin() + 0.5 * torch.randn(400, 1)
    exact = torch.distributions.Normal(z.sin(), 0.5).log_prob(x)[:, 0]
    found = loss.log_prob(x, z, nfe=64, seed=1)
    # What 300 steps leave of the 0.3 to 0.6 nats that ignoring the condition costs.
    assert abs(float((found - exact).mean().detach())) < 0.1
    assert float(found.mean() - loss.log_prob(x, z.roll(1, 0), nfe=64, seed=1).mean()) > 0.5


def test_a_mask_leaves_the_other_tokens_what_they_are():
    loss = fs.DiffusionLoss(head(), schedule=SCHEDULE, predicts="eps")
    x, z = tokens(3, 4)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 0, 1]]).bool()
    own, every = loss.log_prob(x, z, mask=mask, nfe=32), loss.log_prob(x, z, nfe=32)
    # The same noise, summed in other chunks.
    torch.testing.assert_close(own, torch.where(mask, every, 0), rtol=1e-10, atol=1e-10)
    found = loss.estimate(x, z, mask=mask, nfe=32, progress=False)
    torch.testing.assert_close(found.log_prob, every[mask], rtol=1e-10, atol=1e-10)
    for call in (loss.log_prob, loss.estimate):
        with pytest.raises(ValueError, match=r"mask must be True for at least one token and of shape \(3, 4\)"):
            call(x, z, mask=mask[:2])
