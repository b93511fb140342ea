"""A user's network is the same after every public call: hooks, modes, gradients, buffers, attributes, compiled code."""

import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fastscore as fs
from fastscore.metrics import NegativeLogLikelihood

SCHEDULE = fs.LogSNR(-6, 6)


class MLP(nn.Module):
    """Two layers and what a module may carry: a list, an embedding, a parameter without gradient."""

    def __init__(self, middle=None):
        super().__init__()
        self.a, self.middle, self.b = nn.Linear(4, 16), middle or nn.SiLU(), nn.Linear(16, 4)
        self.b.bias.requires_grad_(False)
        self.label, self.notes = nn.Embedding(3, 16), [1, 2]

    def forward(self, x, t, y=None):
        h = self.a(x) + t.to(x.dtype)[:, None]
        return self.b(self.middle(h if y is None else h + self.label(y)))


class Images(nn.Module):
    """A convolution and a normalization, which no row program holds; data of four numbers are images of 2 x 2."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.label = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.Embedding(3, 1)

    def forward(self, x, t, y=None):
        h = self.norm(self.conv(x.reshape(-1, 1, 2, 2))) * t.to(x.dtype)[:, None, None, None]
        return (h if y is None else h + self.label(y)[:, :, None, None]).reshape(x.shape)


class Caching(MLP):
    """Keeps what it computed for a number of rows, as positional tables are kept."""

    def forward(self, x, t, y=None):
        if getattr(self, "kept", None) is None:
            self.kept = torch.linspace(0, 1, 4, dtype=x.dtype)
        return super().forward(x + self.kept, t, y)


def hooked():
    net = MLP()
    net.a.register_forward_hook(lambda module, args, output: output * 2)
    net.register_forward_pre_hook(lambda module, args: args)
    net.b.register_full_backward_hook(lambda module, *grads: None)
    return net.eval()


def normalized():
    return MLP(nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 16)), nn.SiLU())).eval()


def spectral(training):
    return MLP(nn.Sequential(parametrizations.spectral_norm(nn.Linear(16, 16)), nn.SiLU())).train(training)


RUNS = {"compiled": 0}


def counting(graph, inputs):
    def run(*args):
        RUNS["compiled"] += 1
        return graph(*args)

    return run


def compiled(net):
    return torch.compile(net.eval(), backend=counting, fullgraph=True)


def compiled_in_place(net):
    net.eval().compile(backend=counting, fullgraph=True)
    return net


NETWORKS = {
    "plain": lambda: MLP().eval(),
    "with hooks": hooked,
    "batch norm": lambda: Images().eval(),
    "batch norm in train mode": lambda: Images().train(),
    "dropout in train mode": lambda: MLP(nn.Dropout(0.5)).train(),
    "one layer in train mode": lambda: MLP(nn.Sequential(nn.Linear(16, 16).train(), nn.ReLU().eval())),
    "weight norm": normalized,
    "spectral norm": lambda: spectral(False),
    "spectral norm in train mode": lambda: spectral(True),
    "caching": lambda: Caching().eval(),
    "compiled": lambda: compiled(MLP()),
    "compiled images": lambda: compiled(Images()),
    "compiled in place": lambda: compiled_in_place(Images()),
}

X, Y = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3

CALLS = {
    "estimate": lambda d: d.estimate(X, nfe=16, y=Y),
    "estimate to a target": lambda d: d.estimate(X, nfe=16, target_stderr=0.5, max_nfe=64),
    "log_prob": lambda d: d.log_prob(X, nfe=16),
    "compare": lambda d: d.compare(X, {"y": Y}, {"y": (Y + 1) % 3}, nfe=16),
    "fit": lambda d: d.fit(X, evaluations=4000, progress=False),
    "explain": lambda d: fs.explain(d.model, (4,), SCHEDULE),
    "ODE, exact": lambda d: fs.probability_flow_log_prob(d, X[:3], method="midpoint", steps=2),
    "ODE, probes": lambda d: fs.probability_flow_log_prob(d, X[:3], trace="hutchinson", method="midpoint", steps=2),
    "captured": lambda d: fs.CapturedDensity(d, X, nfe=16)(X),
    "discrete": lambda d: fs.discrete_log_prob(d, Y[:, None].expand(-1, 4), fs.Levels(3), nfe=16),
    "classifier": lambda d: fs.DiffusionClassifier(d, {"y": torch.arange(3)}).classify(X[:4], nfe=32),
    "metric": lambda d: NegativeLogLikelihood(d, nfe=16).update(X),
    "transformed": lambda d: fs.Transformed(d, torch.distributions.AffineTransform(0.0, 2.0)).estimate(X, nfe=16),
    "regularization": lambda d: fs.score_regularization(d, X, seed=0),
}
# In train mode these are steps of a training, in which layers are meant to learn.
TRAINING = ("log_prob",)


def snapshot(net):
    """Return all that a call could change, by name."""
    found = {
        "torch random numbers": torch.get_rng_state().tolist(),
        "python random numbers": random.getstate(),
        "numpy random numbers": tuple(np.random.get_state()[1]),  # noqa: NPY002
        "default dtype": torch.get_default_dtype(),
        "gradients on": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "threads": torch.get_num_threads(),
        "dispatch modes": len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()),
    }
    for name, module in net.named_modules():
        found[name, "mode"] = module.training
        for key, value in vars(module).items():
            if isinstance(value, dict) and key not in ("_parameters", "_buffers", "_modules"):
                found[name, key] = {k: id(v) for k, v in value.items()}
            elif isinstance(value, list):
                found[name, key] = list(value)
            elif not isinstance(value, dict):
                found[name, key] = id(value)
    for name, parameter in net.named_parameters():
        found[name] = (id(parameter), parameter.requires_grad, parameter.grad, parameter.tolist())
        found[name, "weak references"] = weakref.getweakrefcount(parameter)
    for name, buffer in net.named_buffers():
        found[name] = (id(buffer), buffer.tolist())
        found[name, "weak references"] = weakref.getweakrefcount(buffer)
    return found


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:the network is in train mode")
def test_a_network_is_as_it_was_after(name, call):
    torch._dynamo.reset()
    torch.manual_seed(3)
    net = NETWORKS[name]()
    with torch.no_grad():
        net(X, torch.zeros(24))  # its own first call may compile and cache
    if name.endswith("in train mode") and call in TRAINING:
        pytest.skip("a step of a training")
    before = snapshot(net)
    try:
        CALLS[call](fs.ScoreDensity(net, SCHEDULE, "eps"))
    except fs.verification.ProgramMismatch:
        assert "train mode" in name  # random, and says so
    after = snapshot(net)
    changed = [key for key in before if before[key] != after[key]]
    if name.startswith("compiled"):  # torch.compile of a backend of one's own has some for every number of rows
        changed = [key for key in changed if key[1:] != ("weak references",)]
    assert changed == []
    assert before.keys() == after.keys()
    if name.startswith("compiled"):
        RUNS["compiled"] = 0
        with torch.no_grad():
            net(X, torch.zeros(24))
        assert RUNS["compiled"] == 1


@pytest.mark.parametrize("how", [compiled, compiled_in_place])
def test_a_compiled_network_runs_compiled_in_an_estimate(how):
    torch._dynamo.reset()
    net = how(Images())
    RUNS["compiled"] = 0
    found = fs.ScoreDensity(net, SCHEDULE, "eps").estimate(X, nfe=16)
    assert RUNS["compiled"] >= 1
    plain = fs.ScoreDensity(getattr(net, "_orig_mod", net), SCHEDULE, "eps")
    with torch.compiler.set_stance("force_eager"):
        expected = plain.estimate(X, nfe=16)
    assert torch.equal(found.log_prob, expected.log_prob)  # the backend runs the very operations


def test_a_compiled_network_that_was_trained_has_an_ode_density():
    """Its compiled backward pass frees what an exact trace would read again."""
    torch._dynamo.reset()
    plain = MLP().eval()
    net = torch.compile(plain, backend="aot_eager")
    density = fs.ScoreDensity(net, SCHEDULE, "eps")
    fs.density_loss(density, X, seed=0).backward()
    expected = fs.probability_flow_log_prob(fs.ScoreDensity(plain, SCHEDULE, "eps"), X[:3], method="midpoint", steps=4)
    for batch in (2, 3):
        found = fs.probability_flow_log_prob(density, X[:batch], method="midpoint", steps=4)
        assert torch.allclose(found.log_prob, expected.log_prob[:batch], atol=1e-5)


def test_a_layer_that_learns_in_train_mode_sees_no_nan():
    """Where a network has layers that no program holds, they are found by NaN in x, which a running mean would keep."""
    net = Images().train()
    with pytest.warns(UserWarning, match="train mode"):
        fs.ScoreDensity(net, SCHEDULE, "eps").log_prob(X, nfe=16)
    assert bool(torch.isfinite(net.norm.running_mean).all())


class Expanded(nn.Module):
    """A layer whose buffer is one number that stands for many, and counts its calls elsewhere."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((2, 1), 2.0).expand(2, 4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, t):
        self.calls += 1
        self._buffers["scale"][:, :1] += 1  # as one of its numbers
        return self.linear(x) * self.scale[0]


