"""Conditions of a whole data set, over interruptions and from the command line."""

import sys
import types

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from nested_conditions import MEAN, SCHEDULE, D, Moved, close, data, truth
from torch import nn

import fastscore as fs
from fastscore.cli.arrays import load_conditions
from fastscore.cli.commands import main
from fastscore.runs.condition_data import DataConditions
from fastscore.runs.evaluate import evaluate_dataset


def test_conditions_of_a_data_set(tmp_path):
    mean = MEAN.double().numpy()
    told = DataConditions.of("cond", {"a": {"mean": mean}, "w": 2.0, "table": fs.shared(mean[:5])}, 12)
    given = told.at(torch.tensor([3, 1]), torch.device("cpu"), torch.float32)
    assert given["a"]["mean"].value.tolist() == MEAN[[3, 1]].tolist()
    assert given["table"].value.dtype == torch.float32
    for bad, got in ((mean[:5], r"shape \(5,\)"), (np.ones(()), r"shape \(\)"), (object(), "object")):
        message = (
            rf"cond 'y' must be an? (array|tensor or an array of numpy) of shape \(12, ...\), .* got {got}; .*--shared"
        )
        with pytest.raises(ValueError, match=message):
            DataConditions.of("cond", {"y": bad}, 12)
    density = fs.ScoreDensity(
        Moved(lambda a, more: a["mean"]), SCHEDULE, "eps", reference=fs.Reference.isotropic(0.5), nfe=64
    )
    found = evaluate_dataset(density, data(), tmp_path / "a.npz", batch=5, cond={"added": {"mean": MEAN}})
    assert close(found, truth(data(), MEAN))
    some = evaluate_dataset(
        density, data(), tmp_path / "b.npz", batch=2, cond={"added": {"mean": MEAN}}, indices=[7, 2, 9]
    )
    assert torch.allclose(some.log_prob, found.log_prob[[7, 2, 9]], rtol=1e-4)


@pytest.mark.parametrize("change", ["a sample's", "shared", "name"])
def test_a_run_is_resumed_with_its_own_conditions_alone(tmp_path, change):
    def stop(added, more):
        if first and list(tmp_path.glob("out.npz.partial/block-*.npz")):  # however many calls the probes take
            raise KeyboardInterrupt
        return added + more["shift"] if "shift" in more else added

    first = [True]
    density = fs.ScoreDensity(Moved(stop), SCHEDULE, "eps", nfe=16)
    cond = {"added": MEAN, "shift": fs.shared(torch.zeros(1))}
    with pytest.raises(KeyboardInterrupt):
        evaluate_dataset(density, data(), tmp_path / "out.npz", batch=3, cond=cond)
    other = {
        "a sample's": cond | {"added": MEAN.flip(0)},
        "shared": cond | {"shift": fs.shared(torch.ones(1))},
        "name": {"added": MEAN},
    }[change]
    first.clear()
    with pytest.raises(ValueError, match="conditions"):
        evaluate_dataset(density, data(), tmp_path / "out.npz", batch=3, cond=other)


def test_conditions_on_the_command_line(tmp_path):
    np.savez(tmp_path / "data.npz", y=np.arange(3), m=np.ones(3))
    np.save(tmp_path / "t.npy", np.zeros(5))
    found = load_conditions(
        [f"y={tmp_path}/data.npz:y", "added.w=1.5", f"added.m={tmp_path}/data.npz:m"], [f"table={tmp_path}/t.npy"]
    )
    assert found["y"].tolist() == [0, 1, 2]
    assert found["added"]["w"] == 1.5
    assert found["added"]["m"].tolist() == [1, 1, 1]
    assert found["table"] == fs.shared(found["table"].value)
    for bad, message in (
        (["y"], "a condition must be NAME=FILE or NAME=NUMBER"),
        (["y=1", "y=2"], "'y' is given twice"),
        (["y=labels.txt"], "'y' must be a .npy, .npz, .pt or .safetensors file or a number, got 'labels.txt'"),
        (["y=1", "y.a=2"], "'y.a' is given twice"),
    ):
        with pytest.raises(ValueError, match=message):
            load_conditions(bad, [])


class Labelled(nn.Module):
    """Called as an exported network with a condition is: model(x_t, t, y=labels)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.y = nn.Linear(D, D), nn.Embedding(3, D)

    def forward(self, x, t, *, y):
        return torch.tanh(self.a(x) + self.y(y)) * t[:, None]


@pytest.mark.parametrize("kind", ["export", "factory"])
def test_the_command_evaluates_with_labels(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    net, label = Labelled().eval(), torch.arange(12) % 3
    np.save("x.npy", data().numpy())
    np.savez("labels.npz", y=label.numpy(), other=np.zeros(12))
    if kind == "export":
        batch = {0: torch.export.Dim("batch")}
        example = data(), torch.rand(12)
        torch.export.save(
            torch.export.export(net, example, {"y": label}, dynamic_shapes={"x": batch, "t": batch, "y": batch}),
            "net.pt2",
        )
        model = "net.pt2"
    else:
        module = types.ModuleType("labelled_networks")
        module.build = lambda: net
        monkeypatch.setitem(sys.modules, module.__name__, module)
        model = "labelled_networks:build"
    command = ["evaluate", model, "x.npy", "--schedule", "vp", "--predicts", "eps", "--nfe", "32", "--batch", "5"]
    result = CliRunner().invoke(main, [*command, "--cond", "y=labels.npz:y", "--out", "out.npz"])
    assert result.exit_code == 0, result.output
    expected = fs.ScoreDensity(net, fs.VP(), "eps").estimate(data(), nfe=32, y=label).log_prob
    assert np.allclose(np.load("out.npz")["log_prob"], expected.numpy(), rtol=1e-4)
    wrong = CliRunner().invoke(main, [*command, "--cond", "y=x.npy", "--out", "b.npz"])
    assert wrong.exit_code == 1
    assert "the network does not take data of shape (4,) a sample and conditions y (4,) a sample" in wrong.output
