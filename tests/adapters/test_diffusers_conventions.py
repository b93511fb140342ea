"""Every transformer and U-Net of diffusers has a row, and every row says what its pipeline's source says and does."""

import ast
import importlib
import inspect
import json
import pkgutil
import subprocess
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from steps import PYTHON
from torch import nn

from fastscore.adapters import from_diffusers
from fastscore.adapters.diffusers_conventions import FLOW, REFUSED, TABLE, TIMES, known_class
from fastscore.process.ddpm import DDPM
from fastscore.process.schedules import FlowMatching

diffusers = pytest.importorskip("diffusers")
PACKAGES = [importlib.import_module(f"diffusers.models.{part}") for part in ("transformers", "unets")]
MODULES = [
    importlib.import_module(f"{package.__name__}.{file.name}")
    for package in PACKAGES
    for file in pkgutil.iter_modules(package.__path__)
]
ROOT = Path(diffusers.__file__).parent
KNOWN = FLOW | TABLE
of_the_tables = pytest.mark.skipif(
    tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 42), reason="the tables are those of diffusers 0.42"
)
T, NOW = 400, 100.0  # a T at which t / T and t / 1000 differ


def is_model(value, module):
    """Whether this is a network that the module defines itself."""
    return inspect.isclass(value) and issubclass(value, diffusers.ModelMixin) and value.__module__ == module.__name__


CLASSES = {name: value for module in MODULES for name, value in vars(module).items() if is_model(value, module)}


@of_the_tables
def test_every_class_is_either_known_or_refused():
    assert set(CLASSES) == set(KNOWN) | set(REFUSED), (
        "the library's classes and the tables of diffusers_conventions differ"
    )
    assert not (set(FLOW) & set(TABLE))
    assert not (set(KNOWN) & set(REFUSED))


def network_call(tree):
    """Return the first call of a network inside a loop over timesteps, and the statements of that loop."""
    names = {"transformer", "unet", "prior", "current_model"}
    loops = [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.For) and "t" in {x.id for x in ast.walk(n.target) if isinstance(x, ast.Name)}
    ]
    # A modular pipeline's loop body is a method of t.
    loops += [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and "t" in {a.arg for a in n.args.args}]
    for loop in loops:
        for node in ast.walk(loop):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
                if called in names:
                    return node, loop
    raise AssertionError("no call of a network in a loop over timesteps")


def fed(call, loop, argument):
    """Return what the call passes as time at the scheduler's timestep t = NOW, by running the lines that make it."""
    given = {k.arg: k.value for k in call.keywords}
    expression = given.get(argument) or call.args[1]
    latents = torch.zeros(2, 4, 8, 8)
    scheduler = MagicMock()
    scheduler.config.num_train_timesteps = T
    owner = MagicMock(scheduler=scheduler)
    owner.transformer.config.timestep_scale, owner.transformer.dtype = 1.0, torch.float32
    space = {
        "t": torch.tensor(NOW),
        "torch": torch,
        "self": owner,
        "components": owner,
        "device": "cpu",
        "num_train_timesteps": T,
    }
    space |= dict.fromkeys(
        ("latents", "latent_model_input", "model_input", "model_input_cfg", "hidden_states"), latents
    )
    space |= dict.fromkeys(("batch_size", "num_videos_per_prompt", "num_images_per_prompt", "total_batch_size"), 2)
    space |= dict.fromkeys(("dtype", "transformer_dtype"), torch.float32)
    space |= {"prompt_embeds": latents, "block_state": MagicMock(latents=latents)}
    ready = set(space)
    top = {id(s) for s in loop.body} | {id(s) for w in loop.body if isinstance(w, ast.With) for s in w.body}
    assigns = [
        n
        for n in ast.walk(loop)
        if isinstance(n, ast.Assign) and n.lineno < call.lineno and isinstance(n.targets[0], ast.Name)
    ]

    def names(node):
        return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - ready

    wanted, chosen = names(expression), []
    for assign in sorted(assigns, key=lambda n: -n.lineno):
        target = assign.targets[0].id
        settled = any(id(n) in top and n.targets[0].id == target for n in assigns)
        if target in wanted and (id(assign) in top or not settled):
            chosen.append(assign)
            # Of the branches that make a name the last one counts.
            wanted = (wanted if id(assign) in top else wanted - {target}) | names(assign.value)
    for assign in reversed(chosen):
        space[assign.targets[0].id] = eval(compile(ast.Expression(assign.value), "", "eval"), space)
    value = eval(compile(ast.Expression(expression), "", "eval"), space)
    return float(torch.as_tensor(value).flatten()[0])