def test_an_expanded_buffer_is_put_back_as_any_other():
    net = Expanded().train()
    before = net.scale.clone()
    fs.ScoreDensity(net, SCHEDULE, "eps").estimate(X, nfe=16)
    assert torch.equal(net.scale, before)
    assert float(net.calls) == 0


def test_a_graph_that_was_made_before_an_estimate_goes_backwards_after_it():
    net = nn.Sequential(nn.Linear(X.shape[1], 8), nn.BatchNorm1d(8), nn.Linear(8, X.shape[1])).train()

    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            return self.net(x)

    answer = net(X)
    fs.ScoreDensity(Timed(), SCHEDULE, "eps").estimate(X, nfe=16)
    answer.sum().backward()  # raises where a buffer's version has moved
    assert net[0].weight.grad is not None


class Branching(MLP):
    """Cannot be traced, and says so after the trace has seen its weights."""

    def forward(self, x, t, y=None):
        h = super().forward(x, t, y)
        return 2 * h if h.sum() > 1e9 else h


class InPlace(MLP):
    def forward(self, x, t, y=None):
        h = super().forward(x, t, y)
        h += 1
        return h.mul_(2)


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("kind", [MLP, InPlace, Branching, Caching])
@pytest.mark.parametrize("call", ["estimate", "log_prob", "ODE, exact", "explain", "captured"])
def test_weights_can_be_swapped_afterwards(kind, call, swapping):
    """As `torch.utils.swap_tensors` does, which refuses a tensor that somebody has a weak reference to."""
    net = kind().eval()
    with torch.no_grad():
        net(X, torch.zeros(24))  # its own first call may cache
    density = fs.ScoreDensity(net, SCHEDULE, "eps")
    CALLS[call](density)
    net.load_state_dict(kind().state_dict())
    torch.utils.swap_tensors(net.a.weight, nn.Parameter(torch.ones(16, 4)))
    if kind is Caching:
        torch.utils.swap_tensors(net.kept, torch.ones(4))
    found, expected = (d.estimate(X, nfe=16) for d in (density, fs.ScoreDensity(net, SCHEDULE, "eps", program=False)))
    assert torch.allclose(found.log_prob, expected.log_prob, rtol=1e-4)  # float32 sums in another order
    net.double()


