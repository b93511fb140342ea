"""The choice of backend never changes an answer beyond rounding, from end to end."""

import pytest
import torch
from analytic import ExactNet, ill_conditioned, mixture
from torch import nn

import fastscore as fs
from fastscore.estimator import integrand
from fastscore.ops.instructions import Linear
from fastscore.ops.interpreting import interpreting
from fastscore.ops.select import BACKENDS, implementation
from fastscore.ops.task import Task
from fastscore.ops.triton import why_not_fused
from fastscore.reference.turning import cosines

DEVICE = torch.device("cpu" if interpreting() else "cuda")
# Under the interpreter Triton's kernels run on a CPU too; the CUDA backend says why it cannot.
RUNNABLE = [b.name for b in BACKENDS if b.name != "torch" and b.why_not(DEVICE, torch.float32) is None]
TARGETS = {"gaussian": ill_conditioned(), "mixture d=2": mixture(2), "mixture d=16": mixture(16)}


class Net(nn.Module):
    """A residual MLP with time-dependent modulation, a row program of every level of table."""

    def __init__(self, d, width=32):
        super().__init__()
        torch.manual_seed(0)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, 2 * width))
        self.inside, self.hidden, self.out = nn.Linear(d, width), nn.Linear(width, width), nn.Linear(width, d)
        self.label = nn.Linear(3, width)

    def forward(self, x_t, t, label=None):
        scale, shift = self.time(t[:, None].float() / 1000).chunk(2, 1)
        h = self.inside(x_t) + (0 if label is None else self.label(label))
        h = h + self.hidden(nn.functional.silu(h * (1 + scale) + shift))
        return self.out(nn.functional.gelu(h))


class OnHost(nn.Module):
    """The exact network of a target, which lives on the CPU, for data anywhere."""

    def __init__(self, *arguments):
        super().__init__()
        self.net = ExactNet(*arguments)

    def forward(self, x_t, t):
        return self.net(x_t.cpu(), t.cpu()).to(x_t.device)


def agree(found, expected):
    # The error of float32 sums over evaluations, each of which is right to 1e-5 of its mean size.
    scale = 1 + float(expected.abs().mean())
    assert float((found - expected).abs().max()) < 2e-5 * scale


def test_triton_runs_here():
    assert RUNNABLE == ["triton"]


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
def test_general_networks_give_the_same_densities(name, predicts, backend):
    target, schedule = TARGETS[name], fs.LogSNR(-8, 6)
    x = target.sample(9, seed=1).float().to(DEVICE)
    estimates = []
    for choice in ("torch", backend):
        density = fs.ScoreDensity(OnHost(target, schedule, predicts), schedule, predicts, backend=choice).to(DEVICE)
        estimates.append(density.estimate(x, nfe=24, seed=3))
    agree(estimates[1].log_prob, estimates[0].log_prob)
    assert torch.allclose(estimates[1].stderr, estimates[0].stderr, rtol=1e-3)


# One kind shows that a fitted reference reaches the kernel; tests/kernels compare the rows of all with the definition.
OTHERS = [pytest.param(name, marks=pytest.mark.long) for name in ("isotropic", "diagonal", "full")]


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("reference", ["mixture", *OTHERS])
def test_fitted_programs_give_the_same_densities_in_one_kernel(reference, backend, monkeypatch):
    target, schedule = mixture(5), fs.DDPM.linear(1000)
    data, x = (target.sample(n, seed=n).float().to(DEVICE) for n in (400, 7))
    label = torch.randn(7, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    torch_density = fs.ScoreDensity(Net(5).eval(), schedule, "eps", backend="torch").to(DEVICE)
    torch_density.fit(data, reference=reference, evaluations=30_000, progress=False)
    density = fs.ScoreDensity(Net(5).eval(), schedule, "eps", backend=backend).to(DEVICE)
    density.load_state_dict(torch_density.state_dict())
    fused = []
    monkeypatch.setattr(integrand, "_fused", lambda *a, run=integrand._fused: fused.append(1) or run(*a))
    for cond in ({}, {"label": label}):
        expected = torch_density.estimate(x, nfe=32, **cond)
        assert not fused
        agree(density.estimate(x, nfe=32, **cond).log_prob, expected.log_prob)
        assert fused
        fused.clear()


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("program", [False, True])
@pytest.mark.parametrize("components", [1, 3])
def test_a_reference_in_cosines_is_for_no_kernel(components, program, backend):
    x = mixture(5).sample(7, seed=1).float()
    mean, variance = torch.randn(2, components, 5, generator=torch.Generator().manual_seed(2))
    factors = [cosines(5), torch.empty(0), torch.empty(0)]
    q = fs.Reference(torch.full((components,), 1 / components), mean, variance.exp(), factors=factors)
    densities = [
        fs.ScoreDensity(Net(5).eval(), fs.VP(), "eps", reference=q, program=program, backend=name).to(DEVICE)
        for name in ("torch", backend)
    ]
    expected, found = (density.estimate(x.to(DEVICE), nfe=32) for density in densities)
    agree(found.log_prob, expected.log_prob)
    assert torch.allclose(found.stderr, expected.stderr, rtol=1e-3)
    losses = [fs.density_loss(density, x.to(DEVICE), seed=0) for density in densities]
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-4)  # sums in float32