def negated(loop):
    """Return whether the loop hands the scheduler the negative of what the network returned."""
    for node in ast.walk(loop):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.UnaryOp) and isinstance(node.value.op, ast.USub):
            return True
        step = isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "step"
        if step and node.args and isinstance(node.args[0], ast.UnaryOp):
            return True
    return False


@of_the_tables
@pytest.mark.parametrize("name", sorted(KNOWN))
def test_the_row_says_what_the_source_of_the_pipeline_says(name):
    row = KNOWN[name]
    source = (ROOT / row.pipeline).read_text()
    assert name in source
    call, loop = network_call(ast.parse(source))
    offset, slope = TIMES[row.time](T)
    assert fed(call, loop, row.argument) == pytest.approx(offset + slope * NOW, rel=1e-6)
    assert negated(loop) == (row.sign == -1)
    forward = inspect.signature(CLASSES[name].forward).parameters
    assert row.argument in forward
    assert row.factor is None or (row.factor in inspect.signature(CLASSES[name]).parameters and row.factor in source)


@pytest.fixture(scope="module")
def pipelines():
    script = Path(__file__).with_name("run_pipelines.py")
    done = subprocess.run([*PYTHON, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "FluxTransformer2DModel",
        "HiDreamImageTransformer2DModel",
        "Lumina2Transformer2DModel",
        "MochiTransformer3DModel",
        "QwenImageTransformer2DModel",
        "SD3Transformer2DModel",
        "SanaTransformer2DModel",
    ],
)
def test_the_adapter_feeds_and_reads_a_network_as_the_running_pipeline_does(pipelines, name):
    run = pipelines[name]
    assert "error" not in run, run
    assert len(run["theirs"]) == 2
    for (noise, time, velocity), (_, own_time, own_velocity) in zip(run["theirs"], run["ours"], strict=True):
        # float32 times; Sana's scheduler rounds its timesteps to integers, a thousandth of the range.
        assert own_time == pytest.approx(time, rel=1e-3 if name.startswith("Sana") else 1e-6), noise
        # dx/ds of the pipeline's own step along a velocity of ones, s the share of noise.
        assert own_velocity == pytest.approx(velocity, abs=1e-5)


def stand_in(name, **config):
    """Return an instance of a class of diffusers that returns its input, without the network in it."""

    class Net(CLASSES[name]):
        def __init__(self):
            nn.Module.__init__(self)

        def forward(self, hidden_states, **given):
            self.given = given
            return MagicMock(**{KNOWN[name].output: hidden_states})

    Net.config = MagicMock(**config)
    return Net()


def euler(**config):
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


class Flux(nn.Module):  # of a user's own, whatever its name
    def forward(self, hidden_states, timestep=None):
        return MagicMock(sample=hidden_states)


ASK = r"time must be one of 't', 't / 1000', 't / T', '1 - t / T', got none for {} with {}; pass what the network got"


@of_the_tables
@pytest.mark.parametrize("name", sorted(REFUSED))
@pytest.mark.parametrize("scheduler", [euler, diffusers.DDPMScheduler])
def test_a_class_without_a_single_input_is_refused_by_name(name, scheduler):
    net = type("Net", (CLASSES[name],), {"__init__": lambda self: nn.Module.__init__(self)})()
    with pytest.raises(
        ValueError, match=rf"model must be a network of x_t and t, got {name} \(.+\); build a ScoreDens"
    ):
        from_diffusers(net, scheduler())


@pytest.mark.parametrize(
    ("make", "scheduler", "message"),
    [
        (Flux, euler, ASK.format("Flux", "FlowMatchEulerDiscreteScheduler")),
        (lambda: nn.DataParallel(Flux()), euler, ASK.format("Flux", "FlowMatchEulerDiscreteScheduler")),
        (lambda: stand_in("UNet2DModel"), euler, ASK.format("UNet2DModel", "FlowMatchEulerDiscreteScheduler")),
        (
            lambda: stand_in("MochiTransformer3DModel"),
            euler,
            "invert_sigmas=True for MochiTransformer3DModel.*pipeline_mochi.py, or pass time=",
        ),
        (lambda: stand_in("SD3Transformer2DModel"), lambda: euler(invert_sigmas=True), "invert_sigmas=False for SD3"),
        (lambda: stand_in("StableAudio3DiTModel"), euler, "num_train_timesteps=1 and"),
        (
            lambda: stand_in("FluxTransformer2DModel"),
            diffusers.DDPMScheduler,
            "scheduler must be a flow-matching one for FluxTransformer2DModel, got DDPMScheduler",
        ),
    ],
)
def test_what_no_pipeline_tells_is_asked_for(make, scheduler, message):
    with pytest.raises(ValueError, match=message):
        from_diffusers(make(), scheduler())


