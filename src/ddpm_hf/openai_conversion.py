"""Conversion of improved-diffusion and guided-diffusion checkpoints to portable ones.

Both repositories keep the weights of a `UNetModel` in `.pt` files and its arguments in the flags of
their scripts (2102.09672, 2105.05233). The network is a stock `UNet2DModel` under other names, with
q, k and v of each attention head taken apart. What `UNet2DModel` cannot express is refused.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ddpm_hf.diffusion.image_processor import ImageFacts, set_image_facts
from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.options import Options, option
from ddpm_hf.text import did_you_mean

NUM_GROUPS = 32  # of every GroupNorm in both repositories
NETWORK_TIMESTEPS = 1000  # range of the timesteps that a network with `rescale_timesteps` sees
_CHANNEL_MULT = {32: "1,2,2,2", 64: "1,2,3,4", 128: "1,1,2,3,4", 256: "1,1,2,2,4,4"}


@dataclass(frozen=True, kw_only=True)
class OpenAIFlags(Options):
    """Flags of the scripts of improved-diffusion and guided-diffusion that determine a model.

    The defaults are those of improved-diffusion. `flags_of_weights` tells those that the shapes of
    the weights determine.
    """

    image_size: int = option(64, "pixels per side", minimum=1)
    num_channels: int = option(128, "channels of the first level", minimum=1)
    num_res_blocks: int = option(2, "residual blocks per level", minimum=1)
    channel_mult: str = option("", "channels of the levels, in multiples of num_channels")
    num_heads: int = option(4, "heads of every attention layer", minimum=1)
    num_head_channels: int = option(-1, "channels of a head; -1: num_heads decides")
    num_heads_upsample: int = option(-1, "heads in the decoder; -1: as num_heads")
    attention_resolutions: str = option("16,8", "pixels per side of levels with attention")
    dropout: float = option(0.0, "dropout of the residual blocks", minimum=0, maximum=1)
    class_cond: bool = option(False, "class-conditional network")
    learn_sigma: bool = option(False, "learned variance")
    sigma_small: bool = option(False, "fixed_small instead of fixed_large variance")
    predict_xstart: bool = option(False, "the network predicts x_0")
    use_scale_shift_norm: bool = option(True, "timestep embedding scales and shifts")
    resblock_updown: bool = option(False, "residual blocks change the resolution")
    use_new_attention_order: bool = option(False, "q, k, v before heads in the weights")
    diffusion_steps: int = option(1000, "T, the training timesteps", minimum=1)
    noise_schedule: Literal["linear", "cosine"] = option("linear", "beta schedule")
    rescale_timesteps: bool = option(True, "the network sees t * 1000 / T")

    @classmethod
    def names(cls) -> list[str]:
        """Names of the flags."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def read(cls, path: Path) -> Mapping[str, Any]:
        """Flags of a JSON file, without those that do not affect the model.

        Raises:
            ValueError: if the file is not a JSON object, or a flag is unknown.
        """
        try:
            flags = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"`config` {path} cannot be read: {error}") from error
        if not isinstance(flags, dict):
            raise ValueError(f"`config` {path} must be a JSON object of flags")
        known = cls.names()
        for name in flags:
            if name not in known and name not in _IGNORED_FLAGS:
                raise ValueError(
                    f"`config` {path} has the unknown flag {name!r}{did_you_mean(name, known)}"
                )
        return {name: value for name, value in flags.items() if name in known}


# Flags of training and sampling, and of losses.
_IGNORED_FLAGS = {
    "use_kl", "rescale_learned_sigmas", "use_checkpoint", "use_fp16", "timestep_respacing",
    "batch_size", "num_samples", "microbatch", "lr", "lr_anneal_steps", "ema_rate", "weight_decay",
    "schedule_sampler", "log_interval", "save_interval", "resume_checkpoint", "fp16_scale_growth",
    "data_dir", "model_path", "clip_denoised", "use_ddim",
}  # fmt: skip

_IDDPM = {"num_channels": 128, "num_res_blocks": 3, "learn_sigma": True, "diffusion_steps": 4000,
          "noise_schedule": "cosine"}  # fmt: skip
