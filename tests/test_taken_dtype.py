"""The dtype and the device of the network's input are what the network takes, not those of its first parameter."""

import pytest
import torch
from mixtures import ExactEps, Mixture
from torch import nn
from torch.nn import functional as F

import fastscore as fs

pytestmark = pytest.mark.usefixtures("one_thread")
VP = fs.VP()
TARGET = Mixture(torch.tensor([[1.0, -1.0, 0.5], [-1.0, 0.5, 0.0]]), torch.full((2, 3), 0.3))
X = TARGET.sample(60, torch.Generator().manual_seed(0))
NARROW = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(4, 32), nn.Linear(32, 3)
        self.seen = []

    def forward(self, x_t, t, y=None):
        self.seen.append(x_t.dtype)
        shift = 0 if y is None else y[:, None].to(x_t)
        return 0.9 * x_t + 0.1 * self.last(F.silu(self.first(torch.cat([x_t, t[:, None].to(x_t)], 1) + shift)))


def numbers(network, **cond):
    return fs.ScoreDensity(network, VP, "eps", program=False).estimate(X, nfe=32, **cond).log_prob


class Exact(nn.Module):
    """An exact network that predicts the clean data, computes in float32, and stores a number in another dtype."""

    def __init__(self, dtype):
        super().__init__()
        self.stored = nn.Parameter(torch.zeros(3, dtype=dtype), requires_grad=False)
        self.eps = ExactEps(TARGET, VP)

    def forward(self, x_t, t):
        x_t = x_t.float()
        alpha, sigma = (v[:, None].float() for v in VP.alpha_sigma(t))
        return (x_t - sigma * self.eps(x_t, t)) / alpha


@pytest.mark.parametrize("dtype", NARROW)
def test_a_network_that_computes_in_float32_gets_data_that_nobody_has_rounded(dtype):
    # Data predicted from x_t in bfloat16 were wrong by 13 nats, from float8 by 3,698, with no word of the rounding.
    found = fs.ScoreDensity(Exact(dtype), VP, "x0").estimate(X, nfe=64)
    alone = fs.ScoreDensity(Exact(torch.float32), VP, "x0").estimate(X, nfe=64)
    assert torch.equal(found.log_prob, alone.log_prob)


@pytest.mark.parametrize("dtype", NARROW[:2])
def test_layers_of_half_precision_get_it(dtype):
    network = Small().to(dtype)
    density = fs.ScoreDensity(network, VP, "eps", program=False)
    density.estimate(X, nfe=32)
    assert network.seen[0] == torch.float32  # asked once, and refused by the first layer
    assert set(network.seen[1:]) == {dtype}
    before = len(network.seen)
    density.estimate(X, nfe=32, seed=1)
    assert set(network.seen[before:]) == {dtype}


def test_a_frozen_first_parameter_of_half_precision_changes_nothing():
    network, plain = Small(), Small()
    first = nn.Module()
    first.frozen = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16), requires_grad=False)
    network._modules = {"first_of_all": first, **network._modules}
    assert next(network.parameters()).dtype == torch.bfloat16
    assert torch.equal(numbers(network), numbers(plain))


def test_it_is_asked_with_the_conditions_of_the_call():
    """A fit checks data before its conditions; a question without these would be refused, whatever the dtype."""
    network = Small()
    network.first_of_all = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16), requires_grad=False)
    density = fs.ScoreDensity(network, VP, "eps", program=False)
    density.fit(X, y=torch.ones(len(X)), evaluations=20_000, progress=False)
    assert set(network.seen) == {torch.float32}


def test_under_autocast_it_is_asked_anew():
    network = Small().to(torch.bfloat16)
    density = fs.ScoreDensity(network, VP, "eps", program=False)
    density.estimate(X, nfe=32)
    network.seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        density.estimate(X, nfe=32)
    assert set(network.seen) == {torch.float32}  # autocast rounds where layers want it
    network.seen.clear()
    density.estimate(X, nfe=32)
    assert set(network.seen) == {torch.bfloat16}


@pytest.mark.parametrize("dtype", NARROW[::2])
def test_layerwise_casting_of_diffusers(dtype):
    hooks = pytest.importorskip("diffusers.hooks")
    network, rounded = Small(), Small()
    for part in rounded.parameters():
        part.data = part.data.to(dtype).float()
    options = {"storage_dtype": dtype, "compute_dtype": torch.float32, "skip_modules_pattern": ()}
    hooks.apply_layerwise_casting(network, **options)
    # Layers compute in float32 and hand on the dtype that they got: the numbers of the rounded weights, to float32's
    # rounding of sums of 32 rows.
    assert torch.allclose(numbers(network), numbers(rounded), atol=1e-4)


