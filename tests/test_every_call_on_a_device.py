"""Every public call, with network and data on a (pretended) GPU, gives what it gives on the CPU, and leaves it there.

A row is a function of `on`, which puts modules and tensors on the device, and says which public names it covers:
`test_every_public_name_has_a_row` fails for a name that no row does. Networks are put there before a density is made
around them, and nobody calls `.cuda()` on the density, as in README.
"""

import importlib
import inspect
import math
from dataclasses import fields, is_dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pretended_device import CUDA, PretendedDevice
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import fastscore as fs
from fastscore import adapters, density, metrics, transforms
from fastscore.cli import commands as cli
from fastscore.densities import probability_flow
from fastscore.estimator import pilot, rules
from fastscore.process import predictions
from fastscore.runs.dataset import take
from fastscore.runs.evaluate import evaluate_dataset
from fastscore.training import losses

MODULES = ("fastscore", "fastscore.adapters", "fastscore.metrics", "fastscore.transforms", "fastscore.lightning")
D = 3
NFE = 24
ROWS = {}
COVERED = set()

pytestmark = pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")


def row(*covers, each=(None,)):
    """Add a row, or one for every value of `each`, and say which names it covers."""

    def add(call):
        COVERED.update(covers, filter(None, each))
        for value in each:
            ROWS[call.__name__ if value is None else f"{call.__name__}[{value}]"] = call, value
        return call

    return add


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A small MLP, a row program; with a label it has tables of every level."""

    def __init__(self, d=D, width=16):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.time, self.inside, self.out = nn.Linear(1, width), nn.Linear(d, width), nn.Linear(width, d)
            self.label = nn.Embedding(4, width)

    def forward(self, x_t, t, label=None):
        h = self.inside(x_t.flatten(1)) + self.time(t[:, None].to(self.out.weight.dtype) / 1000)
        h = h if label is None else h + self.label(label)
        return self.out(torch.nn.functional.silu(h)).reshape(x_t.shape)


def network():
    """What `fastscore evaluate` builds."""
    return Net()


def of(on, schedule=None, predicts="eps", **options):
    """Return a density around a network on the device; without a row program, which takes half a second to trace."""
    return fs.ScoreDensity(on(Net()), schedule or fs.VP(), predicts, **{"program": False} | options)


def mixture_data(count, d=D):
    centre = torch.tensor([-1.0, 1.0])[torch.arange(count) % 2]
    return 0.3 * random(count, d, seed=5) + centre[:, None]


X = mixture_data(6)
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
SCHEDULES = {
    "DDPM.linear": lambda: fs.DDPM.linear(100), "DDPM.scaled_linear": lambda: fs.DDPM.scaled_linear(100),
    "DDPM.cosine": lambda: fs.DDPM.cosine(100), "DDPM.from_betas": lambda: fs.DDPM.from_betas(torch.full((50,), 0.05)),
    "DDPM": lambda: fs.DDPM(torch.linspace(0.99, 0.01, 20)), "VP": fs.VP, "Cosine": fs.Cosine, "VE": fs.VE,
    "EDM": fs.EDM, "FlowMatching": fs.FlowMatching, "LiYan": fs.LiYan, "LogSNR": fs.LogSNR,
    "ConditionalFlow": lambda: fs.ConditionalFlow(0.1),
}  # fmt: skip
REFERENCES = {
    "isotropic": lambda: fs.Reference.isotropic(0.8),
    "diagonal": lambda: fs.Reference(torch.ones(1), random(1, D), random(1, D).exp()),
    "full": lambda: fs.Reference(torch.ones(1), random(1, D), random(1, D).exp(), torch.eye(D)[None]),
    "mixture": lambda: fs.Reference(torch.full((2,), 0.5), random(2, D), random(2, D).exp()),
    "mixture of full": lambda: fs.Reference(
        torch.full((2,), 0.5), random(2, D), random(2, D).exp(), torch.eye(D).expand(2, D, D)
    ),
}


def summary(found):
    """Return what an estimate says, in tensors and numbers."""
    return {f.name: getattr(found, f.name) for f in fields(found)}


# ---- the density


@row("ScoreDensity", "ScoreDensity.estimate", "Estimate", "Curve", each=list(SCHEDULES))
def estimate_on_a_schedule(on, name):
    return summary(of(on, SCHEDULES[name]()).estimate(on(X), nfe=NFE))


@row("ScoreDensity.estimate", each=[f"prediction {p}" for p in predictions.PREDICTIONS])
def estimate_of_a(on, name):
    return summary(of(on, predicts=name.removeprefix("prediction ")).estimate(on(X), nfe=NFE))


@row("ScoreDensity.estimate", each=[f"method {m}" for m in rules.METHODS])
def estimate_by(on, name):
    method = name.removeprefix("method ")
    return [summary(of(on, s).estimate(on(X), nfe=NFE, method=method)) for s in (fs.VP(), fs.DDPM.linear(100))]


@row("ScoreDensity.estimate", each=[f"noise {n}" for n in density.NOISES])
def estimate_with(on, name):
    return summary(of(on, noise=name.removeprefix("noise ")).estimate(on(X), nfe=NFE))


@row("ScoreDensity.estimate", "Reference", each=[f"reference {kind}" for kind in REFERENCES])
def estimate_against(on, name):
    reference = REFERENCES[name.removeprefix("reference ")]()
    found = of(on, reference=reference).estimate(on(X), nfe=NFE)
    assert {v.device.type for v in reference.tensors()} == {"cpu"}  # the user's own stays where it was
    return summary(found)


@row("ScoreDensity.estimate", each=["program True", "program False", "float64", "images", "no parameters"])
def estimate_for(on, name):
    if name == "float64":
        return summary(of(lambda v: on(v.double()), fs.VP()).estimate(on(X.double()), nfe=NFE))
    if name == "images":
        net, x = on(Net(8)), on(random(3, 2, 2, 2))
        return summary(fs.ScoreDensity(net, fs.VP()).estimate(x, nfe=NFE))
    if name == "no parameters":
        return summary(fs.ScoreDensity(WithoutParameters(), fs.VP()).estimate(on(X), nfe=NFE))
    return summary(of(on, program=name == "program True").estimate(on(X), nfe=NFE))


class WithoutParameters(nn.Module):
    def forward(self, x_t, t):
        return torch.tanh(x_t) * t[:, None]


class Scaled(Net):
    """A network with numbers that stay on the host, as PyTorch allows, whatever the shape of the data."""

    def __init__(self, d=D):
        super().__init__(d)
        self.factor = torch.tensor(0.5)  # an attribute, no buffer

    def forward(self, x_t, t, factor):
        return super().forward(x_t * self.factor, t) * factor


@row("ScoreDensity.estimate", "CapturedDensity", each=["numbers on the host", "images, numbers on the host"])
def estimate_with_numbers_on_the_host(on, name):
    x = X if name == "numbers on the host" else random(3, 2, 2, 2)
    made, given = fs.ScoreDensity(on(Scaled(x[0].numel())), fs.VP(), program=True), {"factor": torch.tensor(1.5)}
    captured = fs.CapturedDensity(made, on(x), nfe=NFE, **given)
    return summary(made.estimate(on(x), nfe=NFE, **given)), made.log_prob(on(x), nfe=NFE, **given), captured(on(x))


@row(
    "ScoreDensity.estimate",
    "per_sample",
    "shared",
    each=["a condition a sample", "a shared condition", "an index", "a target", "memory"],
)
def estimate_under(on, name):
    given = {
        "a condition a sample": {"label": fs.per_sample(on(LABELS))},
        "a shared condition": {"label": fs.shared(on(LABELS[:1]))},
        "an index": {"sample_index": torch.arange(10, 16)},
        "a target": {"target_stderr": 0.5, "max_nfe": 96},
        "memory": {"memory": "60KB"},
    }[name]
    return summary(of(on).estimate(on(X), nfe=NFE, **given))


@row("ScoreDensity.to", each=["density moved", "density moved after use", "network moved after use", "fitted, moved"])
def estimate_after(on, name):
    made = fs.ScoreDensity(Net(), fs.VP(), program=False)
    if "use" in name:
        made.estimate(X, nfe=NFE)
    if "fitted" in name:
        made.fit(mixture_data(100), evaluations=30_000, progress=False)
    on(made.model if "network" in name else made)
    found = summary(made.estimate(on(X), nfe=NFE))
    assert {b.device for b in made.reference.buffers()} == {on(X).device}
    return found


@row("ScoreDensity.log_prob", each=["general", "program", "frozen"])
def log_prob_with_gradients(on, name):
    made = of(on, program=name != "general")
    made.model.requires_grad_(name != "frozen")
    x = on(X.clone()).requires_grad_()
    value = made.log_prob(x, nfe=NFE)
    value.sum().backward()
    return value, x.grad, [p.grad for p in made.model.parameters() if p.grad is not None]


@row("ScoreDensity.compare", "Comparison")
def compare(on):
    return tuple(of(on).compare(on(X), {"label": on(LABELS)}, {"label": on(LABELS.flip(0))}, nfe=NFE))


@row("ScoreDensity.fit", each=[f"kind {kind}" for kind in pilot.KINDS])
def fit(on, name):
    made = of(on).fit(on(mixture_data(150)), reference=name.removeprefix("kind "), evaluations=30_000, progress=False)
    return made.state_dict(), summary(made.estimate(on(X), nfe=NFE))


@row("ScoreDensity.fit")
def fit_with_calibration_and_conditions(on):
    data, labels = mixture_data(100), torch.arange(100) % 4
    made = of(on).fit(on(data), evaluations=120_000, progress=False, label=on(labels))
    assert made.nodes.calibration.numel()
    return made.state_dict(), summary(made.estimate(on(X), nfe=NFE, label=on(LABELS)))


@row("ScoreDensity.fit")
def fit_to_data_on_the_host(on):
    data, labels = mixture_data(100), torch.arange(100) % 4
    made = of(on).fit(data, evaluations=30_000, progress=False, label=labels)
    return made.state_dict(), summary(made.estimate(on(X), nfe=NFE, label=on(LABELS)))


class Shifted(Net):
    """A network with a condition that all samples share, and labels, nested."""

    def forward(self, x_t, t, given):
        return super().forward(x_t, t, given.get("label")) + given["shift"]


SHIFT = random(1, D)
FITS = {
    "ScoreDensity": lambda of_shifted: of_shifted,
    "Transformed": lambda of_shifted: fs.Transformed(of_shifted, TRANSFORMS["zscore"]()),
    "DiffusionClassifier": lambda of_shifted: fs.DiffusionClassifier(
        of_shifted, {"given": {"label": torch.arange(4), "shift": fs.shared(SHIFT)}}
    ),
}


@row("ScoreDensity.fit", "Transformed.fit", "DiffusionClassifier.fit", each=[f"shared, {name}" for name in FITS])
def fit_to_the_hosts_data_under_what_all_share(on, name):
    made = FITS[name.removeprefix("shared, ")](fs.ScoreDensity(on(Shifted()), fs.VP(), program=False))
    if name == "shared, DiffusionClassifier":
        return summary(made.fit(mixture_data(40), evaluations=20_000, progress=False).classify(on(X), nfe=64))
    made.fit(mixture_data(100), evaluations=3000, progress=False, given={"shift": fs.shared(SHIFT)})
    return summary(made.estimate(on(X), nfe=NFE, given={"shift": fs.shared(on(SHIFT))}))


@row("ScoreDensity.with_reference", "ScoreDensity.network", "ScoreDensity.prepare", "ScoreDensity.check",
     "ScoreDensity.log_snr_range", "ScoreDensity.with_rounding", "ScoreDensity.calibration",
     "ScoreDensity.core", "ScoreDensity.to_network")  # fmt: skip
def with_reference_and_parts(on):
    made = of(on).with_reference(REFERENCES["mixture"]())
    samples, draws, _ = made.prepare(on(X), NFE, 0, None, None, {})
    parts = (
        samples.x,
        samples.index,
        draws.rules.of(0).weight,
        made.check(on(X), None, {}).x,
        made.network.predicts,
        made.log_snr_range,
    )
    return summary(made.estimate(on(X), nfe=NFE)), parts


@row("ScoreDensity.extra_repr", "explain")
def words(on):
    made = of(on)
    texts = [fs.explain(made.model, (D,)), fs.explain(made.model, (D,), label=on(LABELS))]
    return [repr(made), *(text.replace(f"on {on(X).device}", "") for text in texts)]


@row("Estimate.bits_per_dim", "Estimate.bits_per_dim_stderr", "Estimate.interval", "Estimate.mean")
def of_an_estimate(on):
    found = of(on).estimate(on(X), nfe=NFE)
    return found.bits_per_dim(256), found.bits_per_dim_stderr(), found.interval(0.9), found.mean(), repr(found)


# ---- schedules and references, called by themselves


@row("Schedule", "Schedule.log_snr", "Schedule.time", "Schedule.scale", "Schedule.alpha_sigma", "Schedule.derivatives",
     "Schedule.log_snr_range", "Schedule.range_for", each=[f"schedule {name}" for name in SCHEDULES])  # fmt: skip
def schedule(on, name):
    process = SCHEDULES[name.removeprefix("schedule ")]()
    log_snr = on(torch.linspace(*process.log_snr_range, 7, dtype=torch.float64)[1:-1])
    t = process.time(log_snr)
    slopes = () if process.discrete else process.derivatives(t)
    return (
        t,
        process.log_snr(t),
        process.alpha_sigma(t),
        process.scale(log_snr),
        slopes,
        process.log_snr_range,
        process.range_for(0.1, 2.0),
    )


@row("Reference.from_tensors", "Reference.isotropic", "Reference.components", "Reference.full", "Reference.tensors",
     "Reference.flops", "Reference.log_prob", "Reference.residual", "Reference.eps", "Reference.eps_and_divergence",
     "Reference.diffused", "Reference.gaussian", "Reference.expected_residual", "Reference.expected_integral",
     "Reference.on", "Reference.host", "Reference.scales", "Reference.scaled",
     each=[f"alone {kind}" for kind in REFERENCES])  # fmt: skip
def reference(on, name):
    kept = REFERENCES[name.removeprefix("alone ")]()
    q, x, eps = kept.on(on(X).device), on(X), on(random(6, 4, D))
    sigma = on(torch.linspace(0.1, 0.9, 4, dtype=torch.float64))
    alpha = (1 - sigma**2).sqrt()
    x_t = alpha[:, None] * x[:, None] + sigma[:, None] * eps
    single, weight = q.gaussian(), on(torch.ones(4, dtype=torch.float64))
    return [
        q.log_prob(x), q.residual(x, x_t.float(), eps, alpha, sigma), q.eps(x_t.float(), alpha, sigma),
        q.eps_and_divergence(x, 0.8, 0.6), q.diffused(0.1).log_prob(x), single.tensors(), q.components, q.full,
        q.flops(D), single.expected_residual(x, on(sigma), weight), single.expected_integral(x, -3, 3),
        fs.Reference.from_tensors(q.tensors()).log_prob(x), q.host("mean").numpy().sum(), q.scales(),
        q.scaled(2.0).log_prob(x),
    ]  # fmt: skip


# ---- training


@row("density_loss", "AdaptiveNodes", "AdaptiveNodes.density", "AdaptiveNodes.observe", "AdaptiveNodes.on",
     "AdaptiveNodes.host", each=[f"reduction {r}" for r in losses.REDUCTIONS])  # fmt: skip
def training(on, name):
    made, adaptive = of(on), on(fs.AdaptiveNodes(fs.VP()))
    optimizer, found = torch.optim.AdamW(made.model.parameters(), 1e-2), []
    for step in range(3):
        loss = fs.density_loss(
            made, on(X), seed=step, draws=2, antithetic=step > 0, nodes=adaptive,
            reduction=name.removeprefix("reduction "), label=on(LABELS),
        )  # fmt: skip
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        found.append(loss)
    return found, adaptive.state_dict(), dict(made.model.named_parameters()), adaptive.host("edges").numpy().sum()


@row("density_loss", "AdaptiveNodes")
def training_with_nodes_on_the_host(on):
    adaptive = fs.AdaptiveNodes(fs.VP())
    loss = fs.density_loss(of(on), on(X), seed=0, nodes=adaptive)
    return loss, adaptive.density.share.numpy().sum()


@row("DiffusionLoss", "DiffusionLoss.forward", "DiffusionLoss.log_prob", "DiffusionLoss.estimate")
def diffusion_loss(on):
    class Head(Net):
        def forward(self, x_t, t, c):
            return super().forward(x_t + c, t)

    loss = fs.DiffusionLoss(on(Head()))
    x, z = on(random(2, 4, D)), on(random(2, 4, D, seed=1)).requires_grad_()
    value = loss(x, z, seed=0, mask=on(torch.arange(8).reshape(2, 4) % 2 == 0))
    value.backward()
    return value, z.grad, loss.log_prob(x, z, nfe=NFE), summary(loss.estimate(x, z, nfe=NFE))


@row("score_regularization")
def regularization(on):
    x = on(X.clone()).requires_grad_()
    value = fs.score_regularization(of(on), x, seed=0, draws=2)
    value.backward()
    return value, x.grad


@row("density_weights", "elbo_weights", each=[f"weights {p}" for p in predictions.PREDICTIONS if p != "flow"])
def weights(on, name):
    t, predicts = on(torch.arange(100).reshape(10, 10)), name.removeprefix("weights ")
    table = fs.DDPM.linear(100)
    rules = [fs.density_weights(table, t, predicts, rule) for rule in ("discrete", "density")]
    return rules, fs.elbo_weights(table, t, predicts)


# ---- discrete data, other spaces, classes


@row("Levels", "Levels.width", "Levels.low", "Levels.high", "Levels.values", "Levels.dequantize", "discrete_log_prob",
     each=["levels, one Gaussian", "levels, a mixture"])  # fmt: skip
def levels(on, name):
    grid, k = fs.Levels(8), on(torch.arange(6 * D).reshape(6, D) % 8)
    made = of(on, fs.DDPM.linear(100), reference=REFERENCES["mixture" if "mixture" in name else "isotropic"]())
    found = fs.discrete_log_prob(made, k, grid, nfe=NFE)
    drawn = grid.dequantize(k), grid.dequantize(k, sample_index=torch.arange(6))
    return summary(found), drawn, grid.values(k), (grid.width, grid.low, grid.high)


TRANSFORMS = {
    "zscore": lambda: transforms.zscore(random(D), random(D).exp()),
    "Logit": lambda: transforms.Logit(-5, 5),
    "Whitening": lambda: transforms.Whitening(torch.zeros(D), torch.eye(D), torch.ones(D)),
    "whiten": lambda: transforms.whiten(mixture_data(50)),
    "a chain": lambda: (
        torch.distributions.ComposeTransform(
            [transforms.Logit(-5, 5).inv, transforms.zscore(random(D), random(D).exp()).inv]
        ).inv
    ),
}


class Centred(nn.Module):
    def forward(self, x_t, t):
        return torch.tanh(x_t - x_t.mean(1, keepdim=True)) * t[:, None, None]


@row("ZeroMeanDensity", "ZeroMeanDensity.compare", "ZeroMeanDensity.coordinates", "ZeroMeanDensity.estimate",
     "ZeroMeanDensity.fit", "ZeroMeanDensity.log_prob")  # fmt: skip
def centred_points(on):
    made, x = fs.ZeroMeanDensity(Centred(), fs.VP(), program=False), random(30, 4, 2)
    x = on(x - x.mean(1, keepdim=True))
    made.fit(x, evaluations=3000, progress=False)
    found = made.estimate(x[:4], nfe=NFE)
    return [
        summary(found), made.log_prob(x[:4], nfe=NFE), made.compare(x[:4], {}, {}, nfe=NFE),
        made.coordinates(x[:4])[0],
    ]  # fmt: skip


@row("ScoreDensity.estimate", each=["a mask"])
def under_a_mask(on, name):
    made, mask = of(on), torch.ones(len(X), D, dtype=torch.bool)
    mask[:3, 0] = False
    through = fs.Transformed(made, transforms.zscore(0.3, 2.0)).fit(mixture_data(60), evaluations=3000, progress=False)
    return summary(made.estimate(on(X), nfe=NFE, mask=on(mask))), through.log_prob(on(X), nfe=NFE, mask=on(mask))


@row("Transformed.core", "Transformed.log_snr_range", "Transformed.model", "Transformed.nfe", "Transformed.predicts",
     "Transformed.schedule", "Transformed.with_reference")  # fmt: skip
def parts_of_transformed(on):
    made = fs.Transformed(of(on), transforms.zscore(0.3, 2.0)).with_reference(fs.Reference.isotropic(0.7))
    parts = made.core.predicts, made.predicts, made.nfe, made.log_snr_range, repr(made.schedule)
    return summary(made.estimate(on(X), nfe=NFE)), parts, type(made.model).__name__


@row("Transformed", "Transformed.log_prob", "Transformed.estimate", "Transformed.compare", "Transformed.fit",
     "Transformed.to_network", "Transformed.extra_repr",
     "Logit.log_abs_det_jacobian", "Whitening.log_abs_det_jacobian", "moved", each=list(TRANSFORMS))  # fmt: skip
def transformed(on, name):
    transform = TRANSFORMS[name]()
    tensors = [v for v in vars(transform).values() if isinstance(v, Tensor)]
    made = fs.Transformed(of(on), transform)
    x = on(X.clone()).requires_grad_()
    value = made.log_prob(x, nfe=NFE)
    value.sum().backward()
    compared = made.compare(on(X), {"label": on(LABELS)}, {"label": on(LABELS.flip(0))}, nfe=NFE)
    z = made.to_network(on(X))
    fitted = [made.fit(data, evaluations=1000, progress=False).density.reference.tensors()
              for data in (on(mixture_data(40)), mixture_data(40))]  # fmt: skip
    assert all(v.device.type == "cpu" for v in tensors)  # the user's transform stays where it was
    moved = transforms.moved(transform, on(X).device)
    return value, x.grad, summary(made.estimate(on(X), nfe=NFE)), tuple(compared), z, fitted, moved(z[0]), repr(made)


@row("Transformed.to")
def transformed_and_moved(on):
    made = fs.Transformed(fs.ScoreDensity(Net(), fs.VP()), TRANSFORMS["zscore"]())
    made.log_prob(X, nfe=NFE)
    return on(made).log_prob(on(X), nfe=NFE), made.transform.loc


@row("whiten")
def whitening_of_data_there(on):
    transform = transforms.whiten(on(mixture_data(50)))
    return fs.Transformed(of(on), transform).log_prob(on(X), nfe=NFE), transform.std


@row("DiffusionClassifier", "DiffusionClassifier.classify", "DiffusionClassifier.fit", "Classification",
     "Classification.topk", "Classification.decided", "Classification.joined",
     each=["weighting density", "weighting uniform", "fitted classifier", "fitted to the host's data"])  # fmt: skip
def classifier(on, name):
    made = fs.DiffusionClassifier(of(on), {"label": torch.arange(4)}, prior=torch.tensor([0.1, 0.2, 0.3, 0.4]))
    if "fitted" in name:
        data = mixture_data(40) if "host" in name else on(mixture_data(40))
        made.fit(data, evaluations=20_000, progress=False)
    found = made.classify(on(X), nfe=64, weighting="uniform" if "uniform" in name else "density")
    twice = fs.Classification.joined([found, found])
    return summary(found), found.topk(2), found.decided, twice.nfe, repr(found), made.nodes.density.share


# ---- the ODE, graphs


ODE = {
    "exact": {"error": 1.0},
    "hutchinson": {"trace": "hutchinson", "probes": 2, "method": "midpoint", "steps": 3},
    "midpoint": {"method": "midpoint", "steps": 4},
    "dopri5": {"method": "dopri5", "rtol": 1e-2, "atol": 1e-2},
    "rk4": {"method": "rk4", "steps": 2},
}


@row("probability_flow_log_prob", "FlowLogProb", each=[f"ODE {name}" for name in ODE])
def ode(on, name):
    options = ODE[name.removeprefix("ODE ")]
    if options.get("method") not in (None, "midpoint"):
        pytest.importorskip("torchdiffeq")
    made = of(on, reference=REFERENCES["mixture"]())
    return tuple(fs.probability_flow_log_prob(made, on(X), **options, label=on(LABELS)))


@row("CapturedDensity", each=["captured program", "captured network", "captured, fitted", "captured in chunks",
                              "captured, masked"])  # fmt: skip
def captured(on, name):
    made = of(on, fs.DDPM.linear(100), program=name != "captured network")
    given = {"label": on(LABELS)}
    if "masked" in name:
        made = made.with_reference(REFERENCES["mixture"]())
        given["mask"] = on(torch.arange(6 * D).reshape(6, D) % 4 > 0)
    if "fitted" in name:
        made.fit(on(mixture_data(100)), evaluations=120_000, progress=False)
    memory = "60KB" if "chunks" in name else None
    graph = fs.CapturedDensity(made, on(X), nfe=NFE, memory=memory, **given)
    assert (graph.graph is not None) == on(X).is_cuda
    found = [graph(on(X)), graph(on(X + 0.1)), graph(on(X), seed=3), graph(X)]
    with torch.no_grad():
        for p in made.model.parameters():
            p.mul_(1.1)
    found.append(graph(on(X)))  # of the new weights
    direct = made.estimate(on(X), nfe=NFE, seed=3, **given)
    assert torch.allclose(found[-1][0], direct.log_prob, rtol=1e-5, atol=1e-4)
    return found


# ---- metrics and the command line


METRICS = ["NegativeLogLikelihood", "BitsPerDim"]


@row("NegativeLogLikelihood.update", "NegativeLogLikelihood.forward", "NegativeLogLikelihood.compute",
     "BitsPerDim.update", "BitsPerDim.forward", "BitsPerDim.compute", each=METRICS)  # fmt: skip
def metric(on, name):
    found = []
    for place in (on, lambda v: v):  # the metric on the device, and on the host
        made = place(getattr(metrics, name)(of(on), nfe=NFE))
        made.update(on(X))
        made.update(on(X), sample_index=torch.arange(6, 12), label=on(LABELS))
        found.append({k: v.cpu() for k, v in (made.compute() | made(on(X))).items()})
    return found


@row("LogDensity", "LogDensity.on_validation_epoch_start", "LogDensity.on_validation_batch_end",
     "LogDensity.on_validation_epoch_end")  # fmt: skip
def callback(on):
    pytest.importorskip("lightning")
    from fastscore.lightning import LogDensity

    logged, made = {}, of(on)
    log = LogDensity(metrics.BitsPerDim(made, nfe=NFE))
    trainer = SimpleNamespace(state=SimpleNamespace(fn="validate"))
    module = SimpleNamespace(device=on(X).device, log_dict=lambda values, prog_bar: logged.update(values))
    log.on_validation_epoch_start(trainer, module)
    log.on_validation_batch_end(trainer, module, None, (on(X), None), 0)
    log.on_validation_epoch_end(trainer, module)
    return logged


@row("evaluate_dataset", each=["data there", "data on the host"])
def data_set(on, name, folder):
    data = on(X) if name == "data there" else X.numpy()
    fitted = on(mixture_data(40)) if name == "data there" else mixture_data(40)
    options = {"nfe": NFE, "batch": 4, "fit": fitted, "restart": True}
    found = evaluate_dataset(of(on), data, folder / "found.npz", **options)
    return summary(found), take(X, torch.arange(2))


@row("evaluate_dataset")
def data_set_under_conditions(on, folder):
    labels, shift = torch.arange(40) % 4, fs.shared(SHIFT)
    given = {"cond": {"given": {"label": LABELS.numpy(), "shift": shift}}}
    given["fit_cond"] = {"given": {"label": labels, "shift": shift}}
    made = fs.ScoreDensity(on(Shifted()), fs.VP(), program=False)
    found = evaluate_dataset(
        made, X, folder / "found.npz", fit=mixture_data(40), nfe=NFE, batch=4, restart=True, **given
    )
    return summary(found)


@row("evaluate", each=["a factory", "an exported program"])
def command_line(on, name, folder):
    data, fitted, out = folder / "x.npy", folder / "fit.npy", folder / "found.npz"
    np.save(data, X.numpy())
    np.save(fitted, mixture_data(40).numpy())
    model = f"{__name__}:network"
    if name == "an exported program":
        rows = torch.export.Dim("rows")
        example = torch.randn(2, D), torch.rand(2)
        shapes = {"x_t": {0: rows}, "t": {0: rows}}
        torch.export.save(torch.export.export(Net(), example, dynamic_shapes=shapes), folder / "net.pt2")
        model = str(folder / "net.pt2")
    words = f"evaluate {model} {data} --out {out} --fit {fitted} --schedule vp --predicts eps --nfe {NFE} --batch 4"
    words = [*words.split(), "--device", on(X).device.type, "--restart"]
    done = CliRunner().invoke(cli.main, words)
    assert done.exit_code == 0, (done.output, done.exception)
    with np.load(out) as found:
        return {key: torch.from_numpy(found[key]) for key in found.files}


# ---- adapters, with stand-ins for the libraries' objects


OPTIONS = {"program": False}


def table_of():
    return torch.linspace(0.99, 0.02, 50)


class Wrapped(nn.Module):
    """A network under another library's interface, with what its object holds."""

    def __init__(self, call, **held):
        super().__init__()
        self.net, self.call = Net(), call
        for name, value in held.items():
            self.register_buffer(name, value) if isinstance(value, Tensor) else setattr(self, name, value)

    def forward(self, *args, **kwargs):
        return self.call(self.net, *args, **kwargs)