_ADM = {
    "num_channels": 256, "num_head_channels": 64, "num_res_blocks": 2, "learn_sigma": True,
    "attention_resolutions": "32,16,8", "resblock_updown": True, "rescale_timesteps": False,
    "image_size": 256,
}  # fmt: skip
_IDDPM_LSUN = {
    "image_size": 256, "num_channels": 128, "num_res_blocks": 2, "num_heads": 1,
    "learn_sigma": True, "use_scale_shift_norm": False, "attention_resolutions": "16",
    "rescale_timesteps": False,
}  # fmt: skip
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "iddpm-cifar10": {**_IDDPM, "image_size": 32, "dropout": 0.3},
    "iddpm-imagenet64": _IDDPM,
    "iddpm-imagenet64-cond": {**_IDDPM, "num_channels": 192, "class_cond": True,
                              "rescale_timesteps": False},
    "iddpm-lsun-bedroom": _IDDPM_LSUN,
    "adm-imagenet64": {
        **_ADM, "image_size": 64, "num_channels": 192, "num_res_blocks": 3, "dropout": 0.1,
        "class_cond": True, "noise_schedule": "cosine", "use_new_attention_order": True,
    },
    "adm-imagenet128": {**_ADM, "image_size": 128, "num_head_channels": -1, "class_cond": True},
    "adm-imagenet256": {**_ADM, "class_cond": True},
    "adm-imagenet256-uncond": _ADM,
    "adm-imagenet512": {**_ADM, "image_size": 512, "channel_mult": "0.5,1,1,2,2,4,4",
                        "class_cond": True},
    "adm-lsun": {**_ADM, "dropout": 0.1},
    "adm-lsun-horse-nodropout": _ADM,
}  # fmt: skip
"""Flags of the published models, as in the READMEs of both repositories."""


def convert(
    weights: str | Path,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    class_names: list[str] | None = None,
) -> GaussianDDPMPipeline:
    """A pipeline with the network and the diffusion of an improved- or guided-diffusion checkpoint.

        convert("cifar10_uncond_50M_500K.pt", preset="iddpm-cifar10").save_pretrained("cifar10")

    A network with `rescale_timesteps` sees t * 1000 / T. `UNet2DModel` takes t itself, so of 4,000
    timesteps every fourth is kept, with exact betas: the chain has 1,000 timesteps.

    Args:
        weights: `.pt` file with the state dict of the network, or the folder of a training run,
            whose newest EMA weights are used. Read with `weights_only=True`.
        preset: name of a published model, one of `PRESETS`.
        config: JSON file with the flags of the repositories' scripts, instead of `preset`. Flags
            that the shapes of the weights determine can be left out: `image_size`, the heads and
            the diffusion remain.
        class_names: names of the classes, in the order of their numbers.
    Returns:
        the pipeline on the CPU, in float32.
    Raises:
        ValueError: if the file is not such a state dict, its keys or shapes do not fit the flags
            (names them), or `UNet2DModel` cannot express the network (with the reason).
        OSError: if a file cannot be read.
    """
    if (preset is None) == (config is None):
        choices = ", ".join(PRESETS)
        raise ValueError(f"pass either `preset` or `config`; presets: {choices}")
    if preset is not None and preset not in PRESETS:
        raise ValueError(
            f"`preset` must be one of {', '.join(PRESETS)}, got {preset!r}"
            f"{did_you_mean(preset, PRESETS)}"
        )
    given = PRESETS[preset] if preset else OpenAIFlags.read(Path(str(config)))
    state = _read_state(_weights_file(Path(weights).expanduser()))
    size = OpenAIFlags(**given).image_size
    flags = OpenAIFlags(**{**flags_of_weights(state, size), **given})
    num_classes = _num_classes(state, flags)
    unet_config = _unet_config(flags, num_classes)
    scheduler = _scheduler(flags)
    with torch.device("meta"):
        unet = UNet2DModel(**unet_config)
    unet.load_state_dict(_converted(state, unet, flags), assign=True)
    names = _checked_names(class_names, num_classes)
    set_image_facts(unet, ImageFacts("RGB", size, size, 8, names))
    return GaussianDDPMPipeline(unet.eval(), scheduler)


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for pattern in (r"ema_[\d.]+_(\d+)\.pt", r"model(\d+)\.pt"):
        found = {file: re.fullmatch(pattern, file.name) for file in path.iterdir()}
        steps = {file: int(match[1]) for file, match in found.items() if match}
        if steps:
            return max(steps, key=lambda file: steps[file])
    raise ValueError(f"{path} has no ema_RATE_STEP.pt and no modelSTEP.pt: pass a `.pt` file")


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # unpickling errors of many kinds
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is not a state dict that is safe to read: {reason}") from error
    if not isinstance(state, dict) or "input_blocks.0.0.weight" not in state:
        raise ValueError(
            f"{path} is not a UNetModel of improved-diffusion or guided-diffusion: it has no"
            " input_blocks.0.0.weight"
        )
    return state


