"""A folder with data and a module of networks for the command line, and how it is called there."""

import sys

import numpy as np
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from fastscore.cli import commands as cli

# A network that is slow as long as a file says so: a pause changes no number.
ZOO = """
import os, time
import torch
from torch import nn
import fastscore

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.3, -0.2], [0.5, 0.1]]))

    def forward(self, x, t):
        if os.path.exists("slow"):
            open(f"rank-{os.environ.get('RANK')}-{os.getpid()}", "w").close()
            time.sleep(0.1)
            x = x.flip(1).flip(1)  # is no instruction of a row program, which would not pause
        return torch.tanh(x @ self.weight.to(x)) + 0.1 * t[:, None]

def double():
    return Net().double()

def ready():
    return fastscore.ScoreDensity(Net(), fastscore.VP(), "eps", nfe=40)

def fails():
    raise KeyError("weights.bin")
"""
ARGUMENTS = (
    "zoo:Net",
    "data.npy",
    "--schedule",
    "vp",
    "--predicts",
    "eps",
    "--nfe",
    "32",
    "--seed",
    "3",
    "--batch",
    "8",
)
N = 50


def filled(folder, monkeypatch):
    """Yield a working directory with the module `zoo` and data in every kind of file."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "zoo.py").write_text(ZOO)
    x = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
    np.save("data.npy", x.numpy())
    np.savez("data.npz", x=x.numpy(), labels=np.arange(N))
    torch.save({"x": x, "labels": torch.arange(N)}, "data.pt")
    save_file({"x": x}, "data.safetensors")
    np.save("levels.npy", np.zeros((N, 2), np.uint8))
    np.save("wide.npy", np.zeros((N, 3), np.float32))
    yield folder
    sys.modules.pop("zoo", None)


def evaluate(*arguments, code=0):
    result = CliRunner().invoke(cli.main, ["evaluate", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result
