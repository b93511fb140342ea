"""Schedules, arrays and networks by name: what is loaded, and the sentence where it cannot be."""

import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.export import Dim

import fastscore as fs
from fastscore.cli.arrays import load_array
from fastscore.cli.loading import load_density
from fastscore.cli.schedules import SCHEDULES, parse_schedule

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ddpm-linear", fs.DDPM.linear(1000)),
        ("ddpm-linear:100", fs.DDPM.linear(100)),
        ("ddpm-linear:100,1e-3,0.1", fs.DDPM.linear(100, 1e-3, 0.1)),
        ("ddpm-scaled-linear", fs.DDPM.scaled_linear(1000)),
        ("ddpm-cosine:50", fs.DDPM.cosine(50)),
        ("vp:0.2,10", fs.VP(0.2, 10)),
        ("cosine", fs.Cosine()),
        ("ve:0.02,40", fs.VE(0.02, 40)),
        ("edm:0.004,70,0.7", fs.EDM(0.004, 70, 0.7)),
        ("flow", fs.FlowMatching(1)),
        ("flow:0", fs.FlowMatching(0)),
        ("li-yan", fs.LiYan()),
        ("log-snr:-8,9", fs.LogSNR(-8, 9)),
    ],
)
def test_schedules(text, expected):
    schedule = parse_schedule(text)
    assert type(schedule) is type(expected)
    time = torch.arange(50) if expected.discrete else expected.time(torch.linspace(-5, 5, 7))
    torch.testing.assert_close(schedule.log_snr(time), expected.log_snr(time), rtol=0, atol=0)
    assert schedule.data_std == expected.data_std
    assert schedule.log_snr_range == expected.log_snr_range


@pytest.mark.parametrize("name", ["table.npy", "table.pt:alphas_cumprod"])
def test_schedule_from_a_table(tmp_path, name):
    table = torch.linspace(0.99, 0.01, 30, dtype=torch.float64)
    np.save(tmp_path / "table.npy", table)
    torch.save({"alphas_cumprod": table, "betas": table}, tmp_path / "table.pt")
    schedule = parse_schedule(str(tmp_path / name))
    torch.testing.assert_close(schedule.log_snr(torch.arange(30)), torch.logit(table))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linear", r"must be one of " + r".*".join(SCHEDULES) + r".* or a \.npy or \.pt file .*got 'linear'"),
        ("vp:1,2,3", r"'vp' takes vp\[:beta_min=0\.1,beta_max=20\.0\].*got 'vp:1,2,3'"),
        ("vp:fast", r"'vp' takes vp.*got 'vp:fast'"),
        ("ddpm-linear:10.5", r"'ddpm-linear' takes ddpm-linear\[:steps=1000.*got 'ddpm-linear:10\.5'"),
        ("li-yan:1", r"'li-yan' takes li-yan, numbers"),
        ("vp:3,2", "VP needs 0 < beta_min < beta_max, got 3, 2"),
    ],
)
def test_schedule_errors(text, message):
    with pytest.raises(ValueError, match=message):
        parse_schedule(text)


@pytest.fixture
def arrays(tmp_path, monkeypatch):
    """One array in every kind of file, alone and beside another."""
    monkeypatch.chdir(tmp_path)
    x = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x.float() + 1
    np.save("x.npy", x.numpy())
    np.savez("one.npz", x=x.numpy())
    np.savez("two.npz", x=x.numpy(), y=y.numpy())
    torch.save(x.clone().requires_grad_(), "x.pt")
    torch.save({"x": x, "y": y, "epoch": 3}, "two.pt")
    save_file({"x": x}, "one.safetensors")
    save_file({"x": x, "y": y}, "two.safetensors")
    torch.save([x], "list.pt")
    torch.save(nn.Linear(2, 2), "module.pt")
    for name in ("bad.npy", "bad.npz", "bad.pt", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"no array")
    return x