def flags_of_weights(state: Mapping[str, Tensor], image_size: int) -> Mapping[str, Any]:
    """The flags that the weights determine, read off the decoder; none if it is incomplete.

    Args:
        state: state dict of a `UNetModel`.
        image_size: pixels per side, which no weight depends on.
    """
    changes = re.compile(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers\.2)\.weight")
    upsamplers = {int(m[1]): m[2] for m in map(changes.fullmatch, state) if m}
    num_blocks = len({name.split(".")[1] for name in state if name.startswith("output_blocks.")})
    per_level = min(upsamplers, default=num_blocks - 1) + 1
    firsts = [f"output_blocks.{i}" for i in range(0, num_blocks, per_level)][::-1]
    try:
        widths = [len(state[f"{first}.0.out_layers.3.weight"]) for first in firsts]
        num_channels = len(state["time_embed.0.weight"]) // 4
        embedding = len(state[f"{firsts[-1]}.0.emb_layers.1.weight"])
        num_outputs = len(state["out.2.weight"])
    except KeyError:
        return {}
    attended = [
        image_size // 2**level
        for level, first in enumerate(firsts)
        if f"{first}.1.qkv.weight" in state
    ]
    return {
        "num_channels": num_channels,
        "num_res_blocks": per_level - 1,
        "channel_mult": ",".join(f"{width / num_channels:g}" for width in widths),
        "attention_resolutions": ",".join(map(str, attended)) or "0",
        "class_cond": "label_emb.weight" in state,
        "learn_sigma": num_outputs == 6,
        "use_scale_shift_norm": embedding == 2 * widths[-1],
        "resblock_updown": "in_layers.2" in upsamplers.values(),
    }


def _num_classes(state: Mapping[str, Tensor], flags: OpenAIFlags) -> int | None:
    embedding = state.get("label_emb.weight")
    if (embedding is not None) != flags.class_cond:
        has = "has" if embedding is not None else "has no"
        raise ValueError(f"the network {has} classes, but class_cond is {flags.class_cond}")
    return None if embedding is None else len(embedding)


def _checked_names(names: list[str] | None, num_classes: int | None) -> tuple[str, ...] | None:
    if names is not None and len(names) != (num_classes or 0):
        raise ValueError(
            f"`class_names` must have one name for each of the {num_classes or 0} classes, got"
            f" {len(names)}"
        )
    return None if names is None else tuple(names)


# Configuration --------------------------------------------------------------------------------