def named(name, **attributes):
    return type(name, (), attributes)()


def from_diffusers(on):
    def net():
        return Wrapped(lambda net, x, timestep, **c: SimpleNamespace(sample=net(x, timestep, **c)))

    class Config(dict):  # as diffusers has them
        __getattr__ = dict.__getitem__

    config = Config(prediction_type="v_prediction", num_train_timesteps=20)
    table = SimpleNamespace(config=config, alphas_cumprod=table_of())
    options = dict.fromkeys(("shift", "shift_terminal", "invert_sigmas"), None) | {"num_train_timesteps": 1000}
    flow = named("FlowMatchEulerDiscreteScheduler", config=Config(options), sigma_min=0.01)
    return [
        adapters.from_diffusers(on(net()), table, **OPTIONS),
        adapters.from_diffusers(on(net()), flow, time="t", **OPTIONS),
    ]


def from_edm(on):
    plain = Wrapped(lambda net, x, sigma: net(x, sigma), sigma_data=0.5)
    rounded = Wrapped(lambda net, x, sigma: net(x, sigma), u=torch.linspace(80, 0, 30))
    return [adapters.from_edm(on(plain), **OPTIONS), adapters.from_edm(on(rounded), **OPTIONS)]


def from_flow_matching(on):
    cosine = named(
        "CosineScheduler",
        __call__=lambda self, t: SimpleNamespace(
            alpha_t=torch.sin(math.pi / 2 * t), sigma_t=torch.cos(math.pi / 2 * t),
            d_alpha_t=math.pi / 2 * torch.cos(math.pi / 2 * t), d_sigma_t=-math.pi / 2 * torch.sin(math.pi / 2 * t),
        ),
        snr_inverse=lambda self, snr: 2 / math.pi * torch.atan(snr),
    )  # fmt: skip
    return [adapters.from_flow_matching(on(Net()), path, **OPTIONS) for path in (None, cosine)]


