"""Conditions: nested, marked or told apart by their sizes, under any name, and refused where nothing tells."""

import collections
import pathlib
import pickle

import numpy as np
import pytest
import torch
from nested_conditions import MEAN, NESTED, SCHEDULE, D, Moved, close, data, truth
from torch import nn
from torch.nn import functional as F

import fastscore as fs
from fastscore.metrics import NegativeLogLikelihood
from fastscore.process.conditions import Conditions
from fastscore.runs.evaluate import evaluate_dataset


@pytest.mark.parametrize("kind", NESTED)
def test_every_sample_keeps_its_own(in_chunks, kind):
    make, find = NESTED[kind]
    x, expected = data(), truth(data(), MEAN)
    if kind == "beside a shared table":
        make = lambda m: {"i": torch.searchsorted(MEAN, m), "table": fs.shared(MEAN)}  # noqa: E731
    density = fs.ScoreDensity(Moved(find), SCHEDULE, "eps", reference=fs.Reference.isotropic(0.5))
    assert close(density.estimate(x[:1], nfe=64, added=make(MEAN[:1])), expected[:1])
    assert close(density.estimate(x, nfe=64, added=make(MEAN)), expected)
    order = torch.tensor([5, 0, 7, 3])
    some = density.estimate(x[order], nfe=64, sample_index=order, added=make(MEAN[order]))
    assert close(some, expected[order])
    for rows in (7, 64 * 3):  # pieces of a sample, and three samples at once
        in_chunks(rows)
        cut = density.estimate(x, nfe=64, target_stderr=0.5, max_nfe=128, added=make(MEAN))
        assert close(cut, expected)
        assert torch.allclose(density.log_prob(x, nfe=64, added=make(MEAN))[order], some.log_prob, rtol=1e-4, atol=1e-4)


def test_every_public_call_takes_nested_conditions_of_any_name(tmp_path):
    """The network's arguments are called as those of the calls are."""

    def find(added, more):
        return more["memory"]["seed"] + 0 * more["nfe"]

    x, expected = data(), truth(data(), MEAN)
    cond = {"memory": {"seed": MEAN}, "nfe": 0.0, "method": "text"}
    net = Moved(find)
    density = fs.ScoreDensity(net, SCHEDULE, "eps", reference=fs.Reference.isotropic(0.5), nfe=64)
    assert close(density.estimate(x, cond=cond), expected)
    assert torch.allclose(density.log_prob(x, cond=cond), density.estimate(x, cond=cond).log_prob)
    other = cond | {"memory": {"seed": MEAN + 1}}
    compared = density.compare(x, cond, other)
    assert bool(((compared.difference - (expected - truth(x, MEAN + 1))).abs() < 5 * compared.stderr).all())
    flow = fs.probability_flow_log_prob(density, x, method="midpoint", steps=16, cond=cond)
    assert torch.allclose(flow.log_prob.double(), expected, atol=0.05)  # the ODE's grid error at 16 steps
    captured, _ = fs.CapturedDensity(density, x, cond=cond)(x)
    assert torch.allclose(captured, density.estimate(x, cond=cond).log_prob)
    loss = fs.density_loss(density, x, seed=0, draws=64, antithetic=True, reduction="none", cond=cond)
    assert float((loss + expected).mean().abs()) < 5 * float((loss + expected).std()) / 12**0.5
    assert torch.isfinite(fs.score_regularization(density, x, seed=0, cond=cond))
    metric = NegativeLogLikelihood(density)
    metric.update(x, cond=cond)
    assert float(metric.compute()["nll"]) == pytest.approx(-float(density.estimate(x, cond=cond).log_prob.mean()))
    moved = fs.Transformed(density, torch.distributions.AffineTransform(0.0, 2.0))
    assert torch.allclose(moved.log_prob(2 * x, cond=cond), density.log_prob(x, cond=cond) - D * np.log(2), atol=1e-4)
    assert "no row program" in fs.explain(net, (D,), cond=cond)
    many = {"memory": {"seed": MEAN.repeat(4)}, "nfe": 0.0, "method": "text"}
    density.fit(MEAN.repeat(4)[:, None] + 0.5 * torch.randn(48, D), evaluations=4000, progress=False, cond=many)
    arrays = cond | {"memory": {"seed": MEAN.numpy()}}
    found = evaluate_dataset(density, x.numpy(), tmp_path / "out.npz", batch=5, cond=arrays)
    assert torch.allclose(found.log_prob, density.estimate(x, cond=cond).log_prob, rtol=1e-4, atol=1e-4)


