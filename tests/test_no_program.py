"""What is no row program says why and runs itself, and a program that differs from its network is an error."""

import operator
import pickle
import subprocess
import uuid
import warnings

import pytest
import real_networks as nets
import torch
import torch.nn.functional as F
from program_networks import SCHEDULE, Odd, control_flow
from steps import PYTHON
from torch import nn

import fastscore as fs
from fastscore.ops import activations
from fastscore.program.row_program import NoProgram, RowProgram
from fastscore.program.verification import ProgramMismatch


def attribute(net, h, t):
    net.calls = getattr(net, "calls", 0) + 1
    return h


def by_time(h, t):
    """Two experts, each for the rows of its times."""
    late, out = t > 0.5, torch.empty_like(h)
    out[late], out[~late] = 2 * h[late], 3 * h[~late]
    return out


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (lambda net, h, t: h.softmax(1), "layer 'forward', operation softmax: is no instruction of a row program"),
        (lambda net, h, t: h * h, "operation mul: multiplies two values that both depend on x"),
        (lambda net, h, t: F.glu(torch.cat([h, h], 1)), "operation cat: concatenates two values that depend on x"),
        (lambda net, h, t: net.inp(net.out(h)) + torch.relu(h).sin(), "operation sin: is no instruction"),
        (lambda net, h, t: net.inp(net.out(h)) + net.inp(net.out(-h)), "operation add: adds two branches"),
        (lambda net, h, t: F.elu(h, 0.5), "operation elu: only alpha = 1"),
        (lambda net, h, t: h - h.mean(0), "operation mean: mixes rows"),
        (lambda net, h, t: h * t.mean(), "operation mean: mixes rows"),
        (lambda net, h, t: by_time(h, t), "operation index: mixes rows"),
        (lambda net, h, t: h + t.unique(return_inverse=True)[1][:, None], "operation _unique2: mixes rows"),
        (lambda net, h, t: h.double().float(), "operation to: computes in torch.float64"),
        (lambda net, h, t: h + torch.randn_like(h), "operation randn_like: is random"),
        (lambda net, h, t: net.norm(h), "layer 'norm', operation batch_norm: takes its statistics from the batch"),
        (lambda net, h, t: net.drop(h), "layer 'drop', operation dropout: is random"),
        (
            lambda net, h, t: h.reshape(len(h), 8),
            r"its code fixes the number of rows, as len\(x\) does; x\.shape\[0\] does not",
        ),
        (control_flow, "torch.export cannot trace the network: Could not guard on data-dependent"),
        (attribute, "layer 'forward' changes its attribute 'calls'"),
        (lambda net, h, t: h[:, torch.arange(8)], "operation index: is no instruction"),
    ],
)
def test_what_is_no_program_says_why(operation, reason):
    with pytest.raises(NoProgram, match=reason):
        RowProgram.trace(Odd(operation), (4,), torch.linspace(0.1, 0.9, 4))


def test_a_graph_that_cannot_be_read_is_no_program_and_the_network_runs(monkeypatch):
    def match(traced):
        raise KeyError("an operation that nobody foresaw")

    monkeypatch.setattr("fastscore.program.row_program.match", match)
    density = fs.ScoreDensity(Odd(lambda net, h, t: h), SCHEDULE, "eps")
    assert bool(density.estimate(torch.randn(3, 4), nfe=8).log_prob.isfinite().all())
    with pytest.raises(NoProgram, match="its graph cannot be read: KeyError: 'an operation that nobody foresaw'"):
        RowProgram.trace(Odd(lambda net, h, t: h), (4,), torch.linspace(0.1, 0.9, 4))


def test_three_waiting_residuals_are_one_too_many():
    class Deep(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))

        def forward(self, x, t):
            waiting = []
            for layer in self.layers:
                x = layer(x)
                waiting.append(x)
            for skip in reversed(waiting[:-1]):
                x = torch.tanh(x) + skip
            return x

    assert len(RowProgram.trace(Deep(3), (4,), torch.rand(4)).code) == 12
    with pytest.raises(
        NoProgram, match=r"layer 'layers.2': more than 2 residuals wait at once \('layers.0', 'layers.1'\)"
    ):
        RowProgram.trace(Deep(4), (4,), torch.rand(4))


