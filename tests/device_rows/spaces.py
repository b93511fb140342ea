"""Rows of discrete data, other spaces, classes, the ODE and graphs."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import fastscore as fs
from fastscore import transforms

from .common import LABELS, NFE, REFERENCES, D, Net, X, mixture_data, of, random, row, summary


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
     "ZeroMeanDensity.fit", "ZeroMeanDensity.log_prob", "ZeroMeanDensity.core", "ZeroMeanDensity.log_snr_range",
     "ZeroMeanDensity.model", "ZeroMeanDensity.nfe", "ZeroMeanDensity.predicts", "ZeroMeanDensity.schedule",
     "ZeroMeanDensity.with_reference", "ZeroMeanDensity.to_network", "ZeroMeanDensity.network_arguments",
     "ScoreDensity.network_arguments", "Transformed.network_arguments")  # fmt: skip
def centred_points(on):
    made, x = fs.ZeroMeanDensity(Centred(), fs.VP(), "eps", program=False), random(30, 4, 2)
    x = on(x - x.mean(1, keepdim=True))
    made.fit(x, evaluations=3000, progress=False)
    found = made.estimate(x[:4], nfe=NFE)
    return [
        summary(found), made.log_prob(x[:4], nfe=NFE), *made.compare(x[:4], {}, {}, nfe=NFE),
        made.coordinates(x[:4])[0], made.core.predicts, made.predicts, made.nfe, made.log_snr_range,
        repr(made.schedule), type(made.model).__name__,
        *under_masks(made.with_reference(fs.Reference.isotropic(0.7)), x[:4]),
    ]  # fmt: skip


def under_masks(made, x):
    """Two atoms of four, of which the mean is taken away; the network sees the others where they are."""
    atoms = torch.arange(4, device=x.device)[:, None] % 4 != torch.arange(4, device=x.device)
    x = torch.where(atoms[..., None], x - (x * atoms[..., None]).sum(1, keepdim=True) / 3, x)
    flow = fs.probability_flow_log_prob(made, x, method="midpoint", steps=4, mask=atoms)
    z, (counted, given) = made.to_network(x, atoms)[0], made.network_arguments(x, atoms, {"label": 1})
    return summary(made.estimate(x, nfe=NFE, mask=atoms)), tuple(flow), z, counted, sorted(given)


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
    made = fs.Transformed(fs.ScoreDensity(Net(), fs.VP(), "eps"), TRANSFORMS["zscore"]())
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


ODE = {
    "exact": {"error": 1.0},
    "hutchinson": {"trace": "hutchinson", "probes": 2, "method": "midpoint", "steps": 3},
    "midpoint": {"method": "midpoint", "steps": 4},
    "dopri5": {"method": "dopri5", "rtol": 1e-2, "atol": 1e-2},
    "rk4": {"method": "rk4", "steps": 2},
    "masked": {"method": "midpoint", "steps": 4},
    "of a table": {"method": "midpoint", "steps": 4},
}


class Halving(nn.Module):
    """An autoencoder of X: a Gaussian encoder of each entry."""

    def __init__(self):
        super().__init__()
        self.mean, self.log_std, self.back = (nn.Parameter(random(D, seed=seed)) for seed in (1, 2, 3))
        self.config = {"scaling_factor": 0.5, "latents_mean": [0.1, 0.2, 0.3], "latents_std": [1.0, 2.0, 3.0]}

    def encode(self, x):
        std = (0.1 * self.log_std).exp().expand_as(x)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=0.5 * x + self.mean, std=std))

    def decode(self, z):
        return SimpleNamespace(sample=2 * z - self.back)


@row("LatentBound", "LatentBound.estimate", "LatentBound.fit", "LatentBound.fit_decoder_std", "BoundEstimate",
     "BoundEstimate.of", "BoundEstimate.check", "BoundEstimate.mean", "BoundEstimate.bits_per_dim",
     "BoundEstimate.bits_per_dim_stderr", "BoundEstimate.truncation_per_sample", "BoundEstimate.mean_bits_per_dim",
     each=["decoder_std given", "fitted", "fitted to latents of the host's data"])  # fmt: skip
def latents(on, name):
    made = fs.LatentBound(of(on), on(Halving()), 0.4 if "given" in name else None)
    if "fitted" in name:
        data = mixture_data(40) if "host" in name else on(mixture_data(40))
        made.fit(data, evaluations=1000, progress=False)
        made.fit_decoder_std(data[:10])
    found = made.estimate(on(X), nfe=4 * NFE, memory="1MB", label=on(LABELS))
    terms = {name: getattr(found, name) for name in summary(found) if name != "latents"}
    bits = found.bits_per_dim(bins=8), found.bits_per_dim_stderr(), found.mean_bits_per_dim(8)
    return terms, [summary(each) for each in found.latents], found.check().mean(), bits, found.truncation_per_sample


@row("probability_flow_log_prob", "FlowLogProb", each=[f"ODE {name}" for name in ODE])
def ode(on, name):
    options = ODE[name.removeprefix("ODE ")]
    if options.get("method") not in (None, "midpoint"):
        pytest.importorskip("torchdiffeq")
    made = of(on, fs.DDPM.linear(100) if "table" in name else fs.VP(), reference=REFERENCES["mixture"]())
    mask = on(torch.arange(6 * D).reshape(6, D) % 4 > 0) if "masked" in name else None
    return tuple(fs.probability_flow_log_prob(made, on(X), **options, mask=mask, label=on(LABELS)))


@row("compare_densities")
def two_densities(on):
    a, b = of(on, program=True), fs.ScoreDensity(on(Net(width=8)), fs.LogSNR(-9, 9), "v", program=False)
    whole = fs.Transformed(of(on), transforms.zscore(0.3, 2.0))
    found = [fs.compare_densities(*pair, on(X), nfe=NFE, label=on(LABELS)) for pair in ((a, b), (b, whole))]
    return [[*each, each.jump, each.mean()] for each in found]


@row("as_distribution")
def distribution(on):
    made = fs.as_distribution(of(on), (D,), nfe=NFE, label=fs.per_sample(on(LABELS[:3])))
    wide, x = made.expand((2, 3)), on(X.clone()).requires_grad_()
    value = torch.distributions.Independent(wide, 1).log_prob(x.reshape(2, 3, D))
    value.sum().backward()
    return value, x.grad, made.log_prob(on(X[0])), repr(made)


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
    assert (graph.replay.graph is not None) == on(X).is_cuda
    found = [graph(on(X)), graph(on(X + 0.1)), graph(on(X), seed=3), graph(X)]
    with torch.no_grad():
        for p in made.model.parameters():
            p.mul_(1.1)
    found.append(graph(on(X)))  # of the new weights
    direct = made.estimate(on(X), nfe=NFE, seed=3, **given)
    assert torch.allclose(found[-1][0], direct.log_prob, rtol=1e-5, atol=1e-4)
    return found
