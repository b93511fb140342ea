"""Run real pipelines of diffusers with a network that records; print what each fed it and what the adapter feeds.

A process of its own: the pipelines import transformers for their text encoders, which they do not need when the
prompt's embeddings are given, and a stand-in takes its place.
"""

import importlib
import importlib.machinery
import inspect
import json
import sys
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch

STAND_INS = ("ftfy", "tokenizers", "transformers")


class StandIns:
    """Finds a mock for every module of the libraries that only text encoders need."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in STAND_INS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__ = [], spec
        return module

    def exec_module(self, module):
        pass


def embeddings(*shapes):
    return [torch.zeros(1, *shape) for shape in shapes]


def cases(diffusers):
    """Yield (module, pipeline, network class, its config, scheduler, arguments of the call)."""
    euler = diffusers.FlowMatchEulerDiscreteScheduler
    size = {"height": 16, "width": 16}
    text, pooled, mask = embeddings((4, 8), (8,), (4,))
    yield (
        "flux.pipeline_flux",
        "FluxPipeline",
        "FluxTransformer2DModel",
        {"in_channels": 16, "guidance_embeds": False},
        euler(),
        {"prompt_embeds": text, "pooled_prompt_embeds": pooled} | size,
    )
    yield (
        "stable_diffusion_3.pipeline_stable_diffusion_3",
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        {"in_channels": 4, "sample_size": 2, "patch_size": 2},
        euler(shift=3.0),
        {"prompt_embeds": text, "pooled_prompt_embeds": pooled, "guidance_scale": 0} | size,
    )
    yield (
        "lumina2.pipeline_lumina2",
        "Lumina2Pipeline",
        "Lumina2Transformer2DModel",
        {"in_channels": 4, "sample_size": 2},
        euler(),
        {"prompt_embeds": text, "prompt_attention_mask": mask, "guidance_scale": 0} | size,
    )
    yield (
        "sana.pipeline_sana",
        "SanaPipeline",
        "SanaTransformer2DModel",
        {"in_channels": 4, "out_channels": 4, "timestep_scale": 0.001},
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        {"prompt_embeds": text, "prompt_attention_mask": mask, "guidance_scale": 0, "height": 32, "width": 32}
        | {"use_resolution_binning": False},
    )
    yield (
        "mochi.pipeline_mochi",
        "MochiPipeline",
        "MochiTransformer3DModel",
        {"in_channels": 4},
        euler(invert_sigmas=True),
        {"prompt_embeds": text, "prompt_attention_mask": mask.bool(), "guidance_scale": 0, "num_frames": 7} | size,
    )
    yield (
        "qwenimage.pipeline_qwenimage",
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        {"in_channels": 16, "guidance_embeds": False},
        euler(),
        {"prompt_embeds": text, "prompt_embeds_mask": mask.long()} | size,
    )
    yield (
        "hidream_image.pipeline_hidream_image",
        "HiDreamImagePipeline",
        "HiDreamImageTransformer2DModel",
        {"in_channels": 4, "max_resolution": [16, 16]},
        euler(shift=3.0),
        {"prompt_embeds_t5": text, "prompt_embeds_llama3": text[None], "pooled_prompt_embeds": pooled}
        | {"guidance_scale": 0}
        | size,
    )


def record(module, pipeline, network, config, scheduler, arguments):
    """Return what one pipeline fed its network at the first two steps, and what the adapter's module feeds there."""
    import diffusers

    from fastscore.adapters import from_diffusers

    fed, steps = [], []

    class Recorder(getattr(diffusers, network)):
        dtype, device, config, max_seq = torch.float32, torch.device("cpu"), None, 16

        def __init__(self):
            torch.nn.Module.__init__(self)

        def cache_context(self, name, **_):
            return nullcontext()

        def forward(self, hidden_states, *args, return_dict=True, **given):
            fed.append(given["timesteps" if "timesteps" in given else "timestep"].flatten()[0].item())
            output = torch.ones_like(hidden_states)
            return SimpleNamespace(sample=output) if return_dict else (output,)

    Recorder.config = SimpleNamespace(**config)
    net = Recorder()
    original = scheduler.step

    def step(output, t, sample, *args, **kwargs):
        result = original(output, t, sample, *args, **kwargs)
        i = scheduler.step_index - 1
        noise = [
            1 - float(s) if scheduler.config.get("invert_sigmas") else float(s) for s in scheduler.sigmas[i : i + 2]
        ]
        moved = float((result[0] - sample).double().mean())
        steps.append((noise[0], moved / (noise[1] - noise[0])))
        return result

    scheduler.step = step
    made = getattr(importlib.import_module(f"diffusers.pipelines.{module}"), pipeline)
    parts = {
        name: None
        for name, p in inspect.signature(made.__init__).parameters.items()
        if name != "self" and p.default is inspect.Parameter.empty
    }
    pipe = made(**parts | {"transformer": net, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    pipe(**arguments, num_inference_steps=4, output_type="latent")
    theirs = [(s, time, velocity) for (s, velocity), time in zip(steps[:2], fed, strict=False)]
    del scheduler.step
    fed.clear()
    adapter = from_diffusers(net, scheduler, program=False).model
    ours = []
    for s, _, _ in theirs:
        velocity = adapter(torch.zeros(1, 2, 2, 2), torch.tensor([s], dtype=torch.float64))
        ours.append((s, fed[-1], float(velocity.mean())))
    return {"theirs": theirs, "ours": ours}


def main():
    warnings.simplefilter("ignore")
    sys.meta_path.append(StandIns())
    import diffusers
    import diffusers.utils.import_utils as available

    available._transformers_available, available._transformers_version = True, "5.0.0"
    found = {}
    for case in cases(diffusers):
        try:
            found[case[2]] = record(*case)
        except Exception as error:
            if "-v" in sys.argv:
                import traceback

                traceback.print_exc()
            found[case[2]] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
