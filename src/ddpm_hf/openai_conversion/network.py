"""Network and diffusion of a checkpoint: configurations of `UNet2DModel` and of the scheduler."""

from functools import partial
from typing import Any

from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.openai_conversion.flags import OpenAIFlags

NUM_GROUPS = 32  # of every GroupNorm in both repositories
NETWORK_TIMESTEPS = 1000  # range of the timesteps that a network with `rescale_timesteps` sees
_CHANNEL_MULT = {32: "1,2,2,2", 64: "1,2,3,4", 128: "1,1,2,3,4", 256: "1,1,2,2,4,4"}


def unet_config(flags: OpenAIFlags, num_classes: int | None) -> dict[str, Any]:
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
            f"channel_mult must begin with 1, got {text}: UNet2DModel embeds timesteps in the"
            f" {widths[0]} channels of its first level, this network in {flags.num_channels}"
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
            f"num_heads_upsample must equal num_heads, {flags.num_heads}, got"
            f" {flags.num_heads_upsample}: UNet2DModel has as many heads in the decoder as in the"
            " encoder"
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


def scheduler_of(flags: OpenAIFlags) -> GaussianDDPMScheduler:
    """The scheduler, with at most `NETWORK_TIMESTEPS` timesteps if the network rescales them.

    Raises:
        ValueError: if the network would see fractions of timesteps.
    """
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
            f"diffusion_steps must be a multiple of {NETWORK_TIMESTEPS} with rescale_timesteps, got"
            f" {flags.diffusion_steps}: others give the network fractions of timesteps, which"
            " pipelines of diffusers do not"
        )
    every.set_timesteps(timesteps=range(flags.diffusion_steps - stride, -1, -stride))
    return scheduler(NETWORK_TIMESTEPS, trained_betas=every.trajectory_betas())
