"""Row programs: the networks that people use become one and agree with themselves; the others say why not."""

import copy
import io
import pickle
import subprocess
import sys
import uuid

import pytest
import real_networks as nets
import torch
import torch.nn.functional as F
from torch import nn

import fastscore as fs
from fastscore.estimator.integrand import cost_of_row
from fastscore.ops import activations
from fastscore.ops.instructions import Add, Affine, Linear, Norm, Save
from fastscore.process.conditions import Conditions
from fastscore.process.network import predict
from fastscore.program.row_program import NoProgram, Programs, RowProgram, run
from fastscore.program.verification import ProgramMismatch

CPU = torch.device("cpu")

SCHEDULE = fs.FlowMatching(data_at=0)


def of(width):
    """Return a condition for a batch: one row of numbers a sample."""
    return lambda batch: torch.randn(batch, width, generator=torch.Generator().manual_seed(3))


# name: network, shape of the data, conditions of the samples, conditions shared by the batch
NETWORKS = {
    "MAR, a condition a token": (nets.MARHead, (5,), {"c": of(7)}, {}),
    "MAR, one condition": (nets.MARHead, (5,), {}, {"c": of(7)}),
    "MAR, no condition": (nets.MARHead, (5,), {}, {}),
    "TabDDPM": (nets.TabDDPM, (5,), {}, {}),
    "TabDDPM, labels": (nets.TabDDPM, (5,), {"y": lambda batch: torch.arange(batch) % 3}, {}),
    "TabSyn, EDM": (nets.TabSyn, (5,), {}, {}),
    "sbi VectorFieldMLP": (nets.VectorFieldMLP, (3,), {"condition": of(4)}, {}),
    "sbi AdaMLP": (nets.AdaMLP, (3,), {"condition": of(4)}, {}),
    "sbi AdaMLP, one condition": (nets.AdaMLP, (3,), {}, {"condition": of(4)}),
    "score_models": (nets.ScoreModelsMLP, (5,), {}, {}),
    "smalldiffusion": (nets.SmallDiffusion, (2,), {}, {}),
    "DPPO": (nets.DPPO, (2, 3), {"state": of(4)}, {}),
    "DPPO, residual": (lambda: nets.DPPO(residual=True), (2, 3), {"state": of(4)}, {}),
    "IDQL": (nets.IDQL, (3,), {"s": of(4)}, {}),
    "flow_matching": (nets.FlowMatchingExample, (2,), {}, {}),
    "torchcfm": (nets.TorchCFM, (2,), {}, {}),
    "super-diffusion": (nets.SuperDiffusion, (2,), {}, {}),
    "diffrax": (nets.ConcatSquash, (2,), {}, {}),
    "FiLM on images": (nets.FiLMELU, (2, 2, 3), {}, {}),
}


def make(name, dtype=torch.float32):
    """Return a network, its shape, and functions from a batch size to conditions."""
    torch.manual_seed(1)
    new, shape, own, shared = NETWORKS[name]
    net = new().to(dtype).eval()

    def conditions(given, batch):
        values = {key: value(batch) for key, value in given.items()}
        return {key: v.to(dtype) if v.is_floating_point() else v for key, v in values.items()}

    return net, shape, lambda batch: conditions(own, batch), conditions(shared, 1)


def rows_of(batch, draws, shape, dtype):
    generator = torch.Generator().manual_seed(batch + draws)
    x_t = torch.randn(batch, draws, torch.Size(shape).numel(), generator=generator, dtype=dtype)
    return x_t, torch.linspace(0.05, 0.95, draws, dtype=dtype)


def by_module(net, x_t, time, own, shared, shape):
    return predict(net, x_t, time, Conditions(own, shared), shape, None)


