"""The kernels around the network of a training step against their definition in float64; outputs start as NaN."""

import math

import pytest
import torch
from agreement import close, exact_normal
from torch.autograd import forward_ad

import fastscore as fs
from fastscore.ops import loss as ops
from fastscore.ops import noise
from fastscore.ops import torch as truth
from fastscore.ops.interpreting import interpreting
from fastscore.process.predictions import PREDICTIONS, coefficients

pytest.importorskip("triton")
DEVICE = torch.device("cpu" if interpreting() else "cuda")
# Samples, draws, dimensions: one of each, tiles with a rest, a chunk of 1,024 dimensions with a rest, many rows.
SHAPES = [(1, 1, 1), (7, 3, 2), (3, 1, 13), (33, 2, 50), (2, 3, 1027), (601, 1, 3)]


@pytest.fixture
def exact_noise(monkeypatch):
    monkeypatch.setattr(noise, "normal", lambda w, sign=None, dtype=None: exact_normal(w))


class Step:
    """Rows of a training step at random log-SNRs, in float64, and the network's answers."""

    def __init__(self, batch, draws, d, signs, predicts="v", reference="diagonal"):
        generator = torch.Generator().manual_seed(1000 * batch + 10 * draws + d)
        randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)  # noqa: E731
        self.signs, self.x, index = signs, randn(batch, d).float().double(), torch.arange(batch, device=DEVICE) + 5
        self.words = torch.stack([noise.words(3, index, k, noise.STREAM_LOSS, d + 1) for k in range(draws)])
        schedule = fs.FlowMatching()
        time = schedule.time(2 * randn(draws, batch).cpu())
        own = *schedule.alpha_sigma(time), *coefficients(predicts, schedule, time)
        self.numbers = torch.stack([*own, torch.rand(time.shape, generator=generator).double() + 3]).to(DEVICE)
        if reference == "isotropic":
            self.reference = fs.Reference.isotropic(1.7).to(DEVICE)
        else:
            ones = torch.ones(1, dtype=torch.float64, device=DEVICE)
            self.reference = fs.Reference(ones, randn(1, d), randn(1, d).exp())
        self.prediction, self.grad = randn(signs, draws, batch, d), randn(draws, batch)

    def rows(self, x, *backend):
        made = truth.loss_rows if not backend else ops.loss_rows
        return made(x, self.words, self.numbers, self.signs, self.reference.tensors(), *backend)

    def difference(self, prediction, x, eps, control, *backend):
        made = truth.loss_difference if not backend else ops.loss_difference
        return made(prediction, x, self.words, eps, control, self.numbers, *backend)


@pytest.mark.parametrize("reference", ["isotropic", "diagonal"])
@pytest.mark.parametrize("signs", [1, 2])
@pytest.mark.parametrize(("batch", "draws", "d"), SHAPES)
def test_rows_before_the_network(exact_noise, batch, draws, d, signs, reference):
    step = Step(batch, draws, d, signs, reference=reference)
    x_t, _, control, log_q = step.rows(step.x)
    found = step.rows(step.x.float(), "triton")
    assert (found[0].shape, found[0].dtype) == ((signs, draws, batch, d), torch.float32)
    assert found[1].numel() == 0  # made again from its words
    assert close(found[0], x_t)
    assert close(found[2], control)
    assert found[3].dtype == torch.float64
    assert torch.allclose(found[3], log_q, rtol=1e-13, atol=1e-13 * d)  # the same float64 numbers, in another order
    assert torch.allclose(log_q, step.reference.log_prob(step.x), rtol=1e-13, atol=0)


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("signs", [1, 2])
@pytest.mark.parametrize(("batch", "draws", "d"), [(7, 3, 2), (5, 1, 1027)])
def test_difference_and_its_gradient_for_every_prediction(exact_noise, batch, draws, d, signs, predicts):
    agrees(Step(batch, draws, d, signs, predicts))


@pytest.mark.parametrize("signs", [1, 2])
@pytest.mark.parametrize(("batch", "draws", "d"), SHAPES)
def test_difference_and_its_gradient_of_every_shape(exact_noise, batch, draws, d, signs):
    agrees(Step(batch, draws, d, signs))


def agrees(step):
    _, eps, control, _ = step.rows(step.x)
    prediction = step.prediction.clone().requires_grad_()
    want, pull = step.difference(prediction, step.x, eps, control)
    (expected,) = torch.autograd.grad(want, prediction, step.grad)
    assert close(
        truth.loss_gradient(step.grad, step.prediction, step.x, step.words, eps, step.numbers), expected, 1e-12
    )
    # The gradient of a row's half, without its weight, averaged over the signs.
    (half,) = torch.autograd.grad(step.difference(prediction, step.x, eps, control)[0].sum() / 2, prediction)
    by_hand = (half.sum(0) / step.numbers[5, ..., None]).square().sum(-1)
    assert close(pull, by_hand, 1e-12)

    found = step.prediction.float().requires_grad_()
    nothing = found.new_empty(0)
    difference, pulled = step.difference(found, step.x.float(), nothing, control.float(), "triton")
    assert not pulled.requires_grad
    # Two sums are subtracted that are each right to 1e-5.
    want = want.detach()
    size = want.abs().mean() + (step.numbers[5] * control.mean(0)).mean()
    assert float((difference.detach() - want).abs().max()) < 1e-4 * float(size)
    assert close(pulled, pull, 1e-4)
    (gradient,) = torch.autograd.grad(difference, found, step.grad.float())
    assert gradient.shape == found.shape
    assert close(gradient, expected, 1e-4)


