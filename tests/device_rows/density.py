"""Rows of the density itself: estimates, gradients, fits, moves."""

import torch
from torch import nn

import fastscore as fs
from fastscore.estimator import candidates, control, methods, network_density
from fastscore.estimator.network_density import network_of, prepare
from fastscore.process import predictions

from .common import LABELS, NFE, REFERENCES, SCHEDULES, D, Net, X, mixture_data, of, random, row, summary
from .spaces import TRANSFORMS


@row("ScoreDensity", "ScoreDensity.estimate", "Estimate", "Estimate.check", "Curve", each=list(SCHEDULES))
def estimate_on_a_schedule(on, name):
    return summary(of(on, SCHEDULES[name]()).estimate(on(X), nfe=NFE))


@row("ScoreDensity.estimate", each=[f"prediction {p}" for p in predictions.PREDICTIONS])
def estimate_of_a(on, name):
    return summary(of(on, predicts=name.removeprefix("prediction ")).estimate(on(X), nfe=NFE))


@row("ScoreDensity.estimate", each=[f"method {m}" for m in methods.METHODS])
def estimate_by(on, name):
    method = name.removeprefix("method ")
    return [summary(of(on, s).estimate(on(X), nfe=NFE, method=method)) for s in (fs.VP(), fs.DDPM.linear(100))]


@row("ScoreDensity.estimate", each=[f"control {c}" for c in control.CONTROLS])
def estimate_less(on, name):
    options = {"nfe": 64, "control": name.removeprefix("control ")}
    found = [of(on, reference=kind()).estimate(on(X), **options) for kind in REFERENCES.values()]
    image = fs.ScoreDensity(on(Net(16)), fs.VP(), "eps", program=False).estimate(on(random(3, 1, 4, 4)), **options)
    return [summary(each) for each in (*found, image)]


@row("ScoreDensity.estimate", each=[f"noise {n}" for n in network_density.NOISES])
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
        return summary(fs.ScoreDensity(net, fs.VP(), "eps").estimate(x, nfe=NFE))
    if name == "no parameters":
        return summary(fs.ScoreDensity(WithoutParameters(), fs.VP(), "eps").estimate(on(X), nfe=NFE))
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
    made, given = fs.ScoreDensity(on(Scaled(x[0].numel())), fs.VP(), "eps", program=True), {"factor": torch.tensor(1.5)}
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
    made = fs.ScoreDensity(Net(), fs.VP(), "eps", program=False)
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


@row("ScoreDensity.compare", "Comparison", "Comparison.mean", "Comparison.cat", "Comparison.numpy")
def compare(on):
    found = of(on).compare(on(X), {"label": on(LABELS)}, {"label": on(LABELS.flip(0))}, nfe=NFE)
    return *found, *found.mean(), *fs.Comparison.cat([found]), [v.tolist() for v in found.numpy().values()]


@row("ScoreDensity.fit", each=[f"kind {kind}" for kind in candidates.KINDS if kind != "images"])
def fit(on, name):
    made = of(on).fit(on(mixture_data(150)), reference=name.removeprefix("kind "), evaluations=30_000, progress=False)
    return made.state_dict(), summary(made.estimate(on(X), nfe=NFE))


@row("ScoreDensity.fit")
def fit_to_images(on):
    data = random(100, 3, 4, 4)
    made = on(fs.ScoreDensity(Blurs(), fs.VP(), "eps")).fit(
        on(data), reference="images", evaluations=20_000, progress=False
    )
    return made.state_dict(), summary(made.estimate(on(data[:6]), nfe=NFE))


class Blurs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blur = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x_t, t):
        return x_t - 0.1 * self.blur(x_t) * t[:, None, None, None]


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
    made = FITS[name.removeprefix("shared, ")](fs.ScoreDensity(on(Shifted()), fs.VP(), "eps", program=False))
    if name == "shared, DiffusionClassifier":
        return summary(made.fit(mixture_data(40), evaluations=20_000, progress=False).classify(on(X), nfe=64))
    made.fit(mixture_data(100), evaluations=3000, progress=False, given={"shift": fs.shared(SHIFT)})
    return summary(made.estimate(on(X), nfe=NFE, given={"shift": fs.shared(on(SHIFT))}))


@row("ScoreDensity.with_reference", "ScoreDensity.check",
     "ScoreDensity.log_snr_range", "ScoreDensity.nodes", "ScoreDensity.with_rounding", "ScoreDensity.calibration",
     "ScoreDensity.core", "ScoreDensity.to_network", "ScoreDensity.wanted")  # fmt: skip
def with_reference_and_parts(on):
    made = of(on).with_reference(REFERENCES["mixture"]())
    samples, plan, _ = prepare(made, on(X), NFE, 0, None, None, {})
    parts = (
        samples.x,
        samples.index,
        plan.draws.rules.of(0).weight,
        made.check(on(X), None, {}).x,
        network_of(made).predicts,
        made.log_snr_range,
    )
    return summary(made.estimate(on(X), nfe=NFE)), parts


@row("ScoreDensity.extra_repr", "explain", "explain_program")
def words(on):
    made = of(on)
    texts = [fs.explain(made.model, (D,)), fs.explain_program(made.model, (D,), label=on(LABELS))]
    return [repr(made), *(text.replace(f"on {on(X).device}", "") for text in texts)]


@row("Estimate.cat", "Estimate.save", "Estimate.load")
def joined_and_saved(on, folder):
    made, index = of(on), torch.arange(6)
    parts = [made.estimate(on(X)[i : i + 3], nfe=NFE, sample_index=index[i : i + 3]) for i in (0, 3)]
    joined = fs.Estimate.cat(parts)
    joined.save(folder / "found.npz")
    return summary(joined), summary(fs.Estimate.load(folder / "found.npz"))


@row(
    "Estimate.bits_per_dim",
    "Estimate.bits_per_dim_stderr",
    "Estimate.interval",
    "Estimate.mean",
    "Estimate.mean_bits_per_dim",
    "Estimate.group",
    "Estimate.dims_in_words",
    "Estimate.numpy",
)
def of_an_estimate(on):
    found = of(on).estimate(on(X), nfe=NFE)
    told = found.mean(), found.group, repr(found), [v.tolist() for v in found.numpy().values()]
    bits = found.bits_per_dim(256), found.bits_per_dim_stderr(), found.mean_bits_per_dim(256)
    return *bits, found.interval(0.9), *told