class Moody(nn.Module):
    """Its second layer gives another answer at every call, in a way that no graph shows."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), self.Layer(), nn.Linear(4, 4)

    class Layer(nn.Module):
        def forward(self, x):
            return x * (1 + uuid.uuid1().time % 97)

    def forward(self, x, t):
        return self.last(self.second(self.first(x)))


def test_a_network_that_differs_from_its_program_is_an_error():
    density = fs.ScoreDensity(Moody(), SCHEDULE, "eps")
    with pytest.raises(ProgramMismatch, match=r"first in layer 'second'; the network gives another.*program=False"):
        density.estimate(torch.randn(8, 4), nfe=16)
    fs.ScoreDensity(Moody(), SCHEDULE, "eps", program=False).estimate(torch.randn(8, 4), nfe=16)


def test_answers_that_are_roundings_have_no_program_and_no_error():
    class Remainder(nn.Module):
        """v of a standard normal: zero but for roundings, which a program makes in another order."""

        def forward(self, x, t):
            alpha, sigma = (v[:, None] for v in fs.Cosine().alpha_sigma(t))
            eps = sigma * x.double() / (alpha**2 + sigma**2)
            return (alpha * eps - sigma * ((x.double() - sigma * eps) / alpha)).to(x.dtype)

    x = torch.randn(4, 3, dtype=torch.float64)
    found = fs.ScoreDensity(Remainder(), fs.Cosine(), "v").estimate(x, nfe=16)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)
    assert torch.allclose(found.log_prob, expected, atol=1e-10)  # the reference is exact, and the network too


LOOK = operator.attrgetter("first", "last")


class Looking(nn.Module):
    """Finds its layers by an attrgetter, which is made of names alone and never changes."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x, t):
        first, last = LOOK(self)
        return last(torch.tanh(first(x)))


def test_an_attrgetter_is_followed():
    assert not fs.explain(Looking(), (4,)).startswith("no row program")


class LooksAtHooks(Looking):
    """Answers twice as much while somebody has a hook at its last layer."""

    def forward(self, x, t):
        return super().forward(x, t) * (2 if self.last._forward_hooks else 1)


def test_a_network_that_looks_at_its_hooks_sees_none_of_a_check():
    torch.manual_seed(0)
    net, x = LooksAtHooks(), torch.randn(6, 4)
    density, itself = (fs.ScoreDensity(net, SCHEDULE, "eps", program=p) for p in ("auto", False))
    for hooked in (False, True):
        if hooked:
            net.last.register_forward_hook(lambda *_: None)
        found, expected = (d.estimate(x, nfe=32).log_prob for d in (density, itself))
        # The same sums in another order: float32's roundings of about -30 nats.
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-4), hooked


def test_an_export_that_fails_leaves_no_hook_behind(monkeypatch):
    """As torch 2.11's does, so that every later network's code seemed to read what belongs to the tracer."""

    def failing(*_, **__):
        nn.modules.module.register_module_buffer_registration_hook(lambda *_: open)
        raise RuntimeError("as planted")

    before = dict(nn.modules.module._global_buffer_registration_hooks)
    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "export", failing)
        assert "as planted" in fs.explain(Looking(), (4,))
    assert nn.modules.module._global_buffer_registration_hooks == before
    assert not fs.explain(Looking(), (4,)).startswith("no row program")


class Cancelling(nn.Module):
    """v of N(0, 0.16), written as (alpha x_t - x) / sigma: a difference of nearly the same, over a small sigma."""

    schedule = fs.LogSNR(-10.0, 15.0)

    def forward(self, x_t, log_snr):
        alpha, sigma = (v.to(x_t)[:, None] for v in self.schedule.scale(log_snr))
        return (alpha * x_t - alpha * 0.16 / (alpha**2 * 0.16 + sigma**2) * x_t) / sigma


def test_a_network_that_rounds_as_much_itself_has_no_program_and_no_error():
    x = 0.4 * torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    density = fs.ScoreDensity(Cancelling(), Cancelling.schedule, "v")
    found = density.estimate(x, nfe=64)
    truth = torch.distributions.Normal(0.0, 0.4).log_prob(x.double()).sum(1)
    # 64 intervals of 95 %: 55 or more are inside with a probability of 99.9 %.
    assert int(((found.log_prob - truth).abs() < 1.96 * found.stderr).sum()) >= 55
    assert "float64" in fs.explain(Cancelling(), (48,), Cancelling.schedule)


