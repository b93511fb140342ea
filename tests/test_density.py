"""ScoreDensity: reproducible, differentiable, memory-bounded, and clear about bad input."""

import io
import warnings

import pytest
import torch
from analytic import ExactNet, mixture
from torch import nn

import fastscore as fs

TARGET = mixture(4)
SCHEDULE = fs.LogSNR(-8, 8)


class MLP(nn.Module):
    """A small conditional score network; the label shifts its input, the scale is shared by the batch."""

    def __init__(self, shape=(6,), hidden=32, extra=0, dropout=0.0):
        super().__init__()
        self.shape, d = shape, torch.Size(shape).numel()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(d + 1, hidden), nn.SiLU(), nn.Dropout(dropout), nn.Linear(hidden, d + extra))

    def forward(self, x, t, label=None, scale=None):
        flat = x.flatten(1)
        if label is not None:
            flat = flat + label.reshape(len(label), -1)
        if scale is not None:
            flat = flat * scale
        out = self.net(torch.cat([flat, t.to(flat.dtype)[:, None] / 10], 1))
        return out.reshape(len(x), -1, *self.shape[1:])


def data(count=64, shape=(6,), dtype=torch.float32):
    return torch.randn(count, *shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("noise", ["independent", "sobol"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("shape", [(6,), (2, 3, 3)])
def test_same_seed_same_answer_however_the_work_is_cut(in_chunks, shape, dtype, tolerance, noise):
    density = fs.ScoreDensity(MLP(shape).to(dtype), SCHEDULE, "eps", noise=noise)
    x, index = data(24, shape, dtype), torch.arange(24)  # in all of the 16 groups
    whole = density.estimate(x, nfe=64, seed=3)
    kept = dict(rtol=tolerance, atol=tolerance)

    one_by_one = [density.estimate(x[i : i + 1], nfe=64, seed=3, sample_index=index[i : i + 1]) for i in range(24)]
    assert torch.allclose(torch.cat([e.log_prob for e in one_by_one]), whole.log_prob, **kept)
    assert torch.allclose(torch.cat([e.stderr for e in one_by_one]), whole.stderr, **kept)

    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    shuffled = density.estimate(x[order], nfe=64, seed=3, sample_index=index[order])
    assert torch.allclose(shuffled.log_prob, whole.log_prob[order], **kept)

    for rows in (24 * 64, 41, 7):  # one chunk, some forty, and pieces of a sample
        in_chunks(rows, keep_tables=rows > 7)
        cut = density.estimate(x, nfe=64, seed=3)
        assert torch.allclose(cut.log_prob, whole.log_prob, **kept)
        assert torch.allclose(cut.stderr, whole.stderr, **kept)
    assert torch.allclose(density.log_prob(x, nfe=64, seed=3), whole.log_prob, **kept)
    other = density.estimate(x, nfe=64, seed=4)
    assert not torch.allclose(other.log_prob, whole.log_prob, rtol=1e-3)


def test_paired_draws_survive_every_cut(in_chunks):
    target = mixture(2)
    density = fs.ScoreDensity(ExactNet(target, SCHEDULE), SCHEDULE, "eps").fit(
        target.sample(500).float(), progress=False
    )
    assert bool(density.nodes.paired.any())
    x = target.sample(16, seed=1)
    whole = density.estimate(x, nfe=96)
    for rows in (5, 200):
        in_chunks(rows)
        cut = density.estimate(x, nfe=96)
        assert torch.allclose(cut.log_prob, whole.log_prob, rtol=1e-10)


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
@pytest.mark.parametrize("reference", ["isotropic", "diagonal", "mixture", "full"])
def test_gradients_match_finite_differences_with_common_noise(predicts, reference):
    target = mixture(3, components=2)
    net = ExactNet(target, SCHEDULE, predicts, gain=0.9)
    density = fs.ScoreDensity(net, SCHEDULE, predicts)
    density.reference = {
        "isotropic": fs.Reference.isotropic(1.3),
        "diagonal": fs.Reference(torch.ones(1), torch.randn(1, 3), torch.rand(1, 3) + 0.5),
        "mixture": fs.Reference(target.weight, target.mean, torch.full((2, 3), 0.2)),
        "full": fs.Reference(target.weight, target.mean, target.eigenvalue + 0.1, target.basis),
    }[reference]
    x = data(2, (3,), torch.float64).requires_grad_()

    def log_prob(x, gain):
        with torch.no_grad():
            net.gain.copy_(gain)
        return density.log_prob(x, nfe=12, seed=1)

    assert torch.autograd.gradcheck(lambda x: density.log_prob(x, nfe=12, seed=1), (x,), atol=1e-5, rtol=1e-5)
    (by_autograd,) = torch.autograd.grad(density.log_prob(x, nfe=12, seed=1).sum(), net.gain)
    h, gain = 1e-6, net.gain.detach().clone()
    ahead, behind = (float(log_prob(x, gain + sign * h).sum()) for sign in (1, -1))
    assert float(by_autograd) == pytest.approx((ahead - behind) / (2 * h), rel=1e-6)


def test_gradients_do_not_depend_on_chunks(in_chunks):
    density, x = fs.ScoreDensity(MLP().double(), SCHEDULE, "eps"), data(8, dtype=torch.float64)

    def gradient():
        density.zero_grad()
        density.log_prob(x, nfe=32).sum().backward()
        return torch.cat([p.grad.flatten() for p in density.model.parameters()])

    whole = gradient()
    in_chunks(7)
    assert torch.allclose(gradient(), whole, rtol=1e-10, atol=1e-12)


def test_score_of_the_estimate_is_the_targets():
    density = fs.ScoreDensity(ExactNet(TARGET, SCHEDULE), SCHEDULE, "eps")
    density.reference = fs.Reference(TARGET.weight, TARGET.mean, torch.full((5, 4), 0.09))
    x = TARGET.sample(5).requires_grad_()
    (exact,) = torch.autograd.grad(TARGET.log_prob(x).sum(), x)
    (found,) = torch.autograd.grad(density.log_prob(x, nfe=64).sum(), x)
    # The reference is the target, so nothing random is left.
    assert torch.allclose(found, exact, rtol=1e-6, atol=1e-6)


def test_conditions_go_with_their_samples():
    density, x = fs.ScoreDensity(MLP(), SCHEDULE, "eps"), data(10)
    label, scale = torch.linspace(-1, 1, 10)[:, None], torch.tensor(0.7)
    whole = density.estimate(x, nfe=32, label=label, scale=scale).log_prob
    for i in (0, 7):
        one = density.estimate(
            x[i : i + 1], nfe=32, sample_index=torch.tensor([i]), label=label[i : i + 1], scale=scale
        ).log_prob
        assert float(one) == pytest.approx(float(whole[i]), rel=1e-5)
    assert not torch.allclose(density.estimate(x, nfe=32, label=-label, scale=scale).log_prob, whole, rtol=1e-2)


def test_shared_conditions_stay_shared_in_chunks_of_their_length(in_chunks):
    class Embedding(nn.Module):
        def forward(self, x, t, table):
            return x * table.sum()

    density, x, table = fs.ScoreDensity(Embedding(), SCHEDULE, "eps"), data(8), torch.tensor([0.1, 0.2])
    whole = density.estimate(x, nfe=16, table=table).log_prob
    in_chunks(33)  # two samples at once, as many as entries
    cut = density.estimate(x, nfe=16, table=table).log_prob
    assert torch.allclose(cut, whole, rtol=1e-5)


def test_compare_is_the_difference_of_two_estimates_with_a_smaller_error():
    density, x = fs.ScoreDensity(MLP(), SCHEDULE, "eps"), data(200)
    a, b = {"label": torch.full((200, 1), 0.3)}, {"label": torch.full((200, 1), 0.31)}
    found = density.compare(x, a, b, nfe=64, seed=5)
    first, second = (density.estimate(x, nfe=64, seed=5, **cond) for cond in (a, b))
    # float32: two sums of about 100 nats, rounded.
    assert torch.allclose(found.difference, first.log_prob - second.log_prob, atol=1e-3)
    assert float(found.stderr.mean()) < 0.1 * float(first.stderr.mean())
    truth = density.compare(x, a, b, nfe=4096, seed=6)
    covered = (found.difference - truth.difference).abs() < 1.96 * (found.stderr**2 + truth.stderr**2).sqrt()
    assert 0.9 <= float(covered.double().mean()) <= 0.99


def test_target_stderr_spends_where_it_is_needed():
    density = fs.ScoreDensity(ExactNet(TARGET, SCHEDULE), SCHEDULE, "eps")
    x = TARGET.sample(64)
    found = density.estimate(x, nfe=32, target_stderr=0.4, max_nfe=4096)
    assert bool((found.stderr <= 0.4).all())
    assert int(found.nfe.min()) < int(found.nfe.max())
    error = (found.log_prob - TARGET.log_prob(x)).abs() / found.stderr
    assert float((error < 1.96).double().mean()) >= 0.87  # 64 intervals: 95 % less three standard errors
    alone = density.estimate(x[3:4], nfe=32, target_stderr=0.4, max_nfe=4096, sample_index=torch.tensor([3]))
    assert float(alone.log_prob) == pytest.approx(float(found.log_prob[3]), rel=1e-10)
    assert int(alone.nfe) == int(found.nfe[3])
    capped = density.estimate(x, nfe=32, target_stderr=1e-9, max_nfe=128)
    assert int(capped.nfe.max()) == 128


def test_state_keeps_what_was_fitted():
    net = ExactNet(TARGET, SCHEDULE)
    fitted = fs.ScoreDensity(net, SCHEDULE, "eps").fit(TARGET.sample(600).float(), progress=False)
    file = io.BytesIO()
    torch.save(fitted.state_dict(), file)
    file.seek(0)
    fresh = fs.ScoreDensity(net, SCHEDULE, "eps")
    fresh.load_state_dict(torch.load(file))
    x = TARGET.sample(8, seed=1)
    first, second = fitted.estimate(x, nfe=64), fresh.estimate(x, nfe=64)
    assert first.noise == second.noise == "sobol"
    assert torch.allclose(first.log_prob, second.log_prob, rtol=1e-12)
    assert torch.allclose(first.stderr, second.stderr, rtol=1e-12)


def test_small_budgets_fit_less():
    x = TARGET.sample(600).float()
    density = fs.ScoreDensity(ExactNet(TARGET, SCHEDULE), SCHEDULE, "eps")
    density.fit(x, evaluations=1000, progress=False)
    assert len(density.nodes.share) == 1
    assert density.reference.components == 1
    density.fit(x, evaluations=20_000, progress=False)
    assert len(density.nodes.share) == 48
    assert density.estimate(x[:4]).noise == "independent"


@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "full", "mixture"])
def test_fit_takes_the_kind_asked_for(kind):
    density = fs.ScoreDensity(ExactNet(TARGET, SCHEDULE), SCHEDULE, "eps")
    density.fit(TARGET.sample(300).float(), reference=kind, evaluations=2000, progress=False)
    q = density.reference
    found = {
        "isotropic": q.mean.shape[1] == 1,
        "diagonal": q.components == 1 and not q.full and q.mean.shape[1] == 4,
        "full": q.components == 1 and q.full,
        "mixture": q.components > 1,
    }
    assert found[kind]


def test_extra_channels_are_cut_off_and_wrapped_outputs_are_opened():
    x = data(4, (2, 3, 3))
    plain, wide = MLP((2, 3, 3)), MLP((2, 3, 3), extra=18)
    with torch.no_grad():
        wide.net[0].load_state_dict(plain.net[0].state_dict())
        wide.net[3].weight[:18] = plain.net[3].weight
        wide.net[3].bias[:18] = plain.net[3].bias
    expected = fs.ScoreDensity(plain, SCHEDULE, "eps").log_prob(x, nfe=16)
    assert torch.allclose(fs.ScoreDensity(wide, SCHEDULE, "eps").log_prob(x, nfe=16), expected, rtol=1e-5)

    class Wrapped(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.net, self.wrap = plain, wrap

        def forward(self, x, t):
            return self.wrap(self.net(x, t))

    for wrap in (lambda y: (y, None), lambda y: type("Output", (), {"sample": y})()):
        assert torch.allclose(fs.ScoreDensity(Wrapped(wrap), SCHEDULE, "eps").log_prob(x, nfe=16), expected, rtol=1e-6)


def test_half_precision_networks_keep_wide_sums():
    x = data(16)
    expected = fs.ScoreDensity(MLP(), SCHEDULE, "eps").log_prob(x, nfe=64)
    density = fs.ScoreDensity(MLP(), SCHEDULE, "eps")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = density.log_prob(x, nfe=64)
    assert found.dtype == torch.float32
    # bfloat16 rounds each prediction by 2^-9, at random: far below the estimate's own error.
    assert torch.allclose(found, expected, rtol=0.01, atol=0.1)
    bf16 = density.to(torch.bfloat16)
    bf16.time_dtype = torch.bfloat16
    assert torch.allclose(bf16.log_prob(x, nfe=64), expected, rtol=0.01, atol=0.3)
    assert bf16.reference.mean.dtype == torch.float64


class Broken(nn.Module):
    """Returns what it is told to."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, t):
        return self.answer(x, t)


def bad(**changes):
    """One estimate with something wrong in it."""
    options = {"model": MLP(), "x": data(4), "schedule": SCHEDULE, "predicts": "eps"} | changes
    new = {
        k: options.pop(k)
        for k in ("model", "schedule", "predicts", "noise", "backend", "reference", "time_dtype")
        if k in options
    }
    density = fs.ScoreDensity(new.pop("model"), new.pop("schedule"), **new)
    return density.estimate(options.pop("x"), **{"nfe": 16, **options})


NAN_AT = torch.zeros(4, 6)
NAN_AT[2, 3] = float("nan")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(4)}, ValueError, r"shape \(B, \*shape\) with B >= 1, got \(4,\).*x\[None\]"),
        ({"x": torch.zeros(0, 6)}, ValueError, r"got \(0, 6\)"),
        ({"x": [[1.0]]}, ValueError, "got list"),
        ({"x": torch.zeros(4, 6, dtype=torch.uint8)}, ValueError, "floating point, got torch.uint8; dequantize"),
        ({"x": torch.zeros(4, 6, device="meta")}, ValueError, "x is on the meta device, where tensors have no values"),
        ({"x": torch.zeros(4, 6).to_mkldnn()}, ValueError, "x must be a dense tensor, got a mkldnn one"),
        ({"mask": torch.ones(4, 6).to_sparse()}, ValueError, "mask must be a dense tensor, got a sparse_coo one"),
        ({"label": torch.ones(4, 6).to_sparse()}, ValueError, "'label' is a sparse_coo tensor.*fs.shared"),
        ({"x": NAN_AT}, ValueError, "NaN or inf in 1 of 4 samples, first in sample 2"),
        ({"predicts": "noise"}, ValueError, "denoiser, eps, flow, score, v, x0; got 'noise'"),
        ({"noise": "white"}, ValueError, "auto, sobol, independent; got 'white'"),
        ({"schedule": "linear"}, TypeError, "Schedule such as DDPM.linear.*got str"),
        ({"model": lambda x, t: x}, TypeError, "must be a torch.nn.Module, got function"),
        ({"model": torch.nn.LazyLinear(3)}, ValueError, "must have all its weights, got 'weight' without a shape"),
        ({"nfe": 3}, ValueError, "nfe=3 leaves fewer than 4 draws"),
        ({"method": "vlb"}, ValueError, "density, discrete, elbo; got 'vlb'"),
        ({"target_stderr": 0.0}, ValueError, "target_stderr must be positive"),
        ({"memory": 10}, ValueError, "does not hold one row"),
        ({"backend": "cuda"}, ValueError, "no backend can run on cpu in torch.float32: cuda: "),
        ({"backend": "gpu"}, ValueError, "'auto' or one of cuda, triton, torch; got 'gpu'"),
        ({"reference": 3}, TypeError, "must be a fastscore Reference, got int"),
        ({"time_dtype": "float32"}, TypeError, "torch.dtype such as torch.float32, got 'float32'"),
        ({"target_stderr": 0.1, "max_nfe": 8}, ValueError, "max_nfe must be between the .* evaluations .*, got 8"),
        (
            {"x": torch.zeros(4, 5)},
            ValueError,
            r"does not take data of shape \(5,\) a sample.*RuntimeError: mat1 and mat2",
        ),
        (
            {"reference": fs.Reference(torch.ones(1), torch.zeros(1, 5), torch.ones(1, 5))},
            ValueError,
            "x has 6 dimensions a sample and the reference 5; fit again",
        ),
        ({"sample_index": torch.arange(3)}, ValueError, r"4 non-negative integers.*got torch.int64 of shape \(3,\)"),
        ({"sample_index": torch.zeros(4)}, ValueError, "non-negative integers.*float32"),
        ({"sample_index": torch.arange(4) - 1}, ValueError, "non-negative integers"),
        ({"schedule": fs.DDPM.linear(10), "predicts": "flow"}, ValueError, "no time derivative"),
        (
            {"model": Broken(lambda x, t: x[:, :5])},
            ValueError,
            r"called with x_t \(4, 6\) and t \(4,\) and returned \(4, 5\)",
        ),
        ({"model": Broken(lambda x, t: {"eps": x})}, ValueError, "must return a tensor.*got dict"),
        (
            {
                "model": Broken(lambda x, t: torch.where(t[:, None] > 7, torch.nan, x)),
                "sample_index": torch.arange(4) + 90,
            },
            ValueError,
            "NaN or inf for sample 90 at log-SNR 7",
        ),
        ({"label": torch.zeros(4, 1, device="meta")}, ValueError, "condition 'label' is on meta and x on cpu"),
    ],
)
def test_bad_input_gets_one_clear_error(changes, error, message):
    with pytest.raises(error, match=message):
        bad(**changes)


def test_bad_fits():
    density = fs.ScoreDensity(MLP(), SCHEDULE, "eps")
    with pytest.raises(ValueError, match="fit needs at least 20 samples, got 19"):
        density.fit(data(19), progress=False)
    with pytest.raises(ValueError, match="auto, isotropic, diagonal, full, mixture, images; got 'kde'"):
        density.fit(data(40), reference="kde", progress=False)
    with pytest.raises(ValueError, match="at least 100 training samples, got 32"):
        density.fit(data(40), reference="mixture", progress=False)
    broken = fs.ScoreDensity(Broken(lambda x, t: x * torch.nan), SCHEDULE, "eps")
    with pytest.raises(ValueError, match="NaN or inf on the data given to fit"):
        broken.fit(data(200), progress=False)


def test_train_mode_with_dropout_warns_once():
    density = fs.ScoreDensity(MLP(dropout=0.1), SCHEDULE, "eps")
    with pytest.warns(UserWarning, match="train mode and its layer 'net.2'.*model.eval"):
        density.estimate(data(4), nfe=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "at the noisiest time")  # neither network is trained
        density.estimate(data(4), nfe=16)
        density.eval()
        density.estimate(data(4), nfe=16)
        fs.ScoreDensity(MLP(dropout=0.0), SCHEDULE, "eps").estimate(data(4), nfe=16)


@pytest.mark.parametrize("noise", ["independent", "sobol"])
def test_noise_tables_too_large_to_keep_are_made_again(in_chunks, noise):
    density, x = fs.ScoreDensity(MLP(), SCHEDULE, "eps", noise=noise), data(5)
    whole = density.estimate(x, nfe=64)
    in_chunks(10, keep_tables=False)
    cut = density.estimate(x, nfe=64)
    assert torch.allclose(cut.log_prob, whole.log_prob, rtol=1e-5)


def test_sobol_has_a_highest_dimension():
    x = torch.zeros(1, 21_201)
    net = Broken(lambda x, t: x)
    with pytest.raises(ValueError, match="goes to 21200 dimensions, got 21201"):
        fs.ScoreDensity(net, SCHEDULE, "eps", noise="sobol").estimate(x, nfe=8)
    assert fs.ScoreDensity(net, SCHEDULE, "eps").estimate(x, nfe=8).noise == "independent"