def from_guided_diffusion(on):
    whole = {"alphas_cumprod": table_of().double().numpy(), "model_mean_type": "EPSILON", "rescale_timesteps": False}
    spaced = whole | {"rescale_timesteps": True, "timestep_map": range(0, 100, 2), "original_num_steps": 100}
    return [adapters.from_guided_diffusion(on(Net()), SimpleNamespace(**kept), **OPTIONS) for kept in (whole, spaced)]


def from_k_diffusion(on):
    plain = Wrapped(lambda net, x, sigma: net(x, sigma), sigma_data=0.5)
    table = Wrapped(lambda net, x, sigma: net(x, sigma), sigma_data=1.0, sigmas=torch.linspace(0.01, 80, 30))
    return [adapters.from_k_diffusion(on(plain), **OPTIONS), adapters.from_k_diffusion(on(table), **OPTIONS)]


def from_lucidrains(on):
    ratio = (1 / table_of().double() - 1).sqrt().float()
    kept = {"objective": "pred_noise", "sqrt_recipm1_alphas_cumprod": ratio}
    made = [Wrapped(None, **kept, normalize=lambda x: 2 * x - 1), Wrapped(None, **kept, normalize=lambda x: x)]
    for diffusion in made:
        diffusion.model = diffusion.net
    return [adapters.from_lucidrains(on(diffusion), **OPTIONS) for diffusion in made]


