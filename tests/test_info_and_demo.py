"""What `fastscore info` says of this machine, and what `fastscore demo` passes on or misses."""

import re
import sys
import types

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import fastscore as fs
from fastscore.cli import commands as cli
from fastscore.ops.select import BACKENDS, native


def info():
    result = CliRunner().invoke(cli.main, ["info"])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_info_names_versions_and_every_backend():
    output = info()
    for package in (fs, torch, np):
        assert re.search(rf"^  {package.__name__} +{re.escape(package.__version__)}$", output, re.MULTILINE)
    for backend in BACKENDS:
        reason = backend.why_not(torch.device("cpu"), torch.float32) or "can run"
        assert re.search(rf"^  {backend.name} on cpu +{re.escape(reason)}$", output, re.MULTILINE)
    assert re.search(r"^  safetensors +\d", output, re.MULTILINE)


@pytest.fixture
def native_module(monkeypatch):
    """Return a function that puts a module, or None, in the place of fastscore._C."""

    def replace(module):
        monkeypatch.setitem(sys.modules, "fastscore._C", module)
        native.cache_clear()

    yield replace
    native.cache_clear()


def test_info_without_native_module_and_extras(native_module, monkeypatch):
    native_module(None)
    monkeypatch.setattr(cli, "_version", lambda package: None)
    output = info()
    assert re.search(r"fastscore\._C +absent: this wheel is pure Python; .* FASTSCORE_REQUIRE_CUDA=1 pip", output)
    assert re.search(r"cuda on cpu +fastscore\._C is absent: this wheel is pure Python", output)
    for package in cli.EXTRAS:
        assert f"{package:<14} not installed; pip install {package}\n" in output


def test_info_shows_the_native_module(native_module):
    module = types.ModuleType("fastscore._C")
    module.build_info = lambda: {"architectures": "80;90a"}
    module.runtime = lambda: {"driver": "none", "kernels": "cannot run: no NVIDIA driver is installed"}
    native_module(module)
    output = info()
    assert re.search(
        r"fastscore\._C +present\n  architectures +80;90a\n  driver +none\n  kernels +cannot run: no", output
    )


def test_info_shows_why_the_native_module_cannot_be_loaded(native_module, monkeypatch, tmp_path):
    (tmp_path / "_C.py").write_text("raise ImportError('libstdc++.so.6: version GLIBCXX_3.4.29 not found')")
    monkeypatch.setattr(fs, "__path__", [str(tmp_path), *fs.__path__])
    monkeypatch.delitem(sys.modules, "fastscore._C", raising=False)
    native.cache_clear()
    assert re.search(r"fastscore\._C +unusable: libstdc\+\+\.so\.6: version GLIBCXX_3\.4\.29 not found\n", info())


def test_info_survives_what_is_broken(native_module):
    native_module(types.ModuleType("fastscore._C"))
    output = info()
    assert "cannot be found out: AttributeError" in output
    assert "optional packages" in output


def test_demo_passes_its_options_on(monkeypatch):
    calls = []
    module = types.ModuleType("fastscore.demo")
    module.run_demo = lambda *args, **kwargs: calls.append((args, kwargs))
    monkeypatch.setitem(sys.modules, "fastscore.demo", module)
    assert CliRunner().invoke(cli.main, ["demo", "--out", "pictures", "--seed", "5"]).exit_code == 0
    assert calls == [(("pictures",), {"seed": 5})]


def test_demo_names_what_it_misses(monkeypatch):
    for module in ("sklearn", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)
    result = CliRunner().invoke(cli.main, ["demo"])
    assert result.exit_code == 1
    assert result.stderr == "Error: the demo needs scikit-learn and matplotlib; pip install scikit-learn matplotlib\n"


def test_demo_wants_a_folder(tmp_path):
    (tmp_path / "x.npy").touch()
    result = CliRunner().invoke(cli.main, ["demo", "--out", str(tmp_path / "x.npy")])
    assert result.exit_code == 1
    assert result.stderr == f"Error: out must be a folder, got the file '{tmp_path / 'x.npy'}'; give another name\n"