def test_a_name_of_an_argument_is_said_to_be_one():
    density, x = fs.ScoreDensity(Moved(lambda a, more: MEAN[:1]), SCHEDULE, "eps"), data()
    for name in ("memory", "seed", "nfe", "method", "progress", "target_stderr"):
        for value in (torch.randn(12, 3), {"a": 1}, fs.shared(MEAN)):
            with pytest.raises(
                ValueError, match=rf"{name} is an argument of estimate itself.*cond=\{{'{name}': \.\.\.\}}"
            ):
                density.estimate(x, **{name: value})
    with pytest.raises(ValueError, match=r"cond must be a dict .* got a tensor of shape \(12, 3\).*cond=\{'cond'"):
        density.estimate(x, cond=torch.randn(12, 3))
    with pytest.raises(ValueError, match="y is given by name and in cond; give it once"):
        density.estimate(x, y=1, cond={"y": 2})


class Graph(nn.Module):
    """Exact eps of independent nodes whose std is 1/2 and their number of incoming edges, from one list of edges."""

    def forward(self, x, t, edges):
        alpha, sigma = (v[:, None] for v in SCHEDULE.alpha_sigma(t))
        degree = torch.zeros(x.shape[1]).index_add(0, edges[1], torch.ones(edges.shape[1])).double()
        return (sigma * x.double() / (alpha**2 * (0.5 + degree) ** 2 + sigma**2)).to(x.dtype)


EDGES = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 2, 3, 1]])
STD = torch.tensor([0.5, 2.5, 2.5, 1.5])


def test_what_is_shared_is_not_taken_apart_when_the_batch_has_its_length():
    x = STD * torch.randn(3, D, generator=torch.Generator().manual_seed(1))
    expected = torch.distributions.Normal(0.0, STD.double()).log_prob(x.double()).sum(1)
    said = fs.ScoreDensity(Graph(), SCHEDULE, "eps")
    for batch in (3, 2, 1):
        assert close(said.estimate(x[:batch], nfe=256, edges=fs.shared(EDGES)), expected[:batch])
    later = fs.ScoreDensity(Graph(), SCHEDULE, "eps")
    assert close(later.estimate(x, nfe=256, edges=EDGES), expected)  # two rows, three samples: unambiguous
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"'edges' is ambiguous: \(2, 5\) with 2 samples looks one entry a sample.*fs.shared"
        ):
            later.estimate(x[:2], nfe=256, edges=EDGES)
    first = fs.ScoreDensity(Graph(), SCHEDULE, "eps")
    for call in (first.estimate, first.log_prob, lambda x, **c: fs.probability_flow_log_prob(first, x, **c)):
        with pytest.raises(
            ValueError, match="'edges' has as many entries as there are samples, 2, and the network takes all"
        ):
            call(x[:2], edges=EDGES)


def test_the_other_way_round():
    density = fs.ScoreDensity(Moved(lambda a, more: a), SCHEDULE, "eps")
    density.estimate(data(6), nfe=16, added=MEAN[:6])
    with pytest.raises(ValueError, match=r"'added' is ambiguous: \(6,\) with 5 samples looks .* give 5 entries"):
        density.estimate(data(5), nfe=16, added=MEAN[:6])


class Added(nn.Module):
    """Adds a condition of one number a row to x."""

    def forward(self, x, t, added):
        return x + (added["mean"] if isinstance(added, dict) else added)[:, None]