class VPScoreEstimator(Wrapped):
    def score(self, theta, condition, t):
        return self.net(theta + condition, t)


class FlowMatchingEstimator(VPScoreEstimator):
    def forward(self, theta, condition, t):
        return self.net(theta + condition, t)


def from_sbi(on):
    kept = {
        "condition_shape": torch.Size([D]), "input_shape": torch.Size([D]), "mean_0": torch.full((D,), 0.1),
        "std_0": torch.full((D,), 1.5), "beta_min": 0.1, "beta_max": 10.0, "t_min": 1e-3, "t_max": 1.0,
        "noise_scale": 1e-3, "_theta_shift": torch.full((D,), 0.2), "_theta_scale": torch.full((D,), 2.0),
    }  # fmt: skip
    plain = {k: v for k, v in kept.items() if k != "noise_scale"}
    x = torch.full((D,), 0.3)
    return [
        adapters.from_sbi(on(VPScoreEstimator(None, **plain)), on(x), **OPTIONS),
        adapters.from_sbi(on(VPScoreEstimator(None, **plain)), x, **OPTIONS),  # an observation on the host
        adapters.from_sbi(on(FlowMatchingEstimator(None, **kept)), on(x), **OPTIONS),
    ]


def from_score_models(on):
    class ScoreModel(Wrapped):
        def score(self, t, x, *conditions):
            return self.net(x, t, *conditions)

    return [
        adapters.from_score_models(on(ScoreModel(None, sde=sde)), **OPTIONS)
        for sde in (
            named("VESDE", T=1, epsilon=1e-5, sigma_min=0.01, sigma_max=50.0),
            named("VPSDE", T=1, epsilon=1e-5, beta_min=0.1, beta_max=20.0),
        )
    ]