def test_a_wrong_instruction_is_an_error_that_names_its_layer(monkeypatch):
    wrong = activations.Activation(torch.relu, torch.relu_)
    monkeypatch.setitem(activations.ACTIVATIONS, "selu", wrong)
    with pytest.raises(ProgramMismatch, match=r"first in layer 'net\.1'"):
        RowProgram.trace(nets.TorchCFM(), (2,), torch.linspace(0.1, 0.9, 4))


def test_a_program_that_differs_from_a_steady_network_is_a_warning_and_the_network_runs(monkeypatch):
    wrong = activations.Activation(torch.relu, torch.relu_)
    monkeypatch.setitem(activations.ACTIVATIONS, "selu", wrong)
    net, x = nets.TorchCFM(), torch.randn(6, 2)
    density, itself, strict = (fs.ScoreDensity(net, SCHEDULE, "flow", program=p) for p in ("auto", False, True))
    with pytest.warns(UserWarning, match=r"runs without its row program: .*'net\.1'; this is a bug.*please report"):
        found = density.estimate(x, nfe=16).log_prob
    assert torch.equal(found, itself.estimate(x, nfe=16).log_prob)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(found, density.estimate(x, nfe=16).log_prob)
    for _ in range(2):
        with pytest.raises(ProgramMismatch, match=r"'net\.1'; this is a bug of fastscore"):
            strict.estimate(x, nfe=16)
    with pytest.raises(ProgramMismatch) as caught:
        fs.explain(net, (2,))
    assert pickle.loads(pickle.dumps(caught.value)).steady


class Twice(nn.Module):
    """One layer under two names, one list under two, and a question whether they are one."""

    def __init__(self, question):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.question = nn.Linear(4, 4), question
        self.list, self.dict = [1.0, [2.0]], {"a": [1.0]}
        self.same_list, self.same_dict = self.list, self.dict

    def forward(self, x, t):
        return self.first(x) * (1.0 if self.question(self) else 2.0)


@pytest.mark.parametrize(
    "question",
    [
        lambda net: net.list is net.same_list,
        lambda net: net.dict is net.same_dict,
        lambda net: net.list[1] is net.same_list[1],
        lambda net: id(net.dict["a"]) == id(net.same_dict["a"]),
        lambda net: any(net.list is each for each in (1, net.same_list)),
    ],
)
def test_what_is_one_object_is_one_in_a_trace_and_in_its_check(question):
    net, x = Twice(question).eval(), torch.randn(6, 4)
    density, itself = (fs.ScoreDensity(net, SCHEDULE, "eps", program=program) for program in (True, False))
    for _ in range(2):
        found, expected = (d.estimate(x, nfe=16).log_prob for d in (density, itself))
        assert torch.allclose(found, expected, rtol=1e-4)  # float32 sums in another order
        net.list, net.dict = [1.0, [2.0]], {"a": [1.0]}  # two from now on


@pytest.mark.parametrize(("question", "answer"), [(lambda net: net.first is net.again, 1), (lambda net: True, 0)])
@pytest.mark.filterwarnings("error:the network runs without")
def test_a_layer_of_two_names_has_no_program_where_its_code_tells_them_apart(question, answer):
    net, x = Twice(question).eval(), torch.randn(6, 4)
    net.again = net.first
    density, itself = (fs.ScoreDensity(net, SCHEDULE, "eps", program=program) for program in ("auto", False))
    found, expected = (d.estimate(x, nfe=16).log_prob for d in (density, itself))
    assert torch.allclose(found, expected, rtol=1e-4)
    reason = "no row program: 'first' and 'again' are one layer, and its code tells them apart in a trace"
    assert (fs.explain(net, (4,)) == reason) == bool(answer)


def test_layers_of_images_are_refused_without_a_trace(monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 3, 3, padding=1))

    class Image(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.encoder = net, nn.Conv2d(1, 3, 1)

        def forward(self, x, t, picture):
            return self.net(x) * t.view(-1, 1, 1, 1) + self.encoder(picture)

    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: pytest.fail("exported"))
    found = fs.explain(Image(), (3, 4, 4), picture=torch.randn(2, 1, 4, 4))
    assert found == "no row program: layer 'net.0' is a Conv2d, which no row program holds"