@pytest.mark.parametrize("name", NETWORKS)
def test_agrees_with_the_network(name):
    net, shape, own, shared = make(name)
    program = RowProgram.trace(net, shape, torch.linspace(0.1, 0.9, 4), own(3), shared)
    for batch, draws in [(1, 1), (1, 5), (4, 1), (3, 3), (5, 7)]:
        x_t, time = rows_of(batch, draws, shape, torch.float32)
        with torch.no_grad():
            weights, tables = program.bind(time, own(batch), shared)
            found = run(program.code, weights, tables, x_t)
            expected = by_module(net, x_t, time, own(batch), shared, shape)
        # The same sums in another order: some dozen float32 roundings of 6e-8, of values that may cancel.
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
        for table in tables:
            assert table.shape[0] in (1, batch)
            assert table.shape[1] in (1, draws)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_the_network(name):
    net, shape, own, shared = make(name, torch.float64)
    program = RowProgram.trace(
        net, shape, torch.linspace(0.1, 0.9, 4, dtype=torch.float64), own(3), shared, torch.float64
    )
    x_t, time = rows_of(3, 4, shape, torch.float64)
    x_t.requires_grad_()
    weights, tables = program.bind(time, own(3), shared)
    found = run(program.code, weights, tables, x_t)
    expected = by_module(net, x_t, time, own(3), shared, shape)
    leaves = [x_t, *net.parameters()]
    ours, theirs = (torch.autograd.grad(v.square().sum(), leaves, allow_unused=True) for v in (found, expected))
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None)
        # float64, relative to the largest entry: rounding of 1e-16 times the sums' lengths.
        assert a is None or float((a - b).abs().max()) <= 1e-10 * max(1.0, float(b.abs().max()))


def test_what_depends_on_time_alone_is_a_table_of_one_entry_a_draw():
    net, shape, own, shared = make("MAR, one condition")
    program = RowProgram.trace(net, shape, torch.linspace(0.1, 0.9, 4), own(3), shared)
    kinds = [type(op) for op in program.code]
    block = [Save, Norm, Affine, Linear, Affine, type(program.code[7]), Linear, Affine, Add]
    assert kinds == [Linear, Affine, *block, *block, Norm, Affine, Linear, Affine]
    _, tables = program.bind(torch.rand(6), {}, shared)
    assert {tuple(table.shape[:2]) for table in tables} == {(1, 1), (1, 6)}
    # A variance beside the prediction is never computed.
    assert tables[-1].shape == (1, 1, 5)


def test_a_condition_a_sample_and_time_meet_in_two_passes_not_in_a_table_of_all_rows():
    net, shape, own, shared = make("sbi VectorFieldMLP")
    program = RowProgram.trace(net, shape, torch.linspace(0.1, 0.9, 4), own(3), shared)
    _, tables = program.bind(torch.rand(6), own(4), shared)
    assert {tuple(table.shape[:2]) for table in tables} == {(1, 1), (1, 6), (4, 1)}


class Odd(nn.Module):
    """A network around one operation on (h, t)."""

    def __init__(self, operation, d=4):
        super().__init__()
        self.inp, self.out, self.operation = nn.Linear(d, 8), nn.Linear(8, d), operation
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x, t):
        return self.out(self.operation(self, self.inp(x), t))


def control_flow(net, h, t):
    return h if t.sum() > 0 else -h


def attribute(net, h, t):
    net.calls = getattr(net, "calls", 0) + 1
    return h


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
    density = fs.ScoreDensity(Moody(), SCHEDULE)
    with pytest.raises(ProgramMismatch, match=r"differ by .* first in layer 'second'.*program=False"):
        density.estimate(torch.randn(8, 4), nfe=16)
    fs.ScoreDensity(Moody(), SCHEDULE, program=False).estimate(torch.randn(8, 4), nfe=16)


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


def test_a_wrong_instruction_is_an_error_that_names_its_layer(monkeypatch):
    wrong = activations.Activation(torch.relu, torch.relu_)
    monkeypatch.setitem(activations.ACTIVATIONS, "selu", wrong)
    with pytest.raises(ProgramMismatch, match=r"first in layer 'net\.1'"):
        RowProgram.trace(nets.TorchCFM(), (2,), torch.linspace(0.1, 0.9, 4))


@pytest.mark.parametrize("name", ["MAR, one condition", "sbi VectorFieldMLP", "TabSyn, EDM", "DPPO"])
def test_estimates_do_not_change(name):
    net, shape, own, shared = make(name)
    x = torch.randn(9, *shape)
    cond = own(9) | shared
    on, off = (fs.ScoreDensity(net, SCHEDULE, "flow", program=program) for program in (True, False))
    expected = off.estimate(x, nfe=48, **cond)
    for memory in (None, "60KB"):  # in one chunk, and in pieces of a sample
        found = on.estimate(x, nfe=48, memory=memory, **cond)
        # float32 sums over the draws, of terms that the control variate leaves large at one end.
        assert torch.allclose(found.log_prob, expected.log_prob, rtol=1e-4, atol=1e-3)
        assert torch.allclose(found.stderr, expected.stderr, rtol=1e-3, atol=1e-3)