def from_score_sde(on):
    alpha = table_of().sqrt()
    vp = {"beta_0": 0.1, "beta_1": 20.0, "sqrt_alphas_cumprod": alpha, "sqrt_1m_alphas_cumprod": (1 - alpha**2).sqrt()}
    ve = {"sigma_min": 0.01, "sigma_max": 50.0, "discrete_sigmas": torch.logspace(-2, 1.7, 30)}
    kinds = [("VPSDE", vp, True), ("VPSDE", vp, False), ("subVPSDE", vp, True)]
    kinds += [("VESDE", ve, True), ("VESDE", ve, False)]
    return [adapters.from_score_sde(on(Net()), named(name, **held), whole, **OPTIONS) for name, held, whole in kinds]


@row(each=adapters.__all__)
def adapter(on, name):
    found = []
    for made in globals()[name](on):
        inner = getattr(made, "density", made)
        found += [inner.schedule.log_snr_range, summary(made.estimate(on(X), nfe=NFE))]
    # Wrapped on the host, used there, and then the network alone goes to the device.
    for made in globals()[name](lambda v: v):
        made.estimate(X, nfe=NFE)
        inner = getattr(made, "density", made)
        for child in inner.model.children() if inner.model.__module__.startswith("fastscore") else [inner.model]:
            on(child)
        found.append(summary(made.estimate(on(X), nfe=NFE)))
    return found


