"""When a progress bar is shown: one rule for every call that has one."""

import inspect
import io
import sys

import pytest
import torch
from test_evaluate import Net
from torch.distributions.transforms import AffineTransform

import fastscore as fs
from fastscore.runs.evaluate import evaluate_dataset
from fastscore.support.progress import progress_bar


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


def density():
    return fs.ScoreDensity(Net(), fs.VP(), "eps", nfe=8)


def classifier():
    return fs.DiffusionClassifier(fs.ScoreDensity(Labelled(), fs.VP(), "eps"), {"label": torch.arange(2)})


class Labelled(Net):
    def forward(self, x, t, label):
        return super().forward(x, t) + label[:, None]


X = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
CALLS = {
    "fit": lambda **kw: density().fit(X, reference="diagonal", evaluations=0, **kw),
    "estimate": lambda **kw: density().estimate(X, **kw),
    "transformed": lambda **kw: fs.Transformed(density(), AffineTransform(1.0, 2.0)).estimate(X, **kw),
    "classifier's fit": lambda **kw: classifier().fit(X[:1], evaluations=2000, **kw),
    "classify": lambda **kw: classifier().classify(X[:2], nfe=16, **kw),
    "evaluate": lambda **kw: evaluate_dataset(density(), X, "r.npz", restart=True, **kw),
}


def written(monkeypatch, call, terminal, **options):
    """Return what a call writes to stderr, which is a terminal or is none."""
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    call(**options)
    return stream.getvalue()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_bars_are_for_terminals_unless_asked_for(call, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    for terminal, options, shown in (
        (True, {}, True),
        (False, {}, False),
        (True, {"progress": None}, True),
        (True, {"progress": False}, False),
        (False, {"progress": True}, True),
    ):
        assert bool(written(monkeypatch, call, terminal, **options)) == shown, (terminal, options)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    for options in ({}, {"progress": True}):
        assert written(monkeypatch, call, True, **options) == ""


class Logger:
    """What programs put in the place of stderr to write it to their log."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_stderr_that_is_closed_or_no_file_gets_no_bar(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    closed, logger = Stream(True), Logger()
    closed.close()
    for stream in (None, closed, logger):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(progress_bar(None, range(3))) == [0, 1, 2]
    assert logger.text == ""
    assert list(progress_bar(True, range(3))) == [0, 1, 2]
    assert "100%" in logger.text
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(progress_bar(True, range(3))) == [0, 1, 2]


def test_every_default_is_the_rule():
    functions = [evaluate_dataset, *(getattr(fs, name) for name in fs.__all__)]
    functions += [method for one in functions if isinstance(one, type) for method in vars(one).values()]
    found = [inspect.signature(f).parameters for f in functions if inspect.isfunction(f)]
    defaults = [parameters["progress"].default for parameters in found if "progress" in parameters]
    assert len(defaults) >= 5
    assert set(defaults) == {None}


def test_a_bar_by_default_is_gone_at_its_end_and_one_that_was_asked_for_stays(monkeypatch):
    for progress, last in ((None, ""), (True, "work: 100%")):
        text = written(monkeypatch, lambda p=progress: list(progress_bar(p, range(3), desc="work")), True)
        assert "work: " in text
        assert text.rstrip("\n").rstrip("\r").rpartition("\r")[2].strip().startswith(last)


def test_blocks_and_metrics_have_no_bars_of_their_own(monkeypatch, tmp_path):
    out = tmp_path / "r.npz"
    text = written(monkeypatch, lambda: evaluate_dataset(density(), X, out, batch=8), True)
    assert "0/20" in text
    assert "0/8" not in text
    metric = pytest.importorskip("fastscore.metrics").NegativeLogLikelihood(density())
    assert written(monkeypatch, lambda: metric.update(X), True) == ""