def test_answers_in_half_precision_and_without_order_in_memory():
    step = Step(5, 2, 7, 2)
    x, (*_, control, _) = step.x.float(), step.rows(step.x.float(), "triton")
    strided = step.prediction.bfloat16().transpose(0, 3).contiguous().transpose(0, 3)
    results = []
    for prediction in (strided, strided.contiguous().float()):
        leaf = prediction.detach().requires_grad_()
        difference, pull = step.difference(leaf, x, x.new_empty(0), control, "triton")
        (gradient,) = torch.autograd.grad(difference.sum(), leaf)
        assert gradient.dtype == leaf.dtype
        results.append((difference, pull, gradient.float()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.allclose(results[0][2], results[1][2], rtol=2**-7, atol=0)  # bfloat16, which the interpreter cuts


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck_of_the_ops(backend):
    step = Step(3, 2, 5, 2)
    x, tensors = step.x.float(), step.reference.tensors()
    _, eps, control, _ = ops.loss_rows(x, step.words, step.numbers, 2, tensors, backend)
    prediction = step.prediction.float().requires_grad_()
    torch.library.opcheck(ops.loss_rows, (x, step.words, step.numbers, 2, tensors, backend))
    torch.library.opcheck(ops.loss_difference, (prediction, x, step.words, eps, control, step.numbers, backend))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_gradient_of_the_gradient_is_that_of_the_definition(backend):
    step = Step(3, 2, 5, 2)
    x, found = step.x.float(), []
    for given in ((), (backend,)):
        _, eps, control, _ = step.rows(x, *given)
        prediction = step.prediction.float().requires_grad_()
        difference = step.difference(prediction, x, eps, control, *given)[0]
        (gradient,) = torch.autograd.grad((difference * step.grad.float()).sum(), prediction, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), prediction)[0])
    assert close(found[1], found[0], 1e-4)


@pytest.mark.parametrize(("draws", "antithetic"), [(1, False), (3, False), (2, True)])
@pytest.mark.parametrize(
    ("schedule", "predicts"), [(fs.VP(), "eps"), (fs.DDPM.linear(50), "v"), (fs.EDM(), "denoiser")]
)
def test_a_loss_by_kernels_is_the_loss(schedule, predicts, draws, antithetic):
    """Whole steps: the value, the gradient of the weights, and what adaptive nodes learn."""
    torch.manual_seed(0)
    net, results = Net().to(DEVICE), []
    x = torch.randn(9, 3).to(DEVICE)
    for backend in ("torch", "triton"):
        density, nodes = fs.ScoreDensity(net, schedule, predicts, backend=backend), fs.AdaptiveNodes(schedule)
        options = {"draws": draws, "antithetic": antithetic, "nodes": nodes, "reduction": "none"}
        loss = fs.density_loss(density, x, seed=4, **options)
        gradients = torch.autograd.grad(loss.mean(), net.parameters())
        results.append([loss.detach(), torch.cat([g.flatten() for g in gradients]), nodes.moment])
    for found, expected in zip(results[1], results[0]):
        # In float32 on both sides, with weights up to 30 and coefficients up to e^8 that sums cancel from.
        assert bool(torch.isfinite(found).all())
        assert close(found, expected, 1e-3)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.SiLU(), torch.nn.Linear(16, 3))

    def forward(self, x_t, t):
        return self.net(torch.cat([x_t / (1 + x_t.abs()), t.to(x_t)[:, None] / 50], 1))


def derivative(how, f, weight):
    one = torch.ones_like(weight)
    if how == "grad":
        return torch.func.grad(f)(weight)
    if how == "jvp":
        return torch.func.jvp(f, (weight,), (one,))[1]
    if how == "hessian":
        return torch.func.jacrev(torch.func.grad(f))(weight)
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(weight, one))).tangent


@pytest.mark.parametrize("how", ["grad", "jvp", "hessian", "dual numbers"])
def test_derivatives_other_than_backward_passes_are_those_of_the_definition(how):
    x, found = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE), []

    class Scaled(torch.nn.Module):
        def forward(self, x_t, t):
            return self.gain[0] * x_t

    for backend in ("torch", "triton"):
        net = Scaled()

        def f(gain):
            net.gain = gain  # noqa: B023
            return fs.density_loss(fs.ScoreDensity(net, fs.VP(), "eps", backend=backend), x, seed=2)  # noqa: B023

        found.append(derivative(how, f, torch.full((1,), 0.7, device=DEVICE)))
    assert float(found[0].abs()) > 1
    assert torch.equal(*found)


def test_log_q_of_a_weight_that_is_not_quite_one():
    step = Step(3, 1, 4, 1)
    step.reference.weight.fill_(0.5)
    found = step.rows(step.x.float(), "triton")[3]
    assert torch.allclose(found, step.reference.log_prob(step.x), rtol=1e-13, atol=0)
    assert math.isclose(float(found[0] - Step(3, 1, 4, 1).reference.log_prob(step.x)[0]), math.log(0.5), rel_tol=1e-9)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_data_mask_and_conditions_made_in_inference_mode(backend):
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)

        def forward(self, x_t, t, gain):
            return self.layer(x_t) * gain

    density = fs.ScoreDensity(Scaled().to(DEVICE), fs.VP(), "eps", backend=backend)
    x, mask, gain = torch.randn(4, 3).to(DEVICE), (torch.eye(4, 3) == 0).to(DEVICE), torch.ones(1, 3).to(DEVICE)
    with torch.inference_mode():
        copies = x.clone(), mask.clone(), gain.clone()
    for masked in (False, True):
        gradients = []
        for data, counts, by in ((x, mask, gain), copies):
            loss = fs.density_loss(density, data, seed=1, mask=counts if masked else None, gain=by)
            gradients += torch.autograd.grad(loss, density.model.layer.weight)
        assert torch.equal(*gradients)
