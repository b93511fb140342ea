"""`from_model` gives what the right adapter gives, and says in one sentence why it cannot."""

import subprocess
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from adapters.exact import SHAPE, TARGET
from adapters.test_docs import ROWS, objects
from steps import PYTHON
from torch import nn

import fastscore as fs
from fastscore import adapters
from fastscore.adapters.any_model import INTERFACES, PACKAGES
from fastscore.cli.loading import load_density

CALLS = [call for _, call in ROWS if not call.startswith(("from_model", "from_flow_matching(velocity)"))]


@pytest.mark.parametrize("call", CALLS)
def test_it_is_the_adapter_of_every_row(call):
    given, name = objects(call), call.partition("(")[0]
    found, own = (eval(each, vars(adapters) | given) for each in (call.replace(name, "from_model"), call))
    assert type(found) is type(own)
    assert repr(found.schedule) == repr(own.schedule)
    assert found.predicts == own.predicts
    assert type(found.model) is type(own.model)
    x = TARGET.sample(4, seed=5).reshape(-1, *((4,) if name in ("from_sbi", "from_bayesflow") else SHAPE))
    for density in (found, own):
        density.core._programs.mode = False
    assert torch.equal(found.estimate(x, nfe=16).log_prob, own.estimate(x, nfe=16).log_prob)


def test_every_adapter_can_be_found():
    found = {make.__name__ for make in (*PACKAGES.values(), *INTERFACES)}
    assert found == {*adapters.__all__} - {"from_model"}


def test_what_holds_a_network_is_opened():
    from adapters import test_diffusers as d
    from adapters import test_flow_matching as f

    pipeline, velocity = d.diffusers.DDPMPipeline(d.unet(), d.ddpm()), f.Velocity()
    assert fs.from_model(pipeline).model.model is pipeline.unet
    assert fs.from_model(pipeline.unet, pipeline.scheduler).model.model is pipeline.unet
    assert fs.from_model(f.solver.ODESolver(velocity)).model is fs.adapters.from_flow_matching(velocity).model
    wrapper = f.ModelWrapper(velocity)
    assert fs.from_model(wrapper).predicts == "flow"


def test_a_factory_of_the_command_line_may_return_it(monkeypatch):
    from adapters import test_diffusers as d

    module, pipeline = types.ModuleType("held"), d.diffusers.DDPMPipeline(d.unet(), d.ddpm())
    module.build = lambda: pipeline
    monkeypatch.setitem(sys.modules, "held", module)
    density, identity = load_density("held:build", None, None, torch.device("cpu"))
    assert (density.model.model is pipeline.unet, density.predicts, identity) == (True, "eps", {"model": "held:build"})
    module.build = lambda: (pipeline.unet, pipeline.scheduler)
    assert load_density("held:build", None, None, torch.device("cpu"))[0].model.model is pipeline.unet
    module.build = lambda: (pipeline.unet, d.diffusers.IPNDMScheduler())
    with pytest.raises(ValueError, match=r"held:build returns what fastscore\.from_model refuses: scheduler must be"):
        load_density("held:build", None, None, torch.device("cpu"))
    pipeline.unet_too, module.build = d.unet(), lambda: pipeline
    with pytest.raises(
        ValueError, match=r"held:build returns what fastscore\.from_model refuses: .* must hold one net"
    ):
        load_density("held:build", None, None, torch.device("cpu"))


def test_wrappers_of_torch_are_looked_through():
    from adapters import test_diffusers as d
    from adapters import test_edm as e

    assert fs.from_model(torch.compile(d.unet()), d.ddpm()).predicts == "eps"
    assert isinstance(fs.from_model(nn.DataParallel(e.Precond(e.Raw()))).schedule, fs.EDM)


def test_options_are_those_of_the_adapter_and_of_the_density():
    from adapters import test_edm as e

    density = fs.from_model(e.Precond(e.Raw()), sigma_max=10.0, nfe=33)
    assert (density.schedule.sigma_max, density.nfe) == (10.0, 33)
    with pytest.raises(TypeError, match="predicts is no option of from_model, which reads it off"):
        fs.from_model(e.Precond(e.Raw()), predicts="eps")


def two_networks():
    from adapters import test_diffusers as d

    pipeline = d.diffusers.DDPMPipeline(d.unet(), d.ddpm())
    pipeline.unet_2 = d.unet()
    return (pipeline,)


def of_two_libraries():
    from adapters import test_diffusers as d
    from adapters import test_flow_matching as f

    return d.unet(), f.schedulers.CosineScheduler()


class Sigma(nn.Module):
    """A denoiser of somebody's own: it looks like EDM's, and says nothing of its range."""

    def forward(self, x, sigma):
        return x


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda: (nn.Linear(2, 2),), TypeError, "one of from_azula, .* got Linear of torch.*; call one"),
        (lambda: (Sigma(),), TypeError, "got Sigma of .*test_any_model; call one of them, or build fastscore.ScoreD"),
        (lambda: (nn.Linear,), TypeError, "got the class Linear and no object of it"),
        (lambda: ({"ema": None},), TypeError, "got dict of builtins; call one"),
        (lambda: (nn.Linear(2, 2), SimpleNamespace(beta_0=1)), TypeError, "got Linear .* and SimpleNamespace of types"),
        (of_two_libraries, TypeError, "got UNet2DModel .* and CosineScheduler .*, which from_diffusers and from_flow"),
        (two_networks, ValueError, "DDPMPipeline must hold one network, got unet, unet_2; give the one that denoises"),
        (lambda: of_two_libraries()[:1], TypeError, "scheduler must be a diffusers scheduler.*give pipeline.scheduler"),
    ],
)  # fmt: skip
def test_what_it_does_not_know_is_one_sentence(given, error, message):
    with pytest.raises(error, match=message) as caught:
        fs.from_model(*given())
    assert str(caught.value).count(". ") == 0


def test_no_library_is_imported():
    names = ("diffusers", "sbi", "flow_matching", "k_diffusion", "score_models", "denoising_diffusion_pytorch")
    code = (
        "import sys, torch, fastscore as fs\n"
        "try:\n    fs.from_model(torch.nn.Linear(2, 2))\nexcept TypeError:\n    pass\n"
        f"print(sorted(set({names}) & set(sys.modules)))"
    )
    done = subprocess.run([*PYTHON, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