def test_log_prob_has_the_same_gradient_and_follows_the_parameters():
    net, shape, _, shared = make("sbi AdaMLP, one condition", torch.float64)
    x = torch.randn(5, *shape, dtype=torch.float64, requires_grad=True)

    def gradient(program, memory=None):
        density = fs.ScoreDensity(net, SCHEDULE, "flow", program=program)
        total = density.log_prob(x, nfe=24, memory=memory, **shared).sum()
        return total, torch.autograd.grad(total, [x, *net.parameters()])

    def agree(memory=None):
        (value, ours), (expected, theirs) = gradient(True, memory), gradient(False)
        assert float(value) == pytest.approx(float(expected), rel=1e-10)
        for a, b in zip(ours, theirs):
            assert float((a - b).abs().max()) <= 1e-9 * max(1.0, float(b.abs().max()))

    agree()
    agree("200KB")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    agree()


def test_a_program_is_bound_to_what_the_network_is_now():
    net, shape, *_ = make("TabDDPM")
    density = fs.ScoreDensity(net, SCHEDULE, "flow", program=True)
    general = fs.ScoreDensity(net, SCHEDULE, "flow", program=False)
    x = torch.randn(4, *shape)

    def agree():
        a, b = (d.estimate(x, nfe=16).log_prob for d in (density, general))
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)
        return a

    first = agree()
    net.load_state_dict({k: v + 0.05 for k, v in net.state_dict().items()})
    second = agree()
    net.blocks[0][1] = nn.Tanh()
    third = agree()
    net.head.register_forward_hook(lambda *args: args[2] * 2)
    fourth = agree()
    for a, b in [(first, second), (second, third), (third, fourth)]:
        assert not torch.allclose(a, b, rtol=1e-3)
    net.train()
    with pytest.raises(NoProgram, match=r"layer 'blocks.0.2', operation dropout: is random"):
        density.estimate(x, nfe=16)


def test_copies_and_states_leave_programs_behind():
    net, shape, *_ = make("torchcfm")
    density, x = fs.ScoreDensity(net, SCHEDULE, "flow", program=True), torch.randn(4, *shape)
    expected = density.estimate(x, nfe=16).log_prob
    assert density._programs._found
    assert not any("program" in key for key in density.state_dict())
    file = io.BytesIO()
    torch.save(density, file)
    file.seek(0)
    for other in (copy.deepcopy(density), pickle.loads(pickle.dumps(density)), torch.load(file, weights_only=False)):
        assert other._programs.mode is True
        assert not other._programs._found
        assert torch.equal(other.estimate(x, nfe=16).log_prob, expected)


def test_the_mode():
    x = torch.randn(4, 4)
    with pytest.raises(ValueError, match="program must be True, False or 'auto', got 'always'"):
        fs.ScoreDensity(Odd(control_flow), SCHEDULE, program="always")
    with pytest.raises(NoProgram, match="data-dependent"):
        fs.ScoreDensity(Odd(control_flow), SCHEDULE, program=True).estimate(x, nfe=16)
    automatic = fs.ScoreDensity(Odd(control_flow), SCHEDULE)
    automatic.estimate(x, nfe=16)
    (found,) = automatic._programs._found.values()
    assert found.program is None
    assert "data-dependent" in found.reason
    net, shape, own, _ = make("MAR, a condition a token")
    cond = Conditions.of(own(4), 4)
    times = lambda: torch.linspace(0.1, 0.9, 4)  # noqa: E731
    assert Programs(True).find(net, shape, torch.float32, CPU, cond, times, torch.float32) is not None
    assert Programs(False).find(net, shape, torch.float32, CPU, cond, times, torch.float32) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Programs("auto").find(net, shape, torch.float32, CPU, cond, times, torch.float32) is None


def test_half_precision_and_integer_time():
    net, shape, *_ = make("torchcfm", torch.bfloat16)
    x = torch.randn(16, *shape)
    a, b = (fs.ScoreDensity(net, SCHEDULE, "flow", program=p, time_dtype=torch.bfloat16) for p in (True, False))
    # bfloat16 rounds each prediction by 2^-9 and often; the sums are float32.
    assert torch.allclose(a.estimate(x, nfe=64).log_prob, b.estimate(x, nfe=64).log_prob, rtol=0.02, atol=0.3)
    net, shape, *_ = make("MAR, no condition")
    x = torch.randn(4, *shape)
    a, b = (fs.ScoreDensity(net, fs.DDPM.linear(100), program=p).estimate(x, nfe=32).log_prob for p in (True, False))
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)


