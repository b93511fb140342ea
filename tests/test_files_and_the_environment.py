"""A network that asks for files has no program and says so; one that asks for the environment is traced again."""

import glob
import os
import pathlib
import shutil
from os.path import isfile
from pathlib import Path

import pytest
import torch
from network_with_settings import SCHEDULE, Net, estimates

import fastscore as fs
from fastscore.program.row_program import NoProgram

FILE = "/a_file_of_no_network"
PATH = Path(FILE)


def exists(value):
    """What many networks call a value that was given."""
    return value is not None


FILES = {
    "os.path.exists": (lambda n: os.path.exists(FILE), "asks for a file that may change"),
    "os.path.isdir": (lambda n: os.path.isdir(FILE), "asks for a file that may change"),
    "isfile, imported": (lambda n: isfile(FILE), "global 'isfile' asks for a file that may change"),
    "getmtime": (lambda n: os.path.getmtime(FILE), "asks for a file that may change"),
    "os.stat": (lambda n: os.stat(FILE).st_size, "asks for a file that may change"),
    "listdir": (lambda n: len(os.listdir("/")), "asks for a file that may change"),
    "scandir": (lambda n: len(list(os.scandir("/"))), "asks for a file that may change"),
    "walk": (lambda n: len(list(os.walk(FILE))), "asks for a file that may change"),
    "access": (lambda n: os.access(FILE, os.R_OK), "asks for a file that may change"),
    "glob": (lambda n: len(glob.glob(FILE)), "asks for a file that may change"),
    "which": (lambda n: shutil.which(FILE) is None, "asks for a file that may change"),
    "a path exists": (lambda n: PATH.exists(), "calls exists, which asks for a file that may change"),
    "a path made inside": (lambda n: pathlib.Path(FILE).is_file(), "calls is_file, which asks for a file"),
    "a path's size": (lambda n: PATH.stat().st_size, "calls stat, which asks for a file"),
    "files in a path": (lambda n: len(list(n.path.glob("*"))), "calls glob, which asks for a file"),
    "a path, in a loop": (lambda n: sum(p.exists() for p in [PATH]), "calls exists, which asks for a file"),
    "text of a path, in a loop": (lambda n: sum(len(p.read_text()) for p in [PATH]), "calls read_text"),
    "a path opened": (lambda n: len(PATH.open().read()), "calls open, which asks for a file"),
}


@pytest.mark.parametrize("name", FILES)
def test_who_asks_for_a_file_has_no_program(name):
    factor, reason = FILES[name]
    net = Net(lambda n, h: h * (1 + factor(n))).eval()
    net.path = Path(FILE)
    assert reason in fs.explain(net, (3,))
    with pytest.raises(NoProgram, match=reason):
        fs.ScoreDensity(net, SCHEDULE, "eps", program=True).estimate(torch.randn(4, 3), nfe=16)


def test_a_name_that_others_have_too_is_no_file():
    net = Net(lambda n, h: h * (2.0 if exists(n.number) and len(n.path.name) > 3 else 1.0)).eval()
    net.path = PATH
    assert fs.explain(net, (3,)).startswith("row program of Net")


ENVIRONMENT = {
    "expandvars": (lambda n: len(os.path.expandvars("$A_SCALE")), lambda m: m.setenv("A_SCALE", "1")),
    "expanduser": (lambda n: len(os.path.expanduser("~")), lambda m: m.setenv("HOME", "/a/long/name/of/a/home")),
    "abspath": (lambda n: len(os.path.abspath("a")), lambda m: m.chdir("/")),
    "cwd": (lambda n: len(str(Path.cwd())), lambda m: m.chdir("/")),
    "absolute": (lambda n: len(str(n.path.absolute())), lambda m: m.chdir("/")),
}


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_the_environment_counts_as_soon_as_it_changes(name, monkeypatch):
    factor, change = ENVIRONMENT[name]
    net = Net(lambda n, h: h * factor(n)).eval()
    net.path = Path("a")
    density = fs.ScoreDensity(net, SCHEDULE, "eps")
    before, right = estimates(net, density)
    assert torch.allclose(before, right, rtol=1e-4)  # float32 sums in another order
    (found,) = density._programs._found.values()
    assert found.program is not None, found.reason
    change(monkeypatch)
    after, right = estimates(net, density)
    assert not torch.allclose(right, before, rtol=1e-2), "the change should change the density"
    assert torch.allclose(after, right, rtol=1e-4)
