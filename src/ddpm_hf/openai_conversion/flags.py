"""Flags of the scripts of improved-diffusion and guided-diffusion; imports no torch."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ddpm_hf.diffusion.atomic_files import read_text
from ddpm_hf.options import Options, option
from ddpm_hf.utils.text import did_you_mean


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
            flags = json.loads(read_text(path))
        except (OSError, RecursionError, ValueError) as error:
            raise ValueError(f"`config` {path} cannot be read: {error}") from None
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