# ---- the tests


def call(name, on, folder):
    """Call a row with `on`, with its value if it has one, and with a folder if it writes files."""
    function, value = ROWS[name]
    more = {"folder": folder} if "folder" in inspect.signature(function).parameters else {}
    return function(on, **more) if value is None else function(on, value, **more)


@pytest.mark.parametrize("name", ROWS)
def test_a_call_on_the_device_gives_what_it_gives_on_the_host(name, tmp_path):
    expected, spec = tree_flatten(call(name, lambda thing: thing, tmp_path))
    with PretendedDevice():
        found, found_spec = tree_flatten(call(name, lambda thing: thing.to("cuda"), tmp_path))
        places = {v.device for v in found if isinstance(v, Tensor)}
        found = [v.cpu() if isinstance(v, Tensor) else v for v in found]
    assert CUDA in places or not any(isinstance(v, Tensor) for v in found) or name.partition("[")[0] in ON_THE_HOST
    assert found_spec == spec
    for got, wanted in zip(found, expected, strict=True):
        if isinstance(wanted, Tensor | float | np.floating):
            # The same sums: on a GPU chunks are larger, and float32 sums of another order differ by some roundings.
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)
        else:
            assert got == wanted


# Their results are files or numbers of the host by what they are.
ON_THE_HOST = {
    "command_line",
    "data_set",
    "data_set_under_conditions",
    "metric",
    "words",
    "training_with_nodes_on_the_host",
}