ARRAY = r"must be a tensor, a number or text, got an array of numpy of shape \(12,\); give torch.as_tensor"
LIST = "'added' is a list or tuple of 12 entries and there are 12 samples; give one tensor in .* fs.shared"
SIZE = r"must have the shape \(12, \.\.\.\) for 12 samples, got"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (MEAN.numpy(), f"'added' {ARRAY}"),
        ({"mean": MEAN.numpy()}, rf"\"added\['mean'\]\" {ARRAY}"),
        (MEAN.tolist(), LIST),
        (["text"] * 12, LIST),
        (("text",) * 12, LIST),
        ([torch.zeros(3)] * 12, LIST),
        (MEAN[:5], r"does not take data of shape \(4,\) .*added \(5,\) shared.*: RuntimeError.*; fs.per_sample or"),
        (MEAN[:5], "condition 'added' has 5 entries and counts as shared, with one a sample it has 12"),
        ({"mean": MEAN[:11]}, r"condition \"added\['mean'\]\" has 11 entries and counts as shared, .* it has 12"),
        (torch.zeros(()), r"conditions added \(\) shared by all: IndexError: too many indices"),
        (fs.per_sample(MEAN[:5]), rf"'added' is marked per_sample and {SIZE} \(5,\)"),
        (fs.per_sample({"mean": torch.zeros(())}), rf"\"added\['mean'\]\" is marked per_sample and {SIZE} \(\)"),
        (object(), "'added' must be a tensor, a number or text, got a object; pass its tensors in a dict"),
        ({"other": MEAN}, r"added\['other'\] \(\) a sample: KeyError: 'mean'"),
    ],
)
def test_what_cannot_be_is_refused_at_every_call(value, message):
    density = fs.ScoreDensity(Added(), SCHEDULE, "eps")
    for call in (density.estimate, density.log_prob, density.estimate):
        with pytest.raises(ValueError, match=message):
            call(data(), nfe=16, added=value)


def test_a_good_call_before_changes_nothing():
    density = fs.ScoreDensity(Added(), SCHEDULE, "eps")
    density.estimate(data(), nfe=16, added=MEAN)
    bad = [(MEAN.numpy(), ARRAY), (MEAN[:5], r"ambiguous: \(5,\) with 12"), (torch.zeros(()), "IndexError")]
    for value, message in bad:
        with pytest.raises(ValueError, match=message):
            density.estimate(data(), nfe=16, added=value)


@pytest.mark.parametrize("label", [10, -11])
def test_a_label_that_an_embedding_lacks_is_named_after_good_calls_too(label):
    class Labelled(nn.Module):  # which is a row program, whose embedding is looked up outside of its rows
        def __init__(self):
            super().__init__()
            self.table, self.first, self.last = nn.Embedding(10, 16), nn.Linear(D + 17, 16), nn.Linear(16, D)

        def forward(self, x, t, y):
            return self.last(F.silu(self.first(torch.cat([x, t[:, None], self.table(y)], 1))))

    density = fs.ScoreDensity(Labelled(), SCHEDULE, "eps")
    density.estimate(data(7), nfe=16, y=torch.arange(7))
    for wrong in (torch.tensor([0, 1, 2, 3, 4, 5, label]), fs.shared(torch.tensor(label))):
        for call in (density.estimate, density.log_prob):
            with pytest.raises(
                ValueError, match=r"condition.* y.*: IndexError: index out of range|'y' of these values"
            ):
                call(data(7), nfe=16, y=wrong)


def test_a_number_that_a_network_cannot_take_is_named():
    density = fs.ScoreDensity(Added(), SCHEDULE, "eps")
    with pytest.raises(ValueError, match="and conditions added = 3: "):
        density.estimate(data(), nfe=16, added=3)


def test_a_missing_condition_names_what_the_network_said():
    net = Moved(lambda a, more: a["mean"])
    with pytest.raises(ValueError, match=r"does not take data of shape \(4,\) a sample: TypeError: 'NoneType'"):
        fs.ScoreDensity(net, SCHEDULE, "eps").estimate(data(), nfe=16)


def test_objects_that_cannot_be_looked_into_go_when_they_are_said_to_be_shared():
    class Encoder:
        def __init__(self):
            self.mean = torch.ones(1)

    density = fs.ScoreDensity(Moved(lambda a, more: a.mean), SCHEDULE, "eps", reference=fs.Reference.isotropic(0.5))
    x = 1 + 0.5 * torch.randn(6, D, generator=torch.Generator().manual_seed(2))
    assert close(density.estimate(x, nfe=64, added=fs.shared(Encoder())), truth(x, torch.ones(6)))


