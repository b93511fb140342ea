"""The command line end to end: the numbers it writes, and what it says of what does not fit."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from command_line import ARGUMENTS, N, evaluate, filled
from steps import PYTHON
from torch.export import Dim

import fastscore as fs
from fastscore.cli.commands import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    yield from filled(tmp_path, monkeypatch)


def expected(folder, **options):
    import zoo

    density = fs.ScoreDensity(zoo.Net(), fs.VP(), "eps")
    return density.estimate(torch.from_numpy(np.load("data.npy")), **{"nfe": 32, "seed": 3} | options)


def number(output, label):
    return float(re.search(rf"^{re.escape(label)}\s+(?:<= )?(\S+)", output, re.MULTILINE)[1])


def test_data_outside_of_the_levels_are_said(folder):
    x = np.load("data.npy")
    said = rf"{int(((x < -0.5) | (x >= 0.5)).sum())} of {x.size} entries of the data lie outside .*\(--low, --high\)"
    with pytest.warns(UserWarning, match=said):
        evaluate(*ARGUMENTS, "--bins", 256, "--low", -0.5, "--high", 0.5, "--out", "r.npz")


def test_writes_the_densities_and_sums_them_up(folder):
    output = evaluate(*ARGUMENTS, "--bins", 256, "--low", -2, "--high", 2, "--out", "r.npz").stdout
    whole = expected(folder)
    mean, error = whole.mean()
    bits = float(whole.bits_per_dim(256, -2, 2).mean())
    stored = np.load("r.npz")
    np.testing.assert_allclose(stored["log_prob"], whole.log_prob, rtol=1e-5)
    np.testing.assert_allclose(stored["bits_per_dim"], whole.bits_per_dim(256, -2, 2), rtol=1e-5)
    assert number(output, "samples") == N
    assert number(output, "dims") == 2
    assert number(output, "log_prob") == pytest.approx(mean, rel=1e-5)
    assert f"+- {error:.2g} nats" in output
    assert number(output, "bits/dim") == pytest.approx(bits, rel=1e-5)
    assert f"+- {error / (2 * np.log(2)):.2g}\n" in output
    assert number(output, "stderr") == pytest.approx(float(whole.stderr.mean()), rel=0.01)
    assert number(output, "evaluations") == 32
    assert number(output, "truncation") == pytest.approx(whole.truncation, rel=0.05)
    assert number(output, "discretization") == pytest.approx(whole.discretization, rel=0.05)
    assert number(output, "seconds") < 60
    assert output.endswith("written to      r.npz\n")


def test_warnings_are_one_line_each_and_others_keep_their_place(folder):
    (folder / "warns.py").write_text("import warnings, zoo\nwarnings.warn('of its own')\nNet = zoo.Net\n")
    np.save("constant.npy", np.stack([np.linspace(0, 1, N), np.zeros(N)], 1).astype(np.float32))
    command = [
        *PYTHON,
        "-m",
        "fastscore",
        "evaluate",
        "warns:Net",
        *ARGUMENTS[1:],
        "--fit",
        "constant.npy",
    ]
    found = subprocess.run([*command, "--out", "r.npz"], capture_output=True, text=True, check=True, timeout=300)
    lines = [line for line in found.stderr.splitlines() if "arn" in line]
    assert lines[0] == f"{folder / 'warns.py'}:2: UserWarning: of its own"
    assert lines[2].startswith(
        "fastscore: warning: of the data's 2 dimensions 1 constant: in them the density is infinite"
    )
    assert lines[2].endswith("before training")
    assert all(line.startswith("fastscore: warning: ") for line in lines[3:])
    assert "click" not in found.stderr


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (("--method", "elbo"), {"method": "elbo"}),
        (("--target-stderr", "1.2", "--max-nfe", "128"), {"target_stderr": 1.2, "max_nfe": 128}),
        (("--memory", "64KB", "--device", "cpu"), {"memory": "64KB"}),
    ],
)
def test_options_reach_the_estimate(folder, given, options):
    evaluate(*ARGUMENTS, *given, "--out", "r.csv")
    whole = expected(folder, **options)
    table = np.genfromtxt("r.csv", delimiter=",", names=True)
    assert table.dtype.names == ("sample_index", "log_prob", "stderr", "nfe", "truncation", "discretization")
    np.testing.assert_allclose(table["log_prob"], whole.log_prob, rtol=1e-5)
    np.testing.assert_allclose(table["stderr"], whole.stderr, rtol=1e-5)
    np.testing.assert_array_equal(table["nfe"], whole.nfe)


@pytest.mark.parametrize("data", ["data.npz:x", "data.pt:x", "data.safetensors"])
def test_every_kind_of_data_gives_the_same_file(folder, data):
    evaluate(*ARGUMENTS, "--out", "a.npz")
    evaluate("zoo:Net", data, *ARGUMENTS[2:], "--out", "b.npz")
    assert (folder / "a.npz").read_bytes() == (folder / "b.npz").read_bytes()


def test_exported_network(folder):
    evaluate(*ARGUMENTS, "--out", "a.npz")
    import zoo

    batch = Dim("batch")
    program = torch.export.export(
        zoo.Net(), (torch.randn(4, 2), torch.rand(4)), dynamic_shapes=({0: batch}, {0: batch})
    )
    torch.export.save(program, "net.pt2")
    evaluate("net.pt2", *ARGUMENTS[1:], "--out", "b.npz")
    np.testing.assert_allclose(np.load("b.npz")["log_prob"], np.load("a.npz")["log_prob"], rtol=1e-5)
    wrong = evaluate("net.pt2", "wide.npy", *ARGUMENTS[2:], "--out", "c.npz", code=1)
    assert wrong.stderr.startswith("Error: the network does not take data of shape (3,) a sample: ")
    assert wrong.stderr.count("\n") == 1
    fixed = torch.export.export(zoo.Net(), (torch.randn(4, 2), torch.rand(4)))
    torch.export.save(fixed, "fixed.pt2")
    message = evaluate("fixed.pt2", *ARGUMENTS[1:], "--out", "c.npz", code=1).stderr
    assert "was exported for x of the fixed shape (4, 2); use torch.export.export(model, (x_t, t), dynamic_" in message


def test_ready_density_brings_its_own_options(folder):
    evaluate("zoo:ready", "data.npy", "--seed", 3, "--out", "r.npz")
    np.testing.assert_allclose(np.load("r.npz")["log_prob"], expected(folder, nfe=40).log_prob, rtol=1e-5)


def test_fit(folder):
    train = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    np.save("train.npy", train.numpy())
    evaluate(*ARGUMENTS, "--fit", "train.npy", "--out", "r.npz")
    import zoo

    density = fs.ScoreDensity(zoo.Net(), fs.VP(), "eps").fit(train, seed=3, progress=False)
    whole = density.estimate(torch.from_numpy(np.load("data.npy")), nfe=32, seed=3)
    np.testing.assert_allclose(np.load("r.npz")["log_prob"], whole.log_prob, rtol=1e-5)
    np.testing.assert_allclose(np.load("r.npz")["stderr"], whole.stderr, rtol=1e-5)


def test_a_network_that_misses_a_condition_in_the_fit_says_where_it_comes_from(folder):
    (folder / "picky.py").write_text(
        "import zoo\n"
        "class Net(zoo.Net):\n"
        "    def forward(self, x, t, y=None):\n"
        "        if y is None:\n"
        "            raise ValueError('y should be provided')\n"
        "        return super().forward(x, t)\n"
    )
    np.save("y.npy", np.zeros(N, np.int64))
    command = ["evaluate", "picky:Net", "data.npy", "--schedule", "vp", "--predicts", "eps", "--cond", "y=y.npy"]
    done = CliRunner().invoke(main, [*command, "--fit", "data.npy", "--out", "r.npz"])
    assert "y should be provided" in done.stderr
    assert "--cond is of DATA alone, and the training data have --fit-cond" in done.stderr


def test_a_fit_says_what_it_may_spend_and_takes_a_bound(folder):
    np.save("train.npy", torch.randn(40, 2, generator=torch.Generator().manual_seed(1)).numpy())
    command = ["evaluate", *map(str, ARGUMENTS), "--fit", "train.npy", "--out", "r.npz"]
    done = CliRunner().invoke(main, [*command, "--fit-evaluations", "1000"])
    assert done.stderr.startswith("fitting first, unless that was done: at most 1,000 evaluations of the network")
    train = torch.from_numpy(np.load("train.npy"))
    import zoo

    density = fs.ScoreDensity(zoo.Net(), fs.VP(), "eps").fit(train, evaluations=1000, seed=3, progress=False)
    whole = density.estimate(torch.from_numpy(np.load("data.npy")), nfe=32, seed=3)
    np.testing.assert_allclose(np.load("r.npz")["stderr"], whole.stderr, rtol=1e-5)
    done = CliRunner().invoke(main, [*command, "--restart"])
    assert "at most 400,000 evaluations of the network, which --fit-evaluations bounds" in done.stderr
    done = CliRunner().invoke(main, [*command[:-4], "--fit-evaluations", "1000", "--out", "other.npz"])
    assert "fit_evaluations=1000 (--fit-evaluations) bounds a fit and there is no training data" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zoo:Net", "levels.npy", *ARGUMENTS[2:]), r"data holds integers \(uint8\).*fastscore\.Levels"),
        (("zoo:Net", "data.npz", *ARGUMENTS[2:]), r"data\.npz holds 2 arrays \(labels, x\); choose one as data\.npz:N"),
        (("zoo:Net", "data.pt:y", *ARGUMENTS[2:]), r"data\.pt has no 'y'; it holds labels, x"),
        (("zoo:Net", "none.npy", *ARGUMENTS[2:]), r"there is no data file 'none\.npy'"),
        (("zoo:Net", "wide.npy", *ARGUMENTS[2:]), r"the network does not take data of shape \(3,\) a sample"),
        (
            ("zoo:Net", "data.npy"),
            "zoo:Net is a network; say with --schedule and --predicts how it was trained [(]both are missing",
        ),
        (("zoo:ready", *ARGUMENTS[1:]), "zoo:ready returns a ready ScoreDensity, which brings its own; drop"),
        ((*ARGUMENTS, "--schedule", "quadratic"), "schedule must be one of ddpm-linear.*got 'quadratic'$"),
        ((*ARGUMENTS, "--schedule", "ddpm_linear:100"), "got 'ddpm_linear:100'; did you mean 'ddpm-linear'[?]"),
        ((*ARGUMENTS, "--schedule", "squaredcos_cap_v2"), "; did you mean 'ddpm-cosine'[?]"),
        ((*ARGUMENTS, "--schedule", "subvpsde"), "got 'subvpsde'$"),  # another process than any
        ((*ARGUMENTS, "--schedule", "flow-linear"), "got 'flow-linear'$"),
        ((*ARGUMENTS, "--fit", "wide.npy"), r"fit data has samples of shape \(3,\), expected \(2,\) as in data"),
        ((*ARGUMENTS, "--nfe", 2), "nfe=2 leaves fewer than 4 draws"),
        ((*ARGUMENTS, "--target-stderr", -1), "target_stderr must be positive"),
        ((*ARGUMENTS, "--memory", "much"), "memory must be a number of bytes or a text like '512MB', got 'much'"),
        ((*ARGUMENTS, "--device", "abacus"), "device 'abacus' cannot be used: .*; use cpu, cuda or auto"),
        ((*ARGUMENTS, "--out", "r.parquet"), r"out must be a \.npz or \.csv file, got 'r\.parquet'"),
    ],
)
def test_errors_are_one_sentence(folder, arguments, message):
    result = evaluate("--out", "r.npz", *arguments, code=1)
    assert re.match(f"Error: .*{message}", result.stderr.splitlines()[-1]), result.stderr
    assert result.stdout == ""
    assert not (folder / "r.npz.partial").exists()


LABELLED = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.line, self.label = nn.Linear(2, 2), nn.Embedding(3, 2)

    def forward(self, x, t, y):
        return self.line(x) + self.label(y)

class Free(Net):
    def forward(self, x, t, **cond):
        return super().forward(x, t, **cond)

class Crash(Net):
    def forward(self, x, t, y=None):
        raise ArithmeticError("of its own")
"""


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("labelled:Net", "", "labelled:Net needs the condition 'y', which --cond does not give; add --cond y=FILE"),
        ("labelled:Net", "--cond z=y.npy", "labelled:Net takes no condition 'z'; it takes y; drop --cond z"),
        ("zoo:Net", "--cond y=1", "zoo:Net takes no condition 'y'; it takes none; drop --cond y"),
        (
            "labelled:Net",
            "--cond y=y.npy --fit data.npy",
            "needs the condition 'y', which --fit-cond does not give; add",
        ),
        (
            "labelled:Net",
            "--cond y=y.npy --fit-cond y=y.npy",
            "--fit-cond y=y.npy is of training data, which --fit",
        ),
        ("labelled:Net", "--cond y=texts.npy", "condition 'y' must hold numbers, got <U1 in texts.npy; convert them"),
        ("labelled:Net", "--cond y=many.npy", r"the evaluation stopped at IndexError: index out of range in self \(.*"),
        (
            "labelled:Free",
            "",
            r"wants more than it was given as model\(x_t, t\): .* missing 1 .*: 'y'",
        ),
        ("labelled:Crash", "--cond y=y.npy", "the network does not take data of shape .*: ArithmeticError: of its own"),
        ("plain.pt2", "--cond y=1", "plain.pt2 takes no condition 'y'; it takes none; drop --cond y"),
        ("own.pt2", "", "own.pt2 needs the condition 'y', which --cond does not give; add --cond y=FILE"),
        ("own.pt2", "--cond y=1", "condition 'y' of own.pt2 was exported as a tensor, got the number 1; give it as a"),
        ("own.pt2", "--cond y=y.npy --fit data.npy", "own.pt2 needs the condition 'y', which --fit-cond does not give"),
        ("zoo:fails", "", r"zoo:fails was called without arguments and raised KeyError: 'weights\.bin' \(.*, line"),
    ],
)
def test_models_and_conditions_that_do_not_fit_get_one_sentence(folder, model, options, message):
    (folder / "labelled.py").write_text(LABELLED)
    np.save("y.npy", np.arange(N) % 3)
    np.save("many.npy", np.arange(N))
    np.save("texts.npy", np.array(["a"] * N))
    if model.endswith(".pt2"):
        names = {}
        exec(LABELLED, names)
        rows, example = {0: Dim("rows")}, (torch.randn(5, 2), torch.rand(5))
        net, given, shapes = names["Net"]().eval(), {"y": torch.arange(5) % 3}, {"x": rows, "t": rows, "y": rows}
        if model == "plain.pt2":
            net, given, shapes = Plain().eval(), {}, {"x": rows, "t": rows}
        torch.export.save(torch.export.export(net, example, given, dynamic_shapes=shapes), model)
    try:
        result = evaluate(model, *ARGUMENTS[1:], "--out", "r.npz", *options.split(), code=1)
    finally:
        sys.modules.pop("labelled", None)
    assert isinstance(result.exception, SystemExit)
    assert re.match(f"Error: .*{message}", result.stderr.splitlines()[-1]), result.stderr
    assert result.stdout == ""


class Plain(torch.nn.Module):
    def forward(self, x, t):
        return 0.5 * x


def test_help_says_what_the_methods_are():
    told = " ".join(CliRunner().invoke(main, ["evaluate", "--help"]).stdout.split())
    for sentence in (
        "density: the integral over",
        "sum over the timesteps of a table, which has nothing to do with disc",
    ):
        assert sentence in told
