"""Every call in docs/adapters.md runs as it stands, on objects of the library that its row names."""

import re
from pathlib import Path

import pytest
import torch
from adapters.exact import SHAPE, TARGET
from analytic import ExactNet

import fastscore as fs
from fastscore import adapters

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
ROWS = re.findall(r"^\| ([^|]+?) \| `(from_[^`]+)` \|", PAGE, re.MULTILINE)
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def objects(call):
    """Return the names of a row's call, and one option that its exact network needs when it is evaluated."""
    function = call.partition("(")[0]
    if function == "from_diffusers":
        from adapters import test_diffusers as t

        scheduler, flow = t.ddpm(), t.diffusers.FlowMatchEulerDiscreteScheduler()
        bar = scheduler.alphas_cumprod.double()
        table = t.ExactModel("epsilon", lambda i: bar[i].sqrt(), lambda i: (1 - bar[i]).sqrt())
        from adapters import test_diffusers_edm as e

        more = {"edm_unet": e.ExactInner(0.5, 1), "edm_scheduler": t.ddpm("EDMEulerScheduler")}
        more["average"] = e.EMAModel([])  # of an exact network, which has no parameters
        networks = more | {"unet": table, "transformer": t.ExactSD3(), "own_network": t.ExactOwn(lambda s: s)}
        return networks | {"scheduler": scheduler, "flow_scheduler": flow}
    if function == "from_edm":
        from adapters import test_edm as t

        raw = t.ExactRaw()
        raw.owner = (t.Precond(raw),)
        return {"net": raw.owner[0]}
    if function == "from_k_diffusion":
        from adapters import test_k_diffusion as t

        return {
            "denoiser": t.external.VDenoiser(t.Callable(t.exact_v)),
            "table_denoiser": t.external.DiscreteEpsDDPMDenoiser(t.Callable(t.exact_table), t.BAR, quantize=True),
        }
    if function == "from_flow_matching":
        from adapters import test_flow_matching as t

        cosine = t.schedulers.CosineScheduler
        exact = {"velocity": t.Exact(t.schedulers.CondOTScheduler()), "model": t.Exact(cosine(), "x0")}
        return exact | {"CosineScheduler": cosine}
    if function == "from_sbi":
        from adapters import test_sbi as t

        return {"estimator": t.build("vp"), "observation": torch.zeros(t.CONDITION)}
    if function == "from_score_sde":
        from adapters import test_score_sde as t

        sde = t.VPSDE()
        return {"model": t.Exact(lambda labels: sde.marginal(labels / 999), score=False), "sde": sde}
    if function == "from_score_models":
        from adapters import test_score_models as t

        net = t.Exact()
        model = t.wrap(net, "ve")
        net.sde = model.sde
        return {"score_model": model}
    if function == "from_lucidrains":
        from adapters import test_lucidrains as t

        return {"diffusion": t.diffusion(t.Exact("pred_v"), auto_normalize=False)}
    if function == "from_bayesflow":
        from adapters import test_bayesflow as t

        return {"approximator": t.plain(), "observed": t.np.zeros((1, t.CONDITION))}
    if function == "from_azula":
        from adapters import test_azula as t

        return {"azula_denoiser": t.denoise.KarrasDenoiser(t.Exact("Karras"), t.noise.VPSchedule())}
    if function == "from_monai":
        from adapters import test_monai as t

        pairs = t.TABLES["DDPM"](), t.FLOWS["continuous"]()
        made = {"monai_unet": t.exact_on(pairs[0]), "flow_unet": t.exact_on(pairs[1])}
        return made | {"monai_scheduler": pairs[0], "rflow_scheduler": pairs[1]}
    if function == "from_torchcfm":
        from adapters import test_torchcfm as t

        matcher = t.MATCHERS["circle"]()
        return {"model": t.Exact(matcher), "matcher": matcher}
    if function == "from_model":
        from adapters import test_diffusers as t

        exact = objects("from_diffusers(")
        return {"pipeline": t.diffusers.DDPMPipeline(exact["unet"], exact["scheduler"])}
    from adapters import test_guided_diffusion as t

    return {"model": t.Exact((1 - t.BETAS).cumprod(0), 1, data=False), "process": t.Diffusion(t.BETAS)}


def test_every_adapter_has_a_row():
    assert {call.partition("(")[0] for _, call in ROWS} == set(adapters.__all__)


@pytest.mark.parametrize(
    ("library", "call"), ROWS, ids=[f"{call.partition('(')[0]}-{i}" for i, (_, call) in enumerate(ROWS)]
)
def test_the_call_of_every_row_runs(library, call):
    density = eval(call, vars(adapters) | objects(call))
    getattr(density, "density", density)._programs.mode = False
    shape = (4,) if call.startswith(("from_sbi", "from_bayesflow")) else SHAPE
    z = TARGET.sample(16, seed=5)
    found = density.estimate(z.reshape(-1, *shape), nfe=128)
    error = (found.log_prob - TARGET.log_prob(z)).abs()
    assert bool((error < 5 * found.stderr + found.truncation + found.discretization).all()), (library, error)


def test_the_version_of_every_row_is_the_one_that_runs_here():
    from importlib.metadata import PackageNotFoundError, version

    named = {
        tuple(re.match(r"([\w-]+) (\d[\w.]*)", library).groups())
        for library, _ in ROWS
        if re.match(r"[\w-]+ \d", library)
    }
    assert len(named) == 10
    for name, tested in named:
        try:
            assert version(name) == tested, name
        except PackageNotFoundError:
            continue


def test_the_blocks_run(capsys):
    first, second = CODE
    test_diffusers = pytest.importorskip("diffusers") and __import__("adapters.test_diffusers", fromlist=["unet"])
    names = {"unet": test_diffusers.unet(), "scheduler": test_diffusers.ddpm()}
    exec(first, names | {"images": torch.randn(2, 1, 8, 8), "labels": torch.tensor([0, 1])})
    assert capsys.readouterr().out.startswith("tensor([")
    mean, std = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.1, 1.0, 10.0, 100.0])
    x = mean + std * TARGET.sample(20, seed=1)
    names = {"model": ExactNet(TARGET, fs.VP()), "mean": mean, "std": std, "x": x}
    names["train_data"] = mean + std * TARGET.sample(100, seed=2)
    exec(second, names)
    error = names["result"].log_prob - (TARGET.log_prob((x - mean) / std) - float(std.log().sum()))
    assert bool((error.abs() < 4 * names["result"].stderr + names["result"].truncation).all())