class Program(nn.Module):
    """An MLP with a sample's label, a shared gain and a text, all in one dict: a row program."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.t, self.a, self.b, self.y = nn.Linear(1, 16), nn.Linear(D, 16), nn.Linear(16, D), nn.Embedding(5, 16)

    def forward(self, x, t, given):
        h = self.a(x) + self.t(t[:, None]) + self.y(given["label"])
        return self.b(torch.relu(h)) * given["more"].gain * (2 if given["kind"] == "double" else 1)


def test_programs_hold_nested_conditions_by_their_paths():
    Gain = collections.namedtuple("Gain", ["gain"])
    net, x, label = Program().eval(), data(), torch.arange(12) % 5
    on, off = (fs.ScoreDensity(net, SCHEDULE, "eps", program=mode) for mode in (True, False))
    seen = []
    for gain, kind in ((1.0, "plain"), (3.0, "plain"), (3.0, "double")):
        given = {"label": label, "more": Gain(torch.tensor(gain)), "kind": kind}
        found, expected = (d.estimate(x, nfe=32, given=given).log_prob for d in (on, off))
        assert torch.allclose(found, expected, rtol=1e-4)
        seen.append(found)
    assert not torch.allclose(seen[0], seen[1], rtol=1e-2)
    assert not torch.allclose(seen[1], seen[2], rtol=1e-2)
    assert "row program of Program" in fs.explain(net, (D,), given=given)


def test_the_classifier_takes_nested_classes_and_conditions():
    class Labelled(Moved):
        def forward(self, x, t, given, rest):
            return super().forward(x, t, given["mean"] + rest["shift"])

    net = Labelled(lambda a, more: a)
    x, means = data(), torch.tensor([-2.0, 0.0, 2.0])
    density = fs.ScoreDensity(net, SCHEDULE, "eps", reference=fs.Reference.isotropic(0.5))
    classifier = fs.DiffusionClassifier(density, {"given": {"mean": means, "size": 3}})
    shift = torch.full((12,), 0.25)
    found = classifier.classify(x, nfe=128, error=None, rest={"shift": shift})
    exact = torch.stack([truth(x, m + shift) for m in means], 1).log_softmax(1)
    assert bool(((found.log_posterior - exact).abs() <= 5 * found.log_posterior_stderr + 1e-3).all())
    again = pickle.loads(pickle.dumps(classifier.classes))
    assert torch.equal(again.per_sample["given['mean']"], means)
    with pytest.raises(ValueError, match="given names the class and is set by the classifier"):
        classifier.classify(x, given={"other": shift}, rest={"shift": shift})


def test_the_page_runs_as_it_stands():
    class Anything(nn.Module):
        def forward(self, x, t, **cond):
            seen.append(cond)
            return x

    seen = []
    text = (pathlib.Path(__file__).parent.parent / "docs" / "conditions.md").read_text()
    given = {"x": data(2), "labels": torch.arange(2), "sizes": torch.ones(2, 2), "edges": EDGES}
    given |= {"network": Anything(), "encoded": torch.ones(2, 5), "noise": torch.ones(2)}
    exec(text.split("```python")[1].split("```")[0], given)
    assert {name for cond in seen for name in cond} == {"y", "added", "edges", "memory", "seed"}
    edges = [cond["edges"] for cond in seen if "edges" in cond]
    assert all(each is EDGES or torch.equal(each, EDGES) for each in edges)  # of a network's first calls a copy
    assert any(each is EDGES for each in edges)


def test_marks_inside_and_outside():
    told = Conditions.of({"a": fs.shared({"x": MEAN, "y": fs.per_sample(MEAN)}), "b": MEAN}, 12)
    assert set(told.per_sample) == {"a['y']", "b"}
    assert told.guessed == ("b",)
    again = Conditions.of(told.select(slice(0, 1)).marked(), 1)
    assert set(again.per_sample) == {"a['y']", "b"}
    assert again.guessed == ()


class Lookup(nn.Module):
    """Every row takes its own entry of a table that all rows share."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x, t, table, y):
        return self.gain * (x - table[y])


@pytest.mark.parametrize("y", [[0, 0, 1, 1, 2], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 2, 2, 2, 2]])
def test_a_table_as_long_as_the_batch_is_refused_whatever_the_samples_point_at(y):
    x, table = data(5), torch.arange(5.0)[:, None].expand(5, D)
    with pytest.raises(ValueError, match="'table' has as many entries as there are samples, 5"):
        fs.ScoreDensity(Lookup(), SCHEDULE, "eps", nfe=16).estimate(x, table=table, y=torch.tensor(y))


