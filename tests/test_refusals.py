"""What cannot be right is refused in one sentence, by every call: data, answers of networks, numbers."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.masked import masked_tensor
from torch.utils._pytree import tree_map_only

import fastscore as fs
from fastscore.estimator.protocol import check_density
from fastscore.metrics import NegativeLogLikelihood
from fastscore.ops import noise
from fastscore.transforms import zscore


class Net(nn.Module):
    """A network that answers what a function says."""

    def __init__(self, answer=lambda x, t: torch.tanh(x)):
        super().__init__()
        self.answer, self.weight = answer, nn.Parameter(torch.ones(1))

    def forward(self, x, t):
        return self.answer(x, t)


def density(answer=lambda x, t: torch.tanh(x)):
    return fs.ScoreDensity(Net(answer), fs.VP(), "eps")


class Wrapped(torch.Tensor):
    """A tensor in another one, whose operations are of its class."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        inside = tree_map_only(cls, lambda value: value.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, operation(*inside[0], **inside[1]))


CALLS = {
    "estimate": lambda d, x: d.estimate(x, nfe=16),
    "log_prob": lambda d, x: d.log_prob(x, nfe=16),
    "compare": lambda d, x: d.compare(x, {}, {}, nfe=16),
    "fit": lambda d, x: d.fit(x),
    "ode": lambda d, x: fs.probability_flow_log_prob(d, x),
    "loss": lambda d, x: fs.density_loss(d, x, seed=0),
    "captured": lambda d, x: fs.CapturedDensity(d, x, nfe=16)(x),
    "transformed": lambda d, x: fs.Transformed(d, zscore(torch.zeros(3), torch.ones(3))).estimate(x, nfe=16),
    "metric": lambda d, x: NegativeLogLikelihood(d, nfe=16).update(x),
}
X = torch.linspace(-1, 1, 90).reshape(30, 3)
DATA = {
    "sparse": (X.to_sparse(), "dense tensor, got a sparse_coo one"),
    "rows compressed": (X.to_sparse_csr(), "dense tensor, got a sparse_csr one"),
    "nested": (torch.nested.nested_tensor([X, X]), "dense tensor, got a nested one.*pad_sequence and mask="),
    "complex": (
        X.to(torch.complex64),
        "floating point, got torch.complex64; a density .* real numbers: .*as_real",
    ),
    "whole numbers": (X.long(), "floating point, got torch.int64; dequantize"),
    "truth values": (X > 0, "floating point, got torch.bool"),
    "quantized": (
        torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
        r"dense tensor, got a quantized one; .dequantize\(\) makes a dense one",
    ),
    "masked": (
        masked_tensor(X, X > 0),
        r"got a MaskedTensor one; .get_data\(\) makes a dense one.*and mask=",
    ),
    "a class of its own": (Wrapped(X), "dense tensor, got a Wrapped one"),
    "fake": (FakeTensorMode().from_tensor(X), "dense tensor, got a FakeTensor one; give one with values"),
    "no values": (X.to("meta"), "meta device, where tensors have no values"),
    "a list": (X.tolist(), "a tensor of shape.*got list"),
    "an array": (X.numpy(), "a tensor of shape.*got ndarray"),
    "one number": (torch.tensor(1.0), r"got \(\)"),
    "nothing": (X[:0], r"got \(0, 3\)"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", DATA)
def test_data_of_a_wrong_kind(call, kind):
    x, message = DATA[kind]
    with pytest.raises(ValueError, match=message):
        CALLS[call](density(), x)


OTHERS = {
    kind: value for kind, (value, _) in DATA.items() if isinstance(value, torch.Tensor) and "got a " in DATA[kind][1]
}


@pytest.mark.parametrize("kind", OTHERS)
def test_masks_and_conditions_of_a_wrong_kind(kind):
    value = OTHERS[kind]
    with pytest.raises(ValueError, match=r"mask must be a dense tensor, got a .* one; "):
        density().estimate(X, nfe=16, mask=value)
    for marked in (value, fs.per_sample(value)):
        with pytest.raises(ValueError, match=r"condition 'y' is a .* tensor, which cannot be told apart"):
            density(lambda x, t, y: x).estimate(X, nfe=16, y=marked)
    shared = [value] + [torch.nested.nested_tensor([X[:2], X])] * (kind == "nested")
    for each in shared:  # goes on as it is, whatever it is
        made = fs.ScoreDensity(Conditional(), fs.VP(), "eps")
        assert torch.equal(made.estimate(X, nfe=16, y=fs.shared(each)).log_prob, density().estimate(X, nfe=16).log_prob)


class Conditional(nn.Module):
    def forward(self, x, t, y):
        return torch.tanh(x)


def test_a_class_whose_operations_give_ordinary_tensors_is_as_good_as_one():
    right = density().estimate(X, nfe=16).log_prob
    for x in (AsyncCollectiveTensor(X), nn.Parameter(X)):
        assert torch.equal(density().estimate(x, nfe=16).log_prob, right)
    assert density().fit(X.to(torch.float8_e4m3fn)).estimate(X, nfe=16).log_prob.isfinite().all()


@dataclass
class Output:
    prediction: torch.Tensor


# All are called with x_t (rows, 4, 3) and t (rows,).
ANSWERS = {
    "integers": (lambda x, t: x.int(), "returned torch.int32 on cpu; it must return floating-point numbers"),
    "truth values": (lambda x, t: x > 0, "returned torch.bool"),
    "complex": (lambda x, t: x.to(torch.complex64), "returned torch.complex64"),
    "sparse": (lambda x, t: x.to_sparse(), "in layout sparse_coo"),
    "no values": (lambda x, t: x.to("meta"), "on meta; it must return .* on the device of x_t"),
    "nothing": (lambda x, t: None, "got NoneType; put a module around it"),
    "a dict": (lambda x, t: {"eps": x, "v": x}, "got dict with the entries 'eps', 'v'; put a module around it"),
    "a dataclass": (lambda x, t: Output(x), "got Output; put a module around it"),
    "an array": (lambda x, t: x.detach().numpy(), "got ndarray"),
    "a number": (lambda x, t: x.sum(), r"returned \(\); it must return the shape of x_t"),
    "its time token": (lambda x, t: torch.cat([t[:, None, None].expand(-1, 1, 3), x], 1), r"returned \(\d+, 5, 3\)"),
    "variances last": (lambda x, t: torch.cat([x, x], 2), r"returned \(\d+, 4, 6\).*twice the channels in dimension 1"),
    "three times the channels": (lambda x, t: torch.cat([x, x, x], 1), r"returned \(\d+, 12, 3\)"),
    "other rows": (lambda x, t: x[:1], r"returned \(1, 4, 3\)"),
    "NaN": (lambda x, t: x * torch.nan, "NaN or inf"),
}


@pytest.mark.parametrize("call", ["estimate", "log_prob", "compare", "ode", "captured"])
@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_of_a_wrong_kind(call, kind):
    answer, message = ANSWERS[kind]
    with pytest.raises(ValueError, match=message):
        CALLS[call](density(answer), torch.linspace(-1, 1, 24).reshape(2, 4, 3))


# Networks of x_t (rows, 3) and t (rows,), and what else they are called with.
REFUSALS = {
    "joins float32 time with its bfloat16 data": (
        lambda x, t: torch.cat([x, t[:, None]], 1) @ torch.ones(4, 3, dtype=torch.bfloat16),
        {},
        r"RuntimeError: .*dtype.* and t \(\d+,\) torch.float32; time_dtype=torch.bfloat16 if it joins time and data",
    ),
    "one time for all": (lambda x, t: x * t.expand(len(x), 1), {}, r"and t \(\d+,\) .*; it has to take one time a row"),
    "a number as time": (lambda x, t: x * float(t), {}, r"does not take.*ValueError.*; it has to take one time a row"),
    "an item as time": (lambda x, t: x * t.item(), {}, r"does not take.*; it has to take one time a row"),
    "a check of its own": (lambda x, t: {}["y"], {}, "does not take.*KeyError: 'y'"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_networks_that_cannot_be_called_so(kind):
    answer, cond, message = REFUSALS[kind]
    made = density(answer)
    if "bfloat16" in kind:
        made.bfloat16()
    for call in (lambda: made.estimate(X, nfe=16, **cond), lambda: fs.probability_flow_log_prob(made, X, **cond)):
        with pytest.raises(ValueError, match=message):
            call()


class Unpacks(nn.Module):
    def forward(self, x, t):
        _rows, _channels, _height, _width = x.shape
        return x


class Convolves(nn.Sequential):
    def forward(self, x, t):
        return super().forward(x) * t.reshape(-1, *[1] * (x.ndim - 1))


@pytest.mark.parametrize("call", ["estimate", "log_prob", "ode", "loss", "fit"])
@pytest.mark.parametrize("kind", ["one dimension", "two", "two of channels as many as rows", "three", "unpacked"])
def test_a_single_sample_without_a_batch_is_told_how_to_be_one(call, kind):
    made, shape = {
        "one dimension": (Convolves(nn.Conv1d(3, 3, 3, padding=1)), (30, 8)),
        "two": (Convolves(nn.Conv2d(3, 3, 3, padding=1)), (30, 8, 8)),
        "two of channels as many as rows": (Convolves(nn.Conv2d(4, 4, 3, padding=1)), (30, 8, 8)),
        "three": (Convolves(nn.Conv3d(3, 3, 3, padding=1)), (30, 4, 4, 4)),
        "unpacked": (Unpacks(), (30, 8, 8)),
    }[kind]
    made, x = fs.ScoreDensity(made, fs.VP(), "eps"), torch.linspace(-1, 1, int(np.prod(shape))).reshape(shape)
    with pytest.raises(ValueError, match=r"does not take data of shape .* is a single sample, .* give x\[None\]"):
        CALLS[call](made, x)


def test_data_that_are_wrong_otherwise_are_not_told_to_be_a_single_sample():
    for layer, shape in ((nn.Conv2d(3, 3, 3, padding=1), (2, 4, 8, 8)), (nn.Linear(4, 4), (2, 3))):
        with pytest.raises(ValueError, match="does not take data of shape") as refused:
            fs.ScoreDensity(Convolves(layer), fs.VP(), "eps").estimate(torch.ones(shape), nfe=16)
        assert "single sample" not in str(refused.value)


OWN = {
    "a sentence": (lambda x, t: fs.Levels(4).values(x, x.dtype), "^levels must be"),
    "another kind of error": (lambda x, t: check_density(x), "^density must be"),
    "what it runs into": (
        lambda x, t: noise.normal(None),
        "^the network does not take.*AttributeError",
    ),
}


@pytest.mark.parametrize("kind", OWN)
def test_a_sentence_of_fastscore_s_own_that_a_network_meets_comes_as_it_is(kind):
    answer, message = OWN[kind]
    with pytest.raises((ValueError, TypeError), match=message):
        density(answer).estimate(X, nfe=16)


def test_an_inner_layer_that_lacks_an_argument_is_not_the_network_itself():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Bilinear(3, 3, 3)

        def forward(self, x, t):
            return self.layer(x)

    with pytest.raises(ValueError, match=r"does not take data of shape .*: TypeError: Bilinear.forward\(\) missing 1"):
        fs.ScoreDensity(Inner(), fs.VP(), "eps").estimate(torch.randn(4, 3), nfe=16)
    with pytest.raises(ValueError, match=r"by names that are texts, got the names \[1\]"):
        fs.ScoreDensity(Inner(), fs.VP(), "eps").estimate(torch.randn(4, 3), nfe=16, cond={1: 2})


def test_conditions_go_by_name():
    class Conditional(nn.Module):
        def forward(self, x, t, state):
            return x + state

    made = fs.ScoreDensity(Conditional(), fs.VP(), "eps")
    with pytest.raises(ValueError, match=r"missing 1 required.*'state'.*; conditions go to the call by name"):
        made.estimate(X, nfe=16)
    with pytest.raises(TypeError, match="estimate takes x by position, got 1 more; options and conditions"):
        made.estimate(X, X, nfe=16)


def test_learned_variances_are_cut_off():
    x = torch.linspace(-1, 1, 24).reshape(2, 4, 3)
    both = density(lambda x, t: torch.cat([torch.tanh(x), x], 1))
    assert torch.equal(both.estimate(x, nfe=16).log_prob, density().estimate(x, nfe=16).log_prob)