def test_offloading_of_accelerate():
    accelerate = pytest.importorskip("accelerate")
    network = accelerate.cpu_offload(Small(), execution_device=torch.device("cpu"))
    assert next(network.parameters()).is_meta
    assert torch.allclose(numbers(network), numbers(Small()), atol=1e-5)
    density = fs.ScoreDensity(network, VP, "eps").fit(X, evaluations=20_000, progress=False)
    assert density.estimate(X, nfe=32).log_prob.isfinite().all()


def test_a_network_on_meta_without_hooks_is_still_refused():
    with pytest.raises(ValueError, match="x is on cpu and the network on meta"):
        numbers(Small().to("meta"))


class Labelled(Exact):
    """The same, with a label that it adds nothing for, and that has to be there, one a row."""

    def forward(self, x_t, t, y):
        return super().forward(x_t + 0 * y[:, None].to(x_t), t)


def test_a_call_that_is_wrong_in_itself_is_not_taken_for_an_answer():
    """After a forgotten condition, the right call was refused, or rounded without a word, for as long as it lived."""
    y = torch.zeros(len(X))
    wanted = fs.ScoreDensity(Labelled(torch.float32), VP, "x0").estimate(X, nfe=32, y=y).log_prob
    density = fs.ScoreDensity(Labelled(torch.bfloat16), VP, "x0")
    with pytest.raises(ValueError, match="y"):
        density.estimate(X, nfe=32)
    assert torch.equal(density.estimate(X, nfe=32, y=y).log_prob, wanted)


def test_batch_norm_is_asked_with_more_than_one_row():
    class Normed(Exact):
        def __init__(self, dtype):
            super().__init__(dtype)
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x_t, t):
            self.norm(x_t.float())
            return super().forward(x_t, t)

    network = Normed(torch.bfloat16).train()
    fs.ScoreDensity(network, VP, "x0").estimate(X, nfe=16)
    alone = fs.ScoreDensity(Exact(torch.float32), VP, "x0").estimate(X, nfe=16).log_prob
    assert torch.equal(fs.ScoreDensity(network, VP, "x0").estimate(X, nfe=16).log_prob, alone)


def test_a_layer_that_changes_its_dtype_is_asked_anew():
    network = Small().to(torch.bfloat16)
    numbers(network)
    network.seen.clear()
    network.float()
    numbers(network)
    assert set(network.seen) == {torch.float32}
    network = Exact(torch.bfloat16)
    network.layer = nn.Linear(3, 3)
    network.forward = lambda x_t, t: Exact.forward(network, network.layer(x_t) * 0 + x_t, t)
    fs.ScoreDensity(network, VP, "x0").estimate(X, nfe=16)
    network.layer.bfloat16()
    assert fs.ScoreDensity(network, VP, "x0").estimate(X, nfe=16).log_prob.isfinite().all()


def test_data_of_float64_go_into_float32_before_half_precision():
    class Single(Exact):
        """Takes float32 alone, and says so."""

        def forward(self, x_t, t):
            if x_t.dtype != torch.float32:
                raise RuntimeError(f"float32 expected, got {x_t.dtype}")
            return super().forward(x_t, t)

    found = fs.ScoreDensity(Single(torch.bfloat16), VP, "x0").estimate(X.double(), nfe=32).log_prob
    assert found.dtype == torch.float64
    # Float32's rounding of x_t, in networks that predict the clean data.
    wanted = fs.ScoreDensity(Exact(torch.float32), VP, "x0").estimate(X.double(), nfe=32).log_prob
    assert torch.allclose(found, wanted, atol=1e-2)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_float8_is_no_dtype_to_compute_in(compute):
    hooks = pytest.importorskip("diffusers.hooks")
    network = Small()
    options = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": compute, "skip_modules_pattern": ()}
    hooks.apply_layerwise_casting(network, **options)
    assert numbers(network).isfinite().all()
    assert network.seen[-1] == compute


def test_a_data_set_s_conditions_are_asked_with_it(tmp_path):
    from fastscore.runs import evaluate_dataset

    network = Labelled(torch.bfloat16)
    density = fs.ScoreDensity(network, VP, "x0")
    y = torch.linspace(0, 1, len(X))
    found = evaluate_dataset(density, X.numpy(), tmp_path / "found.npz", nfe=32, cond={"y": y.numpy()}, progress=False)
    wanted = fs.ScoreDensity(Labelled(torch.float32), VP, "x0").estimate(X, nfe=32, y=y).log_prob
    assert torch.allclose(torch.as_tensor(found.log_prob), wanted, atol=1e-5)


def test_a_data_set_goes_through_an_offloaded_network(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from fastscore.runs import evaluate_dataset

    network = accelerate.cpu_offload(Small(), execution_device=torch.device("cpu"))
    density = fs.ScoreDensity(network, VP, "eps")
    found = evaluate_dataset(density, X.numpy(), tmp_path / "found.npz", nfe=32, progress=False)
    assert torch.allclose(torch.as_tensor(found.log_prob), numbers(Small()), atol=1e-4)
    assert "meta" in fs.explain(network, shape=(3,))
