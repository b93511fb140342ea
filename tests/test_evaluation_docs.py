"""The blocks of docs/evaluation.md run as they stand."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_classify import PRIOR, TARGETS, ClassNet, exact, points

import fastscore as fs
from fastscore.cli.commands import main
from fastscore.runs import evaluate_dataset

TEXT = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
NETS = "import torch\n\nclass build(torch.nn.Module):\n    def forward(self, x_t, t):\n        return x_t\n"


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the blocks define, in order, for classes with exact posteriors."""
    y = torch.arange(4).repeat_interleave(10)
    found = {
        "model": ClassNet(TARGETS, fs.VP()),
        "background": torch.nn.Module(),
        "previous": ClassNet(TARGETS, fs.VP()),
        "train_data": points(10, seed=1),
        "train_y": y,
        "test_data": points(10, seed=7),
        "test_y": y,
        "other_y": (y + 1) % 4,
    }
    found["background"].forward = lambda x_t, t: x_t  # of a standard normal, but for the noise level
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("blocks"))
        for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
            exec(block, found)
        found["stored"] = dict(np.load("density.npz"))
    return found


def test_the_classifier(names):
    likely = exact(names["test_data"])[1].argmax(1)
    found = names["classifier"].classify(names["test_data"])
    assert float((found.prediction == likely).double().mean()) > 0.9
    assert len(PRIOR) == found.active.shape[1]


def test_two_checkpoints_of_the_same_answers_do_not_differ(names):
    assert (names["mean"], names["error"]) == (0, 0)


def test_the_distributions_of_all_classes(names):
    """The mean over 40 samples and 4 classes, some far from the data, to four errors of its spread."""
    found, truth = names["log_likelihood"], exact(names["test_data"])[0]
    assert found.shape == truth.shape
    own = torch.arange(len(truth)), names["test_y"]
    error = (found - truth)[own]
    assert abs(float(error.mean())) < 4 * float(error.std()) / len(error) ** 0.5


def test_the_data_set(names):
    log_likelihood, _ = exact(names["test_data"])
    own = log_likelihood.gather(1, names["test_y"][:, None])[:, 0]
    error = torch.from_numpy(names["stored"]["log_prob"]) - own
    assert float((error.abs() < 4 * torch.from_numpy(names["stored"]["stderr"]) + 0.01).double().mean()) > 0.95
    assert np.array_equal(names["stored"]["log_prob"], names["whole"].log_prob.numpy())


def test_the_fields_of_the_result(tmp_path):
    density = fs.ScoreDensity(ClassNet(TARGETS, fs.VP()), fs.VP(), "eps")
    x, y = points(1, seed=7), torch.arange(4)
    evaluate_dataset(density, x, tmp_path / "r.npz", cond={"y": y}, mask=x == x, nfe=16, bins=256, low=-9, high=9)
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", TEXT, re.MULTILINE)
    with np.load(tmp_path / "r.npz") as stored:
        assert list(stored) == [name for name, _ in rows]
        for name, said in rows:
            assert stored[name].shape == (len(x),)
            assert ("int64" in said) == (stored[name].dtype == np.int64)


def test_ranking(names):
    log_likelihood, _ = exact(names["test_data"])
    own, other = (log_likelihood.gather(1, names[y][:, None])[:, 0] for y in ("test_y", "other_y"))
    error = names["better"].difference - (own - other)
    assert float((error.abs() < 4 * names["better"].stderr + 0.01).double().mean()) > 0.95
    assert float(((own > other) | ~names["clearly"]).double().mean()) > 0.95
    # p-values of data like the training data are uniform: 40 of them, an error of 0.05 of the mean.
    assert abs(float(names["p_value"].mean()) - 0.5) < 0.2
    assert bool((names["found"].log_prob[names["order"]].diff() <= 0).all())
    assert torch.isfinite(names["ratio"]).all()


def test_the_command(tmp_path, monkeypatch):
    (command,) = re.findall(r"^torchrun --nproc-per-node 4 -m fastscore (.*)$", TEXT, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("nets.py").write_text(NETS)
    np.save("test.npy", np.ones((4, 2), np.float32))
    result = CliRunner().invoke(main, command.split())
    sys.modules.pop("nets", None)
    assert result.exit_code == 0, result.output
    assert np.load("density.npz")["nfe"].tolist() == [64] * 4