def test_memory_is_measured_on_the_program():
    net, shape, _, shared = make("MAR, one condition")
    x = torch.randn(4, *shape)
    on, off = (fs.ScoreDensity(net, SCHEDULE, "flow", program=program) for program in (True, False))
    with torch.no_grad():
        samples = on.check(x, None, shared)
        program, module = (
            cost_of_row(d.network, samples, d.network.find_programs(samples), d.reference) for d in (on, off)
        )
    assert program.row < module.row
    # Two blocks of three tables and a final layer's two, 24 floats wide, besides the evaluation's own tensors.
    assert program.draw >= 4 * 24 * 8
    assert module.draw == 4 * x[0].numel()  # a word of noise an element, and no table


def test_explain():
    net, shape, *_ = make("TabSyn, EDM")
    text = fs.explain(net, shape, fs.EDM())
    assert "save 0\n" in text
    assert "linear 5 -> 16                 denoise_fn_F.proj\n" in text
    assert "affine * per draw, + per draw  denoise_fn_F.mlp.6\nadd 0 * per draw" in text
    assert text.endswith("\non cpu: one PyTorch operation after another; kernels need a GPU")
    assert "affine + per sample" in fs.explain(make("sbi VectorFieldMLP")[0], (3,), condition=torch.randn(6, 4))
    assert fs.explain(Odd(control_flow), (4,)).startswith("no row program: torch.export cannot trace")


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


class Encoded(nn.Module):
    """A picture as condition: its encoder has convolutions, yet x never meets them."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5))
        self.net = nn.Sequential(nn.Linear(2 + 5 + 1, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x, t, picture):
        return self.net(torch.cat([x, self.encoder(picture), t[:, None]], 1))


def test_an_encoder_of_conditions_runs_once_a_sample():
    net, x, picture = Encoded(), torch.randn(5, 2), torch.randn(5, 1, 4, 4)
    a, b = (fs.ScoreDensity(net, SCHEDULE, "flow", program=p) for p in (True, False))
    expected = b.estimate(x, nfe=16, picture=picture).log_prob
    assert torch.allclose(a.estimate(x, nfe=16, picture=picture).log_prob, expected, rtol=1e-4, atol=1e-3)
    program = RowProgram.trace(net, (2,), torch.rand(4), {"picture": picture})
    _, tables = program.bind(torch.rand(3), {"picture": picture})
    assert [tuple(table.shape) for table in tables] == [(5, 1, 16), (1, 3, 16), (1, 1, 2)]


@pytest.mark.parametrize("kind", ["mlp", "ada_mlp"])
def test_the_networks_of_sbi(kind):
    builders = pytest.importorskip("sbi.neural_nets.net_builders.vector_field_nets")
    torch.manual_seed(0)
    theta, y = torch.randn(20, 3), torch.randn(20, 4)
    estimator = builders.build_vector_field_estimator(theta, y, "flow", net=kind, hidden_features=20, num_layers=2)

    class Velocity(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = estimator.net.eval()

        def forward(self, x, t, condition):
            return self.net(x, condition, t)

    net, condition = Velocity(), y[:5]
    for parameter in net.parameters():  # sbi starts some layers at zero
        nn.init.normal_(parameter, std=0.3)
    program = RowProgram.trace(net, (3,), torch.linspace(0.1, 0.9, 4), {"condition": condition})
    x_t, time = rows_of(5, 4, (3,), torch.float32)
    with torch.no_grad():
        weights, tables = program.bind(time, {"condition": condition})
        found = run(program.code, weights, tables, x_t)
        expected = by_module(net, x_t, time, {"condition": condition}, {}, (3,))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


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
    on, off = (fs.ScoreDensity(net, fs.DDPM.linear(100), program=p) for p in ("auto", False))
    assert torch.equal(on.estimate(x, nfe=8, **cond).log_prob, off.estimate(x, nfe=8, **cond).log_prob)
    (found,) = on._programs._found.values()
    assert "which no row program holds" in found.reason


def test_a_network_that_cannot_be_traced_is_no_noise_on_the_screen():
    # In another process: pytest catches what the tracer logs.
    script = """
import torch, fastscore as fs
class Branching(torch.nn.Module):
    def forward(self, x_t, t):
        if t.ne(t.round()).any():
            return x_t * t[:, None]
        return x_t
fs.ScoreDensity(Branching(), fs.LogSNR(-4, 4)).estimate(torch.randn(2, 3), nfe=16)
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