@pytest.mark.parametrize("backend", RUNNABLE)
def test_gradients_agree(backend):
    target, schedule = mixture(5), fs.DDPM.linear(1000)
    x = target.sample(5, seed=3).float().to(DEVICE)

    def gradients(choice):
        model, leaf = Net(5).eval().to(DEVICE), x.clone().requires_grad_()
        density = fs.ScoreDensity(model, schedule, "eps", backend=choice)
        density.log_prob(leaf, nfe=24).sum().backward()
        return [leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    for found, expected in zip(gradients(backend), gradients("torch"), strict=True):
        # Sums of 120 rows' gradients in float32.
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("backend", RUNNABLE)
def test_frozen_networks_get_the_gradient_of_the_data_from_a_kernel(backend, monkeypatch):
    target, schedule = mixture(5), fs.DDPM.linear(1000)
    x = target.sample(5, seed=3).float().to(DEVICE)
    module, calls = implementation(backend), []
    kernel = module.density_mlp_dx
    monkeypatch.setattr(module, "density_mlp_dx", lambda *a: calls.append(1) or kernel(*a))
    gradients = []
    for choice in ("torch", backend):
        density = fs.ScoreDensity(Net(5).eval().requires_grad_(False), schedule, "eps", backend=choice).to(DEVICE)
        leaf = x.clone().requires_grad_()
        density.log_prob(leaf, nfe=24).sum().backward()
        gradients.append(leaf.grad)
        assert len(calls) == (choice != "torch")
    # Sums of 24 rows' gradients in float32.
    assert torch.allclose(gradients[1], gradients[0], rtol=1e-3, atol=1e-4 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("program", [False, True])  # the thin pair, and the fused kernel
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backend", RUNNABLE)
def test_second_derivatives_agree(backend, frozen, program):
    """No kernel has them: the gradient is evaluated by PyTorch where it is to be differentiated in its turn."""
    found = []
    for name in ("torch", backend):
        network = Net(3).to(DEVICE).requires_grad_(not frozen)
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
        density = fs.ScoreDensity(network, fs.DDPM.linear(1000), "eps", backend=name, program=program)
        value = density.log_prob(x, nfe=8, label=torch.ones(5, 3, device=DEVICE)).sum()
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        wanted = [x] if frozen else [x, network.hidden.weight]
        found.append([grad.detach(), *torch.autograd.grad(grad.square().sum(), wanted)])
    for got, expected in zip(*reversed(found)):
        assert float(expected.abs().max()) > 0
        agree(got, expected)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_comparisons_and_the_other_methods_agree(backend):
    target, schedule = mixture(3), fs.DDPM.linear(1000)
    x = target.sample(4, seed=3).float().to(DEVICE)
    one, other = torch.eye(3, device=DEVICE)[[0, 1, 2, 0]], torch.eye(3, device=DEVICE)[[1, 1, 1, 1]]
    densities = [fs.ScoreDensity(Net(3).eval(), schedule, "eps", backend=b).to(DEVICE) for b in ("torch", backend)]
    differences = [d.compare(x, {"label": one}, {"label": other}, nfe=24).difference for d in densities]
    agree(differences[1], differences[0])
    for method in ("discrete", "elbo"):
        found = [d.estimate(x, nfe=24, method=method).log_prob for d in densities]
        agree(found[1], found[0])


def test_automatic_choice_on_a_cpu_is_torch_even_where_triton_interprets():
    density = fs.ScoreDensity(Net(3).eval(), fs.DDPM.linear(1000), "eps")
    x = torch.randn(2, 3)
    forced = fs.ScoreDensity(density.model, density.schedule, "eps", backend="torch")
    assert torch.equal(density.estimate(x, nfe=16).log_prob, forced.estimate(x, nfe=16).log_prob)


def test_double_precision_networks_have_no_kernel():
    weights = [torch.zeros(16, 3).double(), torch.zeros(3, 16).double()]
    assert "float64" in why_not_fused(Task.of([Linear(0), Linear(1)], weights, [], 3, DEVICE))