def _unet_config(flags: OpenAIFlags, num_classes: int | None) -> dict[str, Any]:
    """Arguments of `UNet2DModel`.

    Raises:
        ValueError: if it cannot express the network.
    """
    text = flags.channel_mult or _CHANNEL_MULT.get(flags.image_size, "")
    if not text:
        raise ValueError(f"image_size {flags.image_size} has no default: set channel_mult")
    multiples = [float(part) for part in text.split(",")]
    widths = [int(multiple * flags.num_channels) for multiple in multiples]
    if widths[0] != flags.num_channels:
        raise ValueError(
            f"UNet2DModel embeds timesteps in as many channels as its first level has, {widths[0]},"
            f" but this network in num_channels {flags.num_channels}: channel_mult must begin with"
            " 1"
        )
    resolutions = {int(part) for part in flags.attention_resolutions.split(",")}
    has_attention = [flags.image_size // 2**level in resolutions for level in range(len(widths))]
    down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if flags.resblock_updown else (
        "DownBlock2D", "UpBlock2D"
    )  # fmt: skip
    kind = "resnet" if flags.resblock_updown else "conv"
    return {
        "sample_size": flags.image_size,
        "in_channels": 3,
        "out_channels": 6 if flags.learn_sigma else 3,
        "block_out_channels": tuple(widths),
        "layers_per_block": flags.num_res_blocks,
        "down_block_types": tuple("AttnDownBlock2D" if has else down for has in has_attention),
        "up_block_types": tuple("AttnUpBlock2D" if has else up for has in has_attention[::-1]),
        "downsample_type": kind,
        "upsample_type": kind,
        "dropout": flags.dropout,
        "attention_head_dim": _head_width(flags, widths, has_attention),
        "norm_num_groups": NUM_GROUPS,
        "attn_norm_num_groups": NUM_GROUPS,
        "resnet_time_scale_shift": "scale_shift" if flags.use_scale_shift_norm else "default",
        "num_class_embeds": num_classes,
    }


def _head_width(flags: OpenAIFlags, widths: list[int], has_attention: list[bool]) -> int | None:
    """Channels per head, the same in all attention layers; None for one head in each."""
    attended = {width for width, has in zip(widths, has_attention, strict=True) if has}
    attended.add(widths[-1])  # the middle block
    if flags.num_head_channels != -1:
        return flags.num_head_channels
    if flags.num_heads_upsample not in (-1, flags.num_heads):
        raise ValueError(
            f"UNet2DModel has the same heads in encoder and decoder, but num_heads is"
            f" {flags.num_heads} and num_heads_upsample {flags.num_heads_upsample}"
        )
    if flags.num_heads == 1:
        return None
    if len(attended) > 1:
        listed = ", ".join(map(str, sorted(attended)))
        raise ValueError(
            f"UNet2DModel has one width of attention heads, but this network has"
            f" {flags.num_heads} heads in layers of {listed} channels"
        )
    return attended.pop() // flags.num_heads


def _scheduler(flags: OpenAIFlags) -> GaussianDDPMScheduler:
    variance = "fixed_small" if flags.sigma_small else "fixed_large"
    names = {"linear": "iddpm_linear", "cosine": "squaredcos_cap_v2"}
    scheduler = partial(
        GaussianDDPMScheduler,
        variance_type="learned_range" if flags.learn_sigma else variance,
        prediction_type="sample" if flags.predict_xstart else "epsilon",
    )
    every = scheduler(flags.diffusion_steps, beta_schedule=names[flags.noise_schedule])
    stride, rest = divmod(flags.diffusion_steps, NETWORK_TIMESTEPS)
    if not flags.rescale_timesteps or (stride, rest) == (1, 0):
        return every
    if rest:
        raise ValueError(
            f"rescale_timesteps with {flags.diffusion_steps} diffusion_steps gives the network"
            " fractions of timesteps, which UNet2DModel is not called with; diffusion_steps must be"
            f" a multiple of {NETWORK_TIMESTEPS}"
        )
    every.set_timesteps(timesteps=range(flags.diffusion_steps - stride, -1, -stride))
    return scheduler(NETWORK_TIMESTEPS, trained_betas=every.trajectory_betas())


# Weights --------------------------------------------------------------------------------------

_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_ENDS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding", "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out",
    "out.2": "conv_out",
}  # fmt: skip