@pytest.mark.parametrize("kind", ["UNet2DModel", "DiTTransformer2DModel"])
def test_networks_of_diffusers_run_themselves(kind):
    diffusers = pytest.importorskip("diffusers")
    if kind == "UNet2DModel":
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        net = diffusers.UNet2DModel(8, 3, 3, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks)
        cond = {}
    else:
        sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "sample_size": 8}
        net = diffusers.DiTTransformer2DModel(**sizes, in_channels=3, out_channels=3, norm_num_groups=1)

        class Positional(nn.Module):
            def __init__(self, net):
                super().__init__()
                self.net = net

            def forward(self, x, t, y):
                return self.net(x, timestep=t, class_labels=y)

        net, cond = Positional(net), {"y": torch.arange(2)}
    net, x = net.eval(), torch.randn(2, 3, 8, 8)
    on, off = (fs.ScoreDensity(net, fs.DDPM.linear(100), "eps", program=p) for p in ("auto", False))
    assert torch.equal(on.estimate(x, nfe=8, **cond).log_prob, off.estimate(x, nfe=8, **cond).log_prob)
    (found,) = on._programs._found.values()
    assert "which no row program holds" in found.reason


def test_a_network_that_cannot_be_traced_is_no_noise_on_the_screen():
    # In another process: pytest catches what the tracer logs.
    script = """
import torch, fastscore as fs
class Branching(torch.nn.Module):
    def forward(self, x_t, t):
        noise = torch.sigmoid(-t).sqrt()[:, None] * x_t  # in data from N(0, 1)
        if t.ne(t.round()).any():
            return 1 * noise
        return noise
fs.ScoreDensity(Branching(), fs.LogSNR(-4, 4), "eps").estimate(torch.randn(2, 3), nfe=16)
"""
    done = subprocess.run([*PYTHON, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_network_that_no_call_goes_through_has_the_sentence_of_a_call():
    class Joins(nn.Module):
        def __init__(self):
            super().__init__()
            self.x, self.t = nn.Linear(3, 3), nn.Linear(1, 3)

        def forward(self, x, t):
            return self.x(x) + self.t(t[:, None])

    density, x = fs.ScoreDensity(Joins().double(), fs.VP(), "eps"), torch.randn(30, 3)
    for call in (density.estimate, density.log_prob, density.fit):
        with pytest.raises(
            ValueError, match=r"does not take data of shape \(3,\).*time_dtype=torch.float64 if it joins"
        ):
            call(x)


@pytest.mark.parametrize("shape", [torch.zeros(5, 3), (3.0,)])
def test_explain_wants_the_shape_of_a_sample(shape):
    with pytest.raises(TypeError, match=r"shape must be that of one sample, .*; give tuple\(x.shape\[1:\]\)"):
        fs.explain(nn.Linear(3, 3), shape)


def test_an_activation_with_arguments_says_that_they_are_the_reason(monkeypatch):
    net = nn.Sequential(nn.Linear(3, 3), nn.Hardtanh())
    net.forward = lambda x, t: net[1](net[0](x))
    known = activations.Activation(F.hardtanh, F.hardtanh_)
    monkeypatch.setitem(activations.ACTIVATIONS, "hardtanh", known)
    assert "hardtanh: has arguments beside x, -1.0, 1.0, and no rule for them" in fs.explain(net, (3,))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.core = nn.Linear(3, 3)

    def forward(self, x, t):
        return self.core(x)


def test_explain_takes_a_network_whatever_its_layers_are_called():
    assert fs.explain_program(Plain(), (3,)).startswith("row program of Plain")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((fs.ScoreDensity(Plain(), fs.VP(), "eps"), (3,)), r"got ScoreDensity; give density.model"),
        ((lambda x, t: x, (3,)), r"model must be a network, a torch.nn.Module, got function; wrap"),
        ((Plain, (3,)), r"got the class Plain and no object of it; wrap"),
        ((Plain(), 3), r"shape must be that of one sample, a tuple of integers, got 3; give"),
        ((Plain(), fs.VP()), r"shape must be that of one sample, a tuple of integers, got VP"),
        ((Plain(), (3,), "vp"), r"schedule must be a fastscore Schedule such as VP\(\), got str"),
    ],
)
def test_explain_says_what_it_wants(arguments, message):
    with pytest.raises(TypeError, match=message):
        fs.explain_program(*arguments)