@pytest.mark.parametrize(
    ("name", "scheduler", "said", "expected"),
    [
        ("FluxTransformer2DModel", euler, {}, (0.25, 1)),
        ("SD3Transformer2DModel", euler, {}, (250.0, 1)),
        ("SD3Transformer2DModel", lambda: euler(num_train_timesteps=500), {}, (125.0, 1)),
        ("ZImage", euler, {"time": "1 - t / T", "sign": -1}, (0.75, -1)),
        ("UNet2DModel", euler, {"time": "t / 1000"}, (0.25, 1)),
        ("LuminaNextDiT2DModel", euler, {}, (0.75, -1)),
        ("Lumina2Transformer2DModel", euler, {"time": "t"}, (250.0, -1)),
        ("MochiTransformer3DModel", lambda: euler(invert_sigmas=True), {}, (750.0, -1)),
        ("OmniGenTransformer2DModel", lambda: euler(invert_sigmas=True, num_train_timesteps=1), {}, (0.75, -1)),
        ("StableAudio3DiTModel", lambda: euler(num_train_timesteps=1), {}, (0.25, 1)),
        ("SanaTransformer2DModel", euler, {}, (500.0, 1)),
        ("SanaTransformer2DModel", euler, {"time": "t / T"}, (0.25, 1)),
    ],
)
def test_time_and_sign_at_a_quarter_of_the_noise(name, scheduler, said, expected):
    net = stand_in(name, timestep_scale=2.0) if name in KNOWN else Flux()
    seen = []
    net.register_forward_pre_hook(lambda _, args, given: seen.append(given["timestep"]), with_kwargs=True)
    density = from_diffusers(
        torch.nn.DataParallel(net) if name == "FluxTransformer2DModel" else net, scheduler(), **said
    )
    assert type(density.schedule) is FlowMatching
    assert density.predicts == "flow"
    x = torch.ones(1, 3, 2, 2, dtype=torch.float64)
    found = density.model(x, torch.tensor([0.25], dtype=torch.float64))
    assert (float(seen[-1]), float(found.mean())) == pytest.approx(expected)


def test_a_table_gives_its_own_timesteps_to_networks_that_know_them_and_to_those_of_another_origin():
    for net in (
        Flux(),
        stand_in("PixArtTransformer2DModel"),
        stand_in("PriorTransformer"),
        stand_in("SD3Transformer2DModel"),
    ):
        density = from_diffusers(net, diffusers.DDPMScheduler())
        assert type(density.schedule) is DDPM
        seen = []
        net.register_forward_pre_hook(
            lambda _, args, given, seen=seen: seen.append(given["timestep"]), with_kwargs=True
        )
        t = torch.tensor([0, 999])
        x = torch.randn(2, 3, 2, 2)
        assert torch.equal(density.model(x, t), x)
        assert seen[0].dtype == torch.int64
        assert torch.equal(seen[0], t)


def test_a_class_is_known_by_its_origin_and_not_by_its_name():
    class FluxTransformer2DModel(nn.Module):
        pass

    assert known_class(FluxTransformer2DModel()) is None
    assert known_class(stand_in("FluxTransformer2DModel")) == "FluxTransformer2DModel"  # a class that inherits
    assert known_class(torch.compile(stand_in("FluxTransformer2DModel"))) == "FluxTransformer2DModel"


@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_flow_sigmas_of_other_schedulers_are_the_straight_path(kind):
    scheduler = getattr(diffusers, kind)(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    density = from_diffusers(stand_in("WanTransformer3DModel"), scheduler)
    scheduler.set_timesteps(1000)
    # Its least noise is that of its finest grid; a float32 sigma.
    least = float(density.schedule.time_range[0])
    assert least == pytest.approx(3e-3 / (1 + 2e-3), rel=1e-6)
    assert float(scheduler.sigmas[-2]) == pytest.approx(least, rel=2.1)
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(torch.tensor(0.3))
    own_alpha, own_sigma = density.schedule.alpha_sigma(torch.tensor(0.3))
    assert (float(alpha), float(sigma)) == pytest.approx((float(own_alpha), float(own_sigma)))
    with pytest.raises(ValueError, match="prediction_type must be flow_prediction, got epsilon"):
        from_diffusers(stand_in("WanTransformer3DModel"), getattr(diffusers, kind)(use_flow_sigmas=True))


@pytest.mark.parametrize(
    ("said", "message"),
    [({"time": "sigma"}, "time must be one of t, t / 1000, "), ({"sign": 2}, "sign must be 1 or -1, got 2")],
)
def test_an_unknown_time_or_sign_is_refused(said, message):
    with pytest.raises(ValueError, match=message):
        from_diffusers(Flux(), euler(), **said)
