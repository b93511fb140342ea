"""Every tensor that the package makes from nothing says on which device: one that does not may meet data elsewhere."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import fastscore as fs

ROOT = Path(__file__).resolve().parent.parent
FACTORIES = {
    "arange", "as_tensor", "asarray", "bartlett_window", "empty", "empty_strided", "eye", "full", "hamming_window",
    "hann_window", "linspace", "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor",
    "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
ALLOWED = {
    "fastscore/demo/": "the demonstration trains its networks on the CPU and makes its own data",
}


def without_device(path):
    """Return (line, call) of every factory of torch that is called without `device`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        named = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        bare = isinstance(node.func, ast.Name) and named not in OURS
        of_torch = bare or getattr(getattr(node.func, "value", None), "id", "") == "torch"
        if of_torch and named in FACTORIES and "device" not in {keyword.arg for keyword in node.keywords}:
            found.append((node.lineno, ast.unparse(node)))
    return found


# Functions of our own by the same name, which name the device themselves (`fastscore.support.host.as_tensor`).
OURS = {"as_tensor", "normal"}


def sources():
    return [p for folder in ("fastscore", "kernels") for p in sorted((ROOT / folder).rglob("*.py"))]


def test_every_factory_names_its_device():
    found = []
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        if not any(name.startswith(allowed) for allowed in ALLOWED):
            found += [f"{name}:{line}: {call}" for line, call in without_device(path)]
    assert found == []


def test_what_is_allowed_is_there():
    assert [name for name in ALLOWED if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("line", "reported"),
    [
        ("torch.arange(3)", 1),
        ("torch.as_tensor(x, dtype=torch.float64)", 1),
        ("y = x + torch.tensor([1.0])[None]", 1),
        ("torch.arange(3, device=x.device)", 0),
        ("torch.zeros_like(x)", 0),
        ("x.new_zeros(3)", 0),
        ("np.zeros(3)", 0),
    ],
)
def test_a_planted_factory_is_reported(tmp_path, line, reported):
    path = tmp_path / "planted.py"
    path.write_text(f"import torch\n{line}\n")
    assert len(without_device(path)) == reported


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3, device="cpu")

    def forward(self, x_t, t):
        return torch.tanh(self.net(x_t)) * t[:, None]


def test_a_default_device_changes_nothing():
    """Under `torch.device("meta")` whatever does not name its device has no numbers, and meets data that have."""
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))

    def run():
        made = fs.ScoreDensity(Net().requires_grad_(False), fs.VP(), "eps", program=False)
        made.model.load_state_dict(state)
        found = [made.estimate(x, nfe=16).log_prob, fs.density_loss(made, x, seed=0, nodes=fs.AdaptiveNodes(fs.VP()))]
        made.fit(x, evaluations=2000, progress=False)
        found += [
            made.estimate(x, nfe=16).log_prob,
            *fs.probability_flow_log_prob(made, x, method="midpoint", steps=1)[:2],
        ]
        table = fs.ScoreDensity(made.model, fs.DDPM.linear(100), "eps", program=False)
        found += [table.estimate(x, nfe=16, method=method).log_prob for method in ("discrete", "elbo")]
        return [*found, fs.density_weights(table.schedule, range(100), "eps")]

    state = Net().state_dict()
    expected = run()
    with torch.device("meta"):
        found = run()
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)