def test_a_network_that_says_nothing_yet_is_asked_again():
    net, x, y = Lookup(), data(5), torch.tensor([0, 0, 1, 1, 0])
    nn.init.zeros_(net.gain)  # as last layers start
    density, table = fs.ScoreDensity(net, SCHEDULE, "eps", nfe=16), torch.arange(5.0)[:, None].expand(5, D)
    density.estimate(x, table=table, y=y)
    nn.init.ones_(net.gain)
    with pytest.raises(ValueError, match="'table' has as many entries"):
        density.estimate(x, table=table, y=y)


def test_numbers_are_not_marked_as_samples():
    for value in ([1.0, 2.0], (3,), 1.5, "text"):
        with pytest.raises(ValueError, match=r"per_sample takes tensors.*torch.as_tensor"):
            fs.per_sample(value)
    assert fs.per_sample({"mean": MEAN, "size": 3}).per_sample


def a_dict_in_itself(mean):
    found = {"mean": mean}
    found["all"] = found
    return found


def a_list_in_a_dict(mean):
    found = [mean]
    found.append({"list": found})
    return {"tokens": found}


def test_two_conditions_of_one_path_are_refused():
    cond = {"a": {"b": MEAN}, "a['b']": 0 * MEAN}
    density = fs.ScoreDensity(nn.Identity(), SCHEDULE, "eps")
    with pytest.raises(ValueError, match=r"two conditions are called \"a\['b'\]\", got one inside of another"):
        density.estimate(data(), cond=cond)


@pytest.mark.parametrize("circle", [a_dict_in_itself, a_list_in_a_dict])
def test_a_condition_that_holds_itself_is_refused_by_its_path(circle):
    x = torch.zeros(3, D)
    density = fs.ScoreDensity(nn.Identity(), SCHEDULE, "eps")
    for call in (density.estimate, density.log_prob, density.fit):
        with pytest.raises(ValueError, match=r"condition \"?'?added.* holds itself, got (dict|list) inside of itself"):
            call(x, added=circle(torch.zeros(3, D)))


class Tokens(nn.Module):
    """The exact network of a Gaussian whose mean is the sum of a set of tokens, which all samples share."""

    def forward(self, x, t, tokens):
        alpha, sigma = (v[:, None] for v in SCHEDULE.alpha_sigma(t))
        return (sigma * (x.double() - alpha * tokens.double().sum(0)) / (alpha**2 / 4 + sigma**2)).to(x)


CALLS = {
    "estimate": lambda density, x, token: density.estimate(x, nfe=16, tokens=token),
    "log_prob": lambda density, x, token: density.log_prob(x, nfe=16, tokens=token),
    "loss": lambda density, x, token: fs.density_loss(density, x, seed=0, tokens=token),
    "compare": lambda density, x, token: density.compare(x, {"tokens": token}, {"tokens": 2 * token}, nfe=16),
    "captured": lambda density, x, token: fs.CapturedDensity(density, x, nfe=16, tokens=token),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_single_sample_with_a_set_of_one_entry_has_to_say_whose_it_is(call):
    density, x, token = fs.ScoreDensity(Tokens(), SCHEDULE, "eps"), torch.ones(1, D), torch.ones(1, D)
    with pytest.raises(ValueError, match=r"'tokens' has as many entries as there are samples, 1, .* fs.shared"):
        call(density, x, token)
    if call is not CALLS["compare"]:
        call(density, x, fs.shared(token))


def test_a_network_that_broadcasts_takes_a_single_sample_without_a_mark():
    density, x = fs.ScoreDensity(Shifted(), SCHEDULE, "eps"), torch.ones(1, D)
    one = density.estimate(x, nfe=16, mean=torch.ones(1, D)).log_prob
    assert torch.equal(one, density.estimate(x, nfe=16, mean=fs.shared(torch.ones(1, D))).log_prob)


class Shifted(nn.Module):
    def forward(self, x, t, mean):
        return 0.1 * (x - mean)


def test_what_several_samples_share_a_single_one_shares():
    x, token = 1 + 0.5 * torch.randn(5, D, generator=torch.Generator().manual_seed(0)), torch.ones(1, D)
    density = fs.ScoreDensity(Tokens(), SCHEDULE, "eps")
    several = density.estimate(x, nfe=64, tokens=token).log_prob
    assert float(density.estimate(x[:1], nfe=64, tokens=token).log_prob) == pytest.approx(float(several[0]), rel=1e-5)
    assert float(density.log_prob(x[:1], nfe=64, tokens=token)) == pytest.approx(float(several[0]), rel=1e-5)
