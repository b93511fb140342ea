"""compile=True: the network, or its row program, runs as torch.compile makes it, with the same numbers, or as it is."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastscore as fs
from fastscore.estimator.network_density import compiled_of

pytestmark = pytest.mark.slow

D, NFE = 6, 16


class Mlp(nn.Module):
    """A row program, wide enough that no fused kernel has it here."""

    def __init__(self):
        super().__init__()
        self.time, self.first, self.last = nn.Linear(1, 16), nn.Linear(D, 16), nn.Linear(16, D)

    def forward(self, x, t):
        return self.last(nn.functional.silu(self.first(x) + self.time(t[:, None].to(x))))


class Convolution(nn.Module):
    """No row program."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x, t):
        return torch.tanh(self.layer(x)) * t[:, None, None, None].to(x)


def example(kind):
    torch.manual_seed(0)
    model = kind().eval()
    return model, torch.randn(5, *((D,) if kind is Mlp else (2, 4, 4)))


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("program", [True, False])
@pytest.mark.parametrize("kind", [Mlp, Convolution])
def test_compiled_code_runs_and_gives_the_same_numbers(kind, program):
    if kind is Convolution and program:
        pytest.skip("a convolution is no row program")
    model, x = example(kind)
    before = set(model.state_dict()), dict(vars(model))
    plain = fs.ScoreDensity(model, fs.VP(), "eps", program=program)
    made = fs.ScoreDensity(model, fs.VP(), "eps", program=program, compile=True)
    expected = plain.estimate(x, nfe=NFE)
    assert graphs() == 0
    found = made.estimate(x, nfe=NFE)
    assert graphs() > 0
    # Fused operations round otherwise; a squared residual of order one has 1e-6 of it.
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=1e-4, atol=1e-4)
    assert made.model is model
    assert (set(model.state_dict()), dict(vars(model))) == before
    assert set(made.state_dict()) == set(plain.state_dict())


def test_gradients_and_losses_are_those_of_the_plain_network():
    model, x = example(Mlp)
    for program in (True, False):
        gradients = []
        for compiled in (False, True):
            density = fs.ScoreDensity(model, fs.VP(), "eps", program=program, compile=compiled)
            y = x.clone().requires_grad_()
            density.log_prob(y, nfe=NFE).sum().backward()
            model.zero_grad()
            fs.density_loss(density, x, seed=1).backward()
            gradients.append([y.grad, *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert graphs() > 0


def fails(function):
    def raises(*args, **kwargs):
        raise RuntimeError("no compiler here\nmore of it")

    return raises


@pytest.mark.parametrize("program", [True, False])
def test_a_network_that_cannot_be_compiled_runs_as_it_is_and_says_why_once(program, monkeypatch, recwarn):
    model, x = example(Mlp)
    monkeypatch.setattr(torch, "compile", fails)
    expected = fs.ScoreDensity(model, fs.VP(), "eps", program=program).estimate(x, nfe=NFE)
    density = fs.ScoreDensity(model, fs.VP(), "eps", program=program, compile=True)
    for _ in range(3):
        torch.testing.assert_close(density.estimate(x, nfe=NFE).log_prob, expected.log_prob, rtol=1e-5, atol=1e-5)
    (said,) = [str(each.message) for each in recwarn if "torch.compile" in str(each.message)]
    assert (
        "runs as it is, since torch.compile, which compile=True asks for, raised RuntimeError: no compiler here" in said
    )
    assert "more of it" not in said


def test_what_the_network_itself_raises_is_told_as_without_a_compiler():
    model, _ = example(Mlp)
    density = fs.ScoreDensity(model, fs.VP(), "eps", program=False, compile=True)
    with pytest.raises(ValueError, match="the network does not take data of shape"):
        density.estimate(torch.randn(3, D + 1), nfe=NFE)
    assert compiled_of(density).reason is None


def test_another_network_in_its_place_is_compiled_in_its_turn():
    model, x = example(Mlp)
    density = fs.ScoreDensity(model, fs.VP(), "eps", program=False, compile=True)
    density.estimate(x, nfe=NFE)
    density.model = copy.deepcopy(model)
    with torch.no_grad():
        density.model.last.bias += 1.0
    expected = fs.ScoreDensity(density.model, fs.VP(), "eps", program=False).estimate(x, nfe=NFE)
    torch.testing.assert_close(density.estimate(x, nfe=NFE).log_prob, expected.log_prob, rtol=1e-4, atol=1e-4)


def test_copies_and_files_compile_their_own_network():
    model, x = example(Mlp)
    density = fs.ScoreDensity(model, fs.VP(), "eps", program=False, compile=True)
    expected = density.estimate(x, nfe=NFE).log_prob
    stored = io.BytesIO()
    torch.save(density, stored)
    stored.seek(0)
    for other in (copy.deepcopy(density), pickle.loads(pickle.dumps(density)), torch.load(stored, weights_only=False)):
        assert compiled_of(other).function is other.model is not model
        assert torch.equal(other.estimate(x, nfe=NFE).log_prob, expected)


def test_a_network_that_is_compiled_already_is_taken_as_it_is():
    model, x = example(Mlp)
    fast = torch.compile(model, backend="eager")
    density = fs.ScoreDensity(fast, fs.VP(), "eps", program=False, compile=True)
    expected = fs.ScoreDensity(model, fs.VP(), "eps", program=False).estimate(x, nfe=NFE)
    assert torch.equal(density.estimate(x, nfe=NFE).log_prob, expected.log_prob)
    assert compiled_of(density)._fast is fast


def test_options_of_torch_compile_are_refused_in_its_place():
    with pytest.raises(
        TypeError, match=r"compile must be True or False, got 'max-autotune'; options .* torch.compile\(m"
    ):
        fs.ScoreDensity(Mlp(), fs.VP(), "eps", compile="max-autotune")
