"""docs/architecture.md is the package as it is: files exist, all folders are listed, a call takes its steps."""

import inspect
import re
import sys
from pathlib import Path

import torch
from torch import nn

import fastscore as fs

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
STATIONS = re.search(r"in twelve steps:\n\n(.*?)\n\n", PAGE, re.S)[1]


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"`((?:fastscore|kernels|csrc|docs|tests)/[\w/.]+)`", PAGE))
    assert len(named) > 20
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_the_drawing_has_every_room():
    drawing = re.search(r"\n\n( {4}cli/.*?)\n\n", PAGE, re.S)[1]
    drawn = set(re.findall(r"(\w+(?:\.py)?)/?(?=\s)", drawing))
    rooms = {path.stem if path.is_dir() else path.name for path in (ROOT / "fastscore").iterdir()}
    rooms -= {"__pycache__", "__init__.py", "__main__.py", "py.typed"}
    assert rooms - drawn == set()


def test_an_estimate_walks_through_the_stations():
    class Net(nn.Module):
        def forward(self, x, t):
            return torch.tanh(x) * t[:, None]

    package = Path(fs.__file__).parent  # of the sources, or installed elsewhere
    density, entered = fs.ScoreDensity(Net(), fs.VP(), "eps"), []

    def look(frame, event, argument):
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(package)) and file not in entered:
            entered.append(file)

    density.estimate(torch.ones(3, 2), nfe=16)  # the first one also measures what a row takes, and probes the network
    sys.setprofile(look)
    try:
        density.estimate(torch.ones(3, 2), nfe=16).interval()
    finally:
        sys.setprofile(None)
    walked = [str(Path(file).relative_to(package.parent)) for file in entered]
    stations = re.findall(r"`(fastscore/[\w/]+\.py)`", STATIONS)
    assert [station for station in stations if station not in walked] == []
    # The stations come in their order: each one's first file is entered after the first file of the one before.
    first = [re.search(r"`(fastscore/[\w/]+\.py)`", line)[1] for line in re.split(r"\n(?=\d+\. )", STATIONS)]
    assert len(first) == 12
    # Three are entered earlier for a small service: the shift of the nodes, an empty calibration, an empty curve.
    services = ("noise.py", "calibration.py", "curve.py")
    places = [walked.index(station) for station in first if not station.endswith(services)]
    assert places == sorted(places), list(zip(first, places))


def test_every_page_has_one_title():
    for page in (ROOT / "docs").glob("*.md"):
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        assert len(re.findall(r"^# ", prose, re.M)) == 1, page


def test_help_on_the_making_of_any_public_class_is_about_that_class():
    classes = [getattr(fs, name) for name in fs.__all__ if isinstance(getattr(fs, name), type)]
    for kind in classes:
        if "__init__" in vars(kind):
            assert inspect.getdoc(kind.__init__) == inspect.getdoc(kind), kind
    assert "predicts:" in inspect.getdoc(fs.ScoreDensity.__init__)