@pytest.mark.parametrize(
    "spec", ["x.npy", "one.npz", "one.npz:x", "two.npz:x", "x.pt", "two.pt:x", "one.safetensors", "two.safetensors:x"]
)
def test_arrays(arrays, spec):
    loaded = load_array(spec)
    np.testing.assert_array_equal(np.asarray(loaded), arrays.numpy())
    assert not getattr(loaded, "requires_grad", False)


def test_npy_is_mapped_and_stays_as_it_was(arrays):
    loaded = load_array("x.npy")
    assert isinstance(loaded, np.memmap)
    loaded[0] = 7
    np.testing.assert_array_equal(np.load("x.npy"), arrays.numpy())


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("x.txt", ValueError, r"must be a \.npy, \.npz, \.pt or \.safetensors file.*got 'x\.txt'"),
        ("z.npy", FileNotFoundError, r"no data file 'z\.npy' in .*check the path"),
        ("two.npz", ValueError, r"two\.npz holds 2 arrays \(x, y\); choose one as two\.npz:NAME"),
        ("two.pt", ValueError, r"two\.pt holds 2 arrays \(x, y\)"),
        ("two.safetensors", ValueError, r"two\.safetensors holds 2 arrays \(x, y\)"),
        ("two.npz:z", ValueError, r"two\.npz has no 'z'; it holds x, y"),
        ("two.pt:epoch", ValueError, r"two\.pt has no 'epoch'; it holds x, y"),
        ("two.safetensors:z", ValueError, "has no 'z'; it holds x, y"),
        ("x.npy:x", ValueError, r"x\.npy holds one array without a name, got the key 'x'; drop :x"),
        ("x.pt:x", ValueError, "drop :x"),
        ("list.pt", ValueError, r"list\.pt cannot be read.*holds a list, expected a tensor or a dictionary of tensors"),
        ("module.pt", ValueError, r"module\.pt cannot be read as a \.pt file of plain numbers"),
        ("bad.npy", ValueError, r"bad\.npy cannot be read as a \.npy file"),
        ("bad.npz", ValueError, r"bad\.npz cannot be read as a \.npz file"),
        ("bad.pt", ValueError, r"bad\.pt cannot be read as a \.pt file"),
        ("bad.safetensors", ValueError, r"bad\.safetensors cannot be read as a \.safetensors file"),
    ],
)
def test_array_errors(arrays, spec, error, message):
    with pytest.raises(error, match=message):
        load_array(spec)


def test_safetensors_names_its_extra(arrays, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match=r"one\.safetensors needs .*pip install safetensors$"):
        load_array("one.safetensors")


class Net(nn.Module):
    """An exportable network; `noise` gives it a dropout layer."""

    def __init__(self, noise=0.0):
        super().__init__()
        self.layer, self.dropout = nn.Linear(3, 2), nn.Dropout(noise)

    def forward(self, x, t):
        return self.dropout(self.layer(torch.cat([x, t[:, None].to(x.dtype)], 1)))


BATCH = Dim("batch")
BOTH = ({0: BATCH}, {0: BATCH})


def export(path, net, shapes=BOTH, time=None):
    time = torch.rand(4) if time is None else time
    torch.export.save(torch.export.export(net, (torch.randn(4, 2), time), dynamic_shapes=shapes), path)
    return str(path)


def test_exported_network(tmp_path):
    net = Net().eval()
    density, identity = load_density(export(tmp_path / "net.pt2", net), "vp", "v", CPU)
    x, t = torch.randn(7, 2), torch.rand(7)
    torch.testing.assert_close(density.model(x, t), net(x, t))
    assert (density.predicts, repr(density.schedule)) == ("v", repr(fs.VP()))
    with torch.no_grad():
        net.layer.weight += 1
    assert load_density(export(tmp_path / "other.pt2", net), "vp", "v", CPU)[1] != identity