class Drawing(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw, self.layer = draw, nn.Linear(3, 3)

    def forward(self, x, t):
        self.draw()
        return self.layer(x)


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_random_numbers_of_python_and_numpy_are_those_of_the_caller(draw):
    """A training loop that shuffles by them has the same order, whether its likelihood is logged or not."""
    made, x = fs.ScoreDensity(Drawing(draw), fs.VP(), "eps", program=False), torch.randn(4, 3)
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    for _ in range(2):  # the first call tells whether a network draws, and later ones ask for what it draws from
        made.estimate(x, nfe=16)
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002


class OwnGenerator(nn.Module):
    """A network of which a layer draws from a generator of its own."""

    def __init__(self, generator, draw):
        super().__init__()
        self.layer, self.draw = nn.Linear(3, 3), draw
        self.layer.generator = generator

    def forward(self, x, t):
        self.draw(self.layer.generator)
        return self.layer(x)


@pytest.mark.parametrize(
    ("generator", "draw", "state"),
    [
        (torch.Generator(), lambda g: torch.rand(2, generator=g), lambda g: g.get_state().tolist()),
        (random.Random(0), lambda g: g.random(), lambda g: g.getstate()),
        (np.random.default_rng(0), lambda g: g.random(), lambda g: g.bit_generator.state),
        (np.random.RandomState(0), lambda g: g.rand(), lambda g: [*g.get_state()[1].tolist(), g.get_state()[2]]),
    ],
    ids=["torch", "Python", "numpy", "numpy's old one"],
)
def test_generators_of_a_networks_own_are_where_they_were(generator, draw, state):
    made = fs.ScoreDensity(OwnGenerator(generator, draw), fs.VP(), "eps", program=False)
    x, before = torch.randn(4, 3), state(generator)
    made.estimate(x, nfe=16)
    fs.probability_flow_log_prob(made, x, method="midpoint", steps=4)
    assert state(generator) == before
