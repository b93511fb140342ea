"""The networks that people use become row programs and agree with them, values and gradients."""

import pytest
import torch
from program_networks import NETWORKS, SCHEDULE, Odd, by_module, control_flow, make, rows_of
from torch import nn

import fastscore as fs
from fastscore.ops.instructions import Add, Affine, Linear, Norm, Save
from fastscore.program.row_program import RowProgram, run


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


class Joined(nn.Module):
    """An MLP that is given time and condition beside x, in one layer or in layers whose answers are added."""

    def __init__(self, joined, paired=False):
        super().__init__()
        self.joined, self.paired = joined, paired
        self.embed, self.out = nn.Linear(1, 6), nn.Linear(32, 3)
        self.first = nn.Linear(3 + 6 + 4, 32) if joined else nn.ModuleList(nn.Linear(w, 32) for w in (3, 6, 4))

    def forward(self, x, t, y):
        time = torch.sin(self.embed(t[:, None]))
        parts = [x, time * y.mean(1, keepdim=True) if self.paired else time, y]
        found = self.first(torch.cat(parts, 1)) if self.joined else sum(f(part) for f, part in zip(self.first, parts))
        return self.out(torch.relu(found))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("joined", [True, False])
def test_the_share_that_is_spared_is_that_of_what_a_row_does_not_repeat(joined, paired):
    net, y = Joined(joined, paired), torch.randn(5, 4)
    program = RowProgram.trace(net, (3,), torch.linspace(0.1, 0.9, 4), {"y": y})
    repeated = 3 * 32 + 32 * 3 + 6 * 32 * paired  # of x, and of the time where it comes with a sample's own condition
    assert program.spared == pytest.approx(1 - repeated / (6 + (3 + 6 + 4) * 32 + 32 * 3))
    assert f"{program.spared:.0%} of the multiplications run once" in fs.explain(net, (3,), y=y)


def test_explain():
    net, shape, *_ = make("TabSyn, EDM")
    text = fs.explain(net, shape, fs.EDM())
    assert "save 0\n" in text
    assert "linear 5 -> 16                 denoise_fn_F.proj\n" in text
    assert "affine * per draw, + per draw  denoise_fn_F.mlp.6\nadd 0 * per draw" in text
    assert text.endswith(
        "\non cpu: one PyTorch operation after another; kernels need a GPU, float32 and another backend"
    )
    assert "affine + per sample" in fs.explain(make("sbi VectorFieldMLP")[0], (3,), condition=torch.randn(6, 4))
    assert fs.explain(Odd(control_flow), (4,)).startswith("no row program: torch.export cannot trace")


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
