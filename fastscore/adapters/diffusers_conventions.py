"""How diffusers' pipelines call every transformer and U-Net of the library (0.42.1): time, sign of the velocity.

A pipeline holds the scheduler's own timestep t, which is s T on the path x_t = (1 - s) x + s eps (T is
`num_train_timesteps`), (1 - s) T under `invert_sigmas`, and the integer timestep of a table. What it makes of t before
it calls the network, and whether it negates what comes back, is written in the pipeline alone; so every class has a row
here that names the file, and the tests read the files again.

References:
    https://github.com/huggingface/diffusers
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .wrappers import bare

# What a pipeline may make of the scheduler's timestep t and T: (offset, slope) of offset + slope t.
TIMES = {
    "t": lambda steps: (0.0, 1.0),
    "t / 1000": lambda steps: (0.0, 1 / 1000),
    "t / T": lambda steps: (0.0, 1 / steps),
    "1 - t / T": lambda steps: (1.0, -1 / steps),
}


class Convention(NamedTuple):
    """How one class is called.

    Attributes:
        pipeline: the file in diffusers that says so.
        time: what the network gets, a key of `TIMES`.
        sign: -1 where the network returns x - eps and the pipeline negates it.
        steps: the `num_train_timesteps` that the pipeline needs, where its scheduler counts time from 0 to 1.
        inverted: whether the pipeline's scheduler has `invert_sigmas`.
        argument: the network's name for its time.
        output: the field of what it returns.
        factor: the field of the network's config that multiplies its time.
    """

    pipeline: str
    time: str = "t"
    sign: int = 1
    steps: int | None = None
    inverted: bool = False
    argument: str = "timestep"
    output: str = "sample"
    factor: str | None = None


# Trained on straight paths: velocity eps - x, or its negative.
FLOW = {
    "AuraFlowTransformer2DModel": Convention("pipelines/aura_flow/pipeline_aura_flow.py", "t / 1000"),
    "BriaFibo2Transformer2DModel": Convention("pipelines/bria_fibo2/pipeline_bria_fibo2.py", "t / 1000"),
    "BriaFiboTransformer2DModel": Convention("pipelines/bria_fibo/pipeline_bria_fibo.py"),
    "BriaTransformer2DModel": Convention("pipelines/bria/pipeline_bria.py"),
    "ChromaTransformer2DModel": Convention("pipelines/chroma/pipeline_chroma.py", "t / 1000"),
    "ChronoEditTransformer3DModel": Convention("pipelines/chronoedit/pipeline_chronoedit.py"),
    "EasyAnimateTransformer3DModel": Convention("pipelines/easyanimate/pipeline_easyanimate.py"),
    "ErnieImageTransformer2DModel": Convention("pipelines/ernie_image/pipeline_ernie_image.py"),
    "Flux2Transformer2DModel": Convention("pipelines/flux2/pipeline_flux2.py", "t / 1000"),
    "Flux3Transformer2DModel": Convention("modular_pipelines/flux3/denoise.py", "t / 1000"),
    "FluxTransformer2DModel": Convention("pipelines/flux/pipeline_flux.py", "t / 1000"),
    "HiDreamImageTransformer2DModel": Convention(
        "pipelines/hidream_image/pipeline_hidream_image.py", sign=-1, argument="timesteps"
    ),
    "HunyuanImageTransformer2DModel": Convention("pipelines/hunyuan_image/pipeline_hunyuanimage.py"),
    "HunyuanVideo15Transformer3DModel": Convention("pipelines/hunyuan_video1_5/pipeline_hunyuan_video1_5.py"),
    "HunyuanVideoFramepackTransformer3DModel": Convention(
        "pipelines/hunyuan_video/pipeline_hunyuan_video_framepack.py"
    ),
    "HunyuanVideoTransformer3DModel": Convention("pipelines/hunyuan_video/pipeline_hunyuan_video.py"),
    "Ideogram4Transformer2DModel": Convention("pipelines/ideogram4/pipeline_ideogram4.py", "1 - t / T", -1),
    "JoyImageEditPlusTransformer3DModel": Convention("pipelines/joyimage/pipeline_joyimage_edit_plus.py"),
    "JoyImageEditTransformer3DModel": Convention("pipelines/joyimage/pipeline_joyimage_edit.py"),
    "Kandinsky5Transformer3DModel": Convention("pipelines/kandinsky5/pipeline_kandinsky.py"),
    "Kandinsky6SRTransformer3DModel": Convention("pipelines/kandinsky6/pipeline_kandinsky6_sr.py"),
    "Krea2Transformer2DModel": Convention("pipelines/krea2/pipeline_krea2.py", "t / T"),
    "LTXVideoTransformer3DModel": Convention("pipelines/ltx/pipeline_ltx.py"),
    "LongCatAudioDiTTransformer": Convention(
        "pipelines/longcat_audio_dit/pipeline_longcat_audio_dit.py", "t / T", inverted=True
    ),
    "LongCatImageTransformer2DModel": Convention("pipelines/longcat_image/pipeline_longcat_image.py", "t / 1000"),
    "Lumina2Transformer2DModel": Convention("pipelines/lumina2/pipeline_lumina2.py", "1 - t / T", -1),
    "LuminaNextDiT2DModel": Convention("pipelines/lumina/pipeline_lumina.py", "1 - t / T", -1),
    "MiniMaxMusic3Transformer1DModel": Convention(
        "modular_pipelines/minimax_music3/denoise.py", steps=1, inverted=True
    ),
    "MochiTransformer3DModel": Convention("pipelines/mochi/pipeline_mochi.py", inverted=True),
    "MotifVideoTransformer3DModel": Convention("pipelines/motif_video/pipeline_motif_video.py"),
    "NucleusMoEImageTransformer2DModel": Convention(
        "pipelines/nucleusmoe_image/pipeline_nucleusmoe_image.py", "t / T", -1
    ),
    "OmniGenTransformer2DModel": Convention("pipelines/omnigen/pipeline_omnigen.py", steps=1, inverted=True),
    "OvisImageTransformer2DModel": Convention("pipelines/ovis_image/pipeline_ovis_image.py", "t / 1000"),
    "PRXTransformer2DModel": Convention("pipelines/prx/pipeline_prx.py", "t / T"),
    "QwenImage21Transformer2DModel": Convention("pipelines/qwenimage21/pipeline_qwenimage21.py", "t / 1000"),
    "QwenImageTransformer2DModel": Convention("pipelines/qwenimage/pipeline_qwenimage.py", "t / 1000"),
    "SD3Transformer2DModel": Convention("pipelines/stable_diffusion_3/pipeline_stable_diffusion_3.py"),
    "SanaTransformer2DModel": Convention("pipelines/sana/pipeline_sana.py", factor="timestep_scale"),
    "SanaVideoTransformer3DModel": Convention("pipelines/sana_video/pipeline_sana_video.py"),
    "SkyReelsV2Transformer3DModel": Convention("pipelines/skyreels_v2/pipeline_skyreels_v2.py"),
    "StableAudio3DiTModel": Convention("pipelines/stable_audio_3/pipeline_stable_audio_3.py", steps=1),
    "WanAnimateTransformer3DModel": Convention("pipelines/wan/pipeline_wan_animate.py"),
    "WanTransformer3DModel": Convention("pipelines/wan/pipeline_wan.py"),
    "WanVACETransformer3DModel": Convention("pipelines/wan/pipeline_wan_vace.py"),
}

# Trained on tables of timesteps: the network gets the timestep itself, and the scheduler's `prediction_type` says what
# it predicts.
TABLE = {
    "AllegroTransformer3DModel": Convention("pipelines/allegro/pipeline_allegro.py"),
    "CogVideoXTransformer3DModel": Convention("pipelines/cogvideo/pipeline_cogvideox.py"),
    "CogView3PlusTransformer2DModel": Convention("pipelines/cogview3/pipeline_cogview3plus.py"),
    "ConsisIDTransformer3DModel": Convention("pipelines/consisid/pipeline_consisid.py"),
    "DiTTransformer2DModel": Convention("pipelines/dit/pipeline_dit.py"),
    "HunyuanDiT2DModel": Convention("pipelines/hunyuandit/pipeline_hunyuandit.py"),
    "I2VGenXLUNet": Convention("pipelines/deprecated/i2vgen_xl/pipeline_i2vgen_xl.py"),
    "Kandinsky3UNet": Convention("pipelines/kandinsky3/pipeline_kandinsky3.py"),
    "LatteTransformer3DModel": Convention("pipelines/latte/pipeline_latte.py"),
    "PixArtTransformer2DModel": Convention("pipelines/pixart_alpha/pipeline_pixart_alpha.py"),
    "PriorTransformer": Convention(
        "pipelines/kandinsky2_2/pipeline_kandinsky2_2_prior.py", output="predicted_image_embedding"
    ),
    "Transformer2DModel": Convention("pipelines/pixart_alpha/pipeline_pixart_sigma.py"),  # DiT and PixArt of old files
    "UNet1DModel": Convention("pipelines/deprecated/dance_diffusion/pipeline_dance_diffusion.py"),
    "UNet2DConditionModel": Convention("pipelines/stable_diffusion/pipeline_stable_diffusion.py"),
    "UNet2DModel": Convention("pipelines/ddpm/pipeline_ddpm.py"),
    "UNet3DConditionModel": Convention("pipelines/deprecated/text_to_video_synthesis/pipeline_text_to_video_synth.py"),
    "UNetMotionModel": Convention("pipelines/animatediff/pipeline_animatediff.py"),
    "UNetSpatioTemporalConditionModel": Convention(
        "pipelines/stable_video_diffusion/pipeline_stable_video_diffusion.py"
    ),
}

_SHIFTED = "its pipelines give it a time that the resolution shifts against the noise"
_PART = "it is a part of networks and no denoiser"
_JOINT = "it denoises several tensors at once"
_PIECES = "it denoises a sample piece by piece, given the pieces before"

# No x_t and t alone give these an answer; the reason ends a sentence.
REFUSED = {
    "AceStepTransformer1DModel": "it takes a second time, timestep_r",
    "AnyFlowFARTransformer3DModel": "it takes a second time, r_timestep",
    "AnyFlowTransformer3DModel": "it takes a second time, r_timestep",
    "CogView4Transformer2DModel": _SHIFTED,
    "Cosmos3OmniTransformer": _JOINT,
    "CosmosTransformer3DModel": "the pipelines of Cosmos 1, 2 and 2.5 scale its input and its time in three ways",
    "DreamLiteTransformer2DModel": _PART,
    "DreamLiteUNetModel": "its pipeline joins x_t and an image along the width",
    "GlmImageTransformer2DModel": _SHIFTED,
    "HeliosTransformer3DModel": _PIECES,
    "Kandinsky6Transformer3DModel": _JOINT,
    "LTX2VideoTransformer3DModel": _JOINT,
    "MiniMaxH3Transformer3DModel": _JOINT,
    "MiniMaxMusic3RVQDepthDecoder": "it predicts tokens",
    "MotionAdapter": _PART,
    "RFD4ProteinaTransformer": _JOINT,
    "SanaWMLTX2RefinerTransformer3DModel": _PIECES,
    "SanaWMTransformer3DModel": "its time is a tensor with one entry a frame",
    "StableAudioDiTModel": "its pipeline preconditions it as EDM does",
    "StableCascadeUNet": "its scheduler has a cosine schedule of its own and no table",
    "T5FilmDecoder": "its data go by another name and its time is t / T",
    "TransformerTemporalModel": _PART,
    "UVit2DModel": "it predicts tokens",
    "WanAnimate2Transformer3DModel": "it takes lists of samples",
    "ZImageTransformer2DModel": "it takes lists of samples and its time as t",
}


def known_class(model: nn.Module) -> str | None:
    """Return the class of diffusers that a network is or inherits from, None for a network of another origin.

    Wrappers are looked through (`fastscore.adapters.wrappers`). A class that only has the name of one in diffusers is
    of another origin: nothing tells what its author feeds it.
    """
    own = type(bare(model))
    for base in own.__mro__:
        inside = base.__module__.partition(".")[0] == "diffusers"
        if inside and (base is own or base.__name__ in FLOW | TABLE | REFUSED):
            return base.__name__
    return None