def _block_names(unet: UNet2DModel) -> Iterator[tuple[str, str]]:
    """(their name, our name) of every residual block, attention layer and change of resolution."""
    number = 1  # input_blocks.0 is the first convolution
    for level, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            yield from _layer(f"input_blocks.{number}", f"down_blocks.{level}", block, layer)
            number += 1
        if block.downsamplers is not None:
            yield f"input_blocks.{number}.0", f"down_blocks.{level}.downsamplers.0"
            number += 1
    for theirs, ours in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"middle_block.{theirs}", f"mid_block.{ours}"
    number = 0
    for level, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            names = list(_layer(f"output_blocks.{number}", f"up_blocks.{level}", block, layer))
            yield from names
            is_last = layer == len(block.resnets) - 1
            if is_last and block.upsamplers is not None:
                yield f"output_blocks.{number}.{len(names)}", f"up_blocks.{level}.upsamplers.0"
            number += 1


def _layer(theirs: str, ours: str, block: Any, layer: int) -> Iterator[tuple[str, str]]:
    yield f"{theirs}.0", f"{ours}.resnets.{layer}"
    if getattr(block, "attentions", None):
        yield f"{theirs}.1", f"{ours}.attentions.{layer}"


def _converted(
    state: Mapping[str, Tensor], unet: UNet2DModel, flags: OpenAIFlags
) -> dict[str, Tensor]:
    """The state dict of `unet`, in float32.

    Raises:
        ValueError: for missing, unknown or ill-shaped weights; names the first of them.
    """
    renamed: dict[str, Tensor] = {}
    blocks = dict(_block_names(unet))
    unknown = []
    for name, weight in state.items():
        target = _new_name(name, blocks)
        if target is None:
            unknown.append(name)
        elif ".qkv." in target:
            prefix, kind = target.split(".qkv.")
            heads = unet.get_submodule(prefix).heads
            parts = _split_heads(weight, heads, flags.use_new_attention_order)
            for part, rows in zip(("to_q", "to_k", "to_v"), parts, strict=True):
                renamed[f"{prefix}.{part}.{kind}"] = rows
        else:
            renamed[target] = weight[..., 0] if ".to_out.0.weight" in target else weight
    expected = unet.state_dict()
    missing = [name for name in expected if name not in renamed]
    unknown += [name for name in renamed if name not in expected]
    shapes = [
        f"{name} has shape {tuple(renamed[name].shape)} instead of {tuple(weight.shape)}"
        for name, weight in expected.items()
        if name in renamed and renamed[name].shape != weight.shape
    ]
    if missing or unknown or shapes:
        problems = [
            *([f"{len(missing)} missing, such as {missing[0]}"] if missing else []),
            *([f"{len(unknown)} unknown, such as {unknown[0]}"] if unknown else []),
            *shapes[:1],
        ]
        raise ValueError(
            f"the weights do not fit these flags: {'; '.join(problems)}. Check `preset` or `config`"
        )
    return {name: renamed[name].float() for name in expected}


def _new_name(name: str, blocks: Mapping[str, str]) -> str | None:
    module, _, kind = name.rpartition(".")
    if module in _ENDS:
        return f"{_ENDS[module]}.{kind}"
    parts = module.split(".")
    theirs = ".".join(parts[: 2 if parts[0] == "middle_block" else 3])
    rest = module[len(theirs) + 1 :]
    ours = blocks.get(theirs)
    if ours is None:
        return None
    if ".attentions." in ours:
        attention = {"norm": "group_norm", "qkv": "qkv", "proj_out": "to_out.0"}
        return f"{ours}.{attention[rest]}.{kind}" if rest in attention else None
    if rest in ("op", "conv"):  # a convolution that changes the resolution
        return f"{ours}.conv.{kind}"
    return f"{ours}.{_RESNET[rest]}.{kind}" if rest in _RESNET else None


def _split_heads(weight: Tensor, heads: int, is_new_order: bool) -> tuple[Tensor, ...]:
    """q, k and v of a layer: interleaved per head, or one after the other in the new order."""
    weight = weight[..., 0] if weight.ndim == 3 else weight  # a convolution of width 1
    if is_new_order:
        return weight.chunk(3)
    by_head = weight.reshape(heads, 3, -1, *weight.shape[1:])
    return tuple(by_head[:, part].flatten(0, 1) for part in range(3))