def public_names():
    """Return the public functions and classes of the package, and the public methods that its classes define."""
    names = {"evaluate"}  # the command
    for module_name in MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        listed = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
        for name in listed:
            thing = getattr(module, name)
            if not callable(thing) or not getattr(thing, "__module__", "").startswith("fastscore"):
                continue
            if "__all__" not in vars(module) and thing.__module__ != module_name:
                continue  # imported there
            names.add(name)
            if inspect.isclass(thing):
                names |= {f"{name}.{method}" for method in methods_of(thing)}
    return names


def methods_of(cls):
    own = [base for base in cls.__mro__ if base.__module__.startswith("fastscore")]
    attributes = {f.name for f in fields(cls)} if is_dataclass(cls) else set(getattr(cls, "_fields", ()))
    kinds = property | classmethod | staticmethod
    found = {name: value for base in own for name, value in vars(base).items() if not name.startswith("_")}
    return {name for name, value in found.items() if callable(value) or isinstance(value, kinds)} - attributes


def covered():
    """Return the names that rows cover; what a schedule defines is covered where every schedule is called."""
    names = COVERED | {name.partition(".")[0] for name in COVERED}
    for schedule_name in SCHEDULES:
        cls = schedule_name.partition(".")[0]
        names |= {f"{cls}.{name.partition('.')[2]}" for name in COVERED if name.startswith("Schedule.")}
    return names


def test_every_public_name_has_a_row():
    assert sorted(public_names() - covered()) == []


def test_a_public_name_without_a_row_is_reported(monkeypatch):
    def a_new_one():
        pass

    a_new_one.__module__ = "fastscore.new"
    monkeypatch.setattr(fs, "a_new_one", a_new_one, raising=False)
    monkeypatch.setattr(fs, "__all__", [*fs.__all__, "a_new_one"])
    monkeypatch.setattr(fs.ScoreDensity, "a_new_method", a_new_one, raising=False)
    assert sorted(public_names() - covered()) == ["ScoreDensity.a_new_method", "a_new_one"]


def test_every_solver_of_the_ode_that_is_named_here_is_known():
    named_here = {options.get("method", "auto") for options in ODE.values()}
    assert {"auto", "midpoint"} <= named_here
    assert named_here & set(probability_flow.ADAPTIVE)
    assert {options.get("trace", "exact") for options in ODE.values()} == set(probability_flow.TRACES)