@pytest.mark.parametrize("time", [torch.rand(4), torch.arange(4)], ids=["float", "int"])
def test_exported_network_gets_times_in_its_own_dtype(tmp_path, time):
    net = Net().eval()
    density, _ = load_density(export(tmp_path / "net.pt2", net, time=time), "ddpm-linear:100", "eps", CPU)
    x = torch.randn(5, 2)
    expected = fs.ScoreDensity(net, fs.DDPM.linear(100), "eps").estimate(x, nfe=16)
    torch.testing.assert_close(density.estimate(x, nfe=16).log_prob, expected.log_prob)


class Three(Net):
    def forward(self, x, t, y):
        return super().forward(x + y, t)


def test_exports_that_do_not_serve(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt2").write_text("no archive")
    export("fixed.pt2", Net().eval(), None)
    bounded = Dim("batch", max=64)
    export("bounded.pt2", Net().eval(), ({0: bounded}, {0: bounded}))
    export("train.pt2", Net(0.5).train())
    export("int.pt2", Net().eval(), time=torch.arange(4))
    x = torch.randn(4, 2)
    three = torch.export.export(Three().eval(), (x, torch.rand(4), x), dynamic_shapes=(*BOTH, {0: BATCH}))
    torch.export.save(three, "three.pt2")
    dynamic = r"torch\.export\.export\(model, \(x_t, t\), dynamic_shapes="
    for name, message in {
        "missing.pt2": r"the model missing\.pt2 does not exist; expected a \.pt2 file",
        "text.pt2": r"text\.pt2 is not a file that torch\.export\.save wrote",
        "fixed.pt2": rf"was exported for x of the fixed shape \(4, 2\); use {dynamic}",
        "bounded.pt2": rf"was exported for at most 64 rows at once; use {dynamic}.*without a max",
        "train.pt2": r"in train mode \(aten\.dropout\.default\).*call model\.eval\(\) before",
        "int.pt2": r"takes torch\.int64 timesteps, but schedule 'vp' gives fractions; use a ddpm table",
        "three.pt2": r"takes the inputs \('x', 't', 'y'\) by position, expected \(x_t, t\)",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_density(name, "vp", "eps", CPU)


ZOO = """
import torch, fastscore
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
    def forward(self, x, t):
        return self.dropout(x)

class Family:
    net = Net

def ready(): return fastscore.ScoreDensity(Net(), fastscore.EDM(), "denoiser", nfe=48)
def number(): return 3
def fails(): raise KeyError("weights.bin")
def demands(path): return Net()
value = 3
"""


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A module `zoo` of factories in the working directory."""
    (tmp_path / "zoo.py").write_text(ZOO)
    (tmp_path / "torn.py").write_text("def f(:\n")
    with zipfile.ZipFile(tmp_path / "zipped.pt2", "w") as archive:
        archive.writestr("a", "b")
    (tmp_path / "hungry.py").write_text("import missing_dependency\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("zoo", None)


@pytest.mark.parametrize("spec", ["zoo:Net", "zoo:Family.net"])
def test_network_from_a_factory(zoo, spec):
    density, identity = load_density(spec, "flow:0", "flow", CPU)
    assert identity == {"model": spec}
    assert not density.model.training
    assert (density.predicts, density.schedule.data_at) == ("flow", 0)


def test_density_from_a_factory(zoo):
    density, _ = load_density("zoo:ready", None, None, CPU)
    assert (density.predicts, density.nfe, repr(density.schedule)) == ("denoiser", 48, repr(fs.EDM()))
    assert not density.model.training
    for schedule, predicts in (("vp", None), (None, "eps")):
        with pytest.raises(ValueError, match="a ready ScoreDensity, which brings its own; drop --schedule and --pred"):
            load_density("zoo:ready", schedule, predicts, CPU)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("net.onnx", ValueError, r"must be a \.pt2 file of torch\.export or package\.module:factory, got 'net\.onnx'"),
        ("circus:Net", ValueError, "there is no module 'circus' for the model circus:Net; it must lie in .* or be"),
        ("zoo.cage:Net", ValueError, r"there is no module 'zoo\.cage'"),
        ("zoo:Lion", ValueError, "module 'zoo' has no 'Lion'; expected a function without arguments"),
        ("zoo:numbr", ValueError, "module 'zoo' has no 'numbr'; expected a function .*; did you mean 'number'"),
        (
            "zoo:number",
            ValueError,
            r"zoo:number must return a torch\.nn\.Module, .* or what fastscore\.from_model .* got int",
        ),
        ("zoo:fails", ValueError, r"raised KeyError: 'weights\.bin' \(.*zoo\.py, line \d+\)"),
        ("zoo:demands", ValueError, "zoo:demands needs the argument path, expected a function without any; write one"),
        (
            "zoo:value",
            ValueError,
            "zoo:value is of type int, expected a function without arguments that returns a",
        ),
        ("hungry:Net", ModuleNotFoundError, "hungry:Net imports 'missing_dependency', which is not installed"),
        ("torn:Net", ValueError, r"the module of torn:Net cannot be imported: SyntaxError.*torn\.py, line 1\)"),
        (":Net", ValueError, r"must be a \.pt2 file of torch\.export or package\.module:factory, got ':Net'"),
        ("zoo:", ValueError, r"must be a \.pt2 file of torch\.export or package\.module:factory, got 'zoo:'"),
        ("zipped.pt2", ValueError, "zipped.pt2 is not a file that torch.export.save wrote: "),
    ],
)
def test_factory_errors(zoo, spec, error, message):
    with pytest.raises(error, match=message):
        load_density(spec, "vp", "eps", CPU)


@pytest.mark.parametrize(
    ("schedule", "predicts", "missing", "told", "not_told"),
    [
        (None, "eps", "--schedule is", "Schedules: ddpm-linear", "--predicts must say"),
        ("vp", None, "--predicts is", r"'v' \(alpha eps - sigma x\)", "Schedules:"),
        (None, None, "both are", r"'v' \(alpha eps - sigma x\).*Schedules: ddpm-linear", None),
    ],
)
def test_a_network_needs_schedule_and_predicts(zoo, schedule, predicts, missing, told, not_told):
    message = rf"zoo:Net is a network; say with --schedule and --predicts .*\({missing} missing\): .*{told}"
    with pytest.raises(ValueError, match=message) as refused:
        load_density("zoo:Net", schedule, predicts, CPU)
    assert not_told is None or not_told not in str(refused.value)


def test_a_module_that_is_named_as_a_file_is_told_how_to_name_it(zoo):
    with pytest.raises(ValueError, match=r"there is no module .*zoo\.py:Net; write zoo:Net$"):
        load_density("zoo.py:Net", "vp", "eps", CPU)


def test_the_call_that_a_refused_export_names_is_one_that_works(tmp_path):
    """Of a network with a condition: the dictionary of shapes names all of its inputs."""

    class Labelled(nn.Module):
        def forward(self, x, t, y):
            return x * t[:, None] + y[:, None]

    inputs, y = (torch.randn(3, 2), torch.rand(3)), torch.randn(3)
    torch.export.save(torch.export.export(Labelled(), inputs, {"y": y}), tmp_path / "fixed.pt2")
    with pytest.raises(ValueError, match=r"fixed shape \(3, 2\); use ") as refused:
        load_density(str(tmp_path / "fixed.pt2"), "vp", "eps", CPU)
    call, _, batch = str(refused.value).partition("; use ")[2].partition(" with batch = ")
    known = {"torch": torch, "model": Labelled(), "x_t": inputs[0], "t": inputs[1], "y": y}
    torch.export.save(eval(call, known | {"batch": eval(batch, known)}), tmp_path / "open.pt2")
    density, _ = load_density(str(tmp_path / "open.pt2"), "vp", "eps", CPU)
    assert density.log_prob(torch.randn(5, 2), y=torch.randn(5)).shape == (5,)
