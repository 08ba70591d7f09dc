"""The extension of a configuration: settings that stock diffusers has no key for.

It is saved under the key `_ddpm_hf`, which stock diffusers ignores. Configurations are plain
dictionaries here, and numpy is the only dependency, so that a model card can be rendered without
torch. Travels with the weights.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np

from . import schedules

# Compared by name: the class that travelled with a checkpoint is another object.
GAUSSIAN_SCHEDULER = "GaussianDDPMScheduler"
EXTENSION_KEY = "_ddpm_hf"
"""Key of the extension in scheduler_config.json and in unet/config.json."""
FORMAT_VERSION = 1
HEADER_KEYS = {"format_version", "fingerprint"}
SCHEDULE_KEYS = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "beta_schedule_params"
}  # fmt: skip

Array = schedules.Array
Config = dict[str, Any]


def extension_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The extension in the configuration of a scheduler or a UNet, unchecked; {} without one."""
    extension = config.get(EXTENSION_KEY)
    return extension if isinstance(extension, Mapping) else {}


def with_extension(config: Mapping[str, Any], extension: Mapping[str, Any]) -> Config:
    """A copy of the configuration with this extension; without one if it is empty."""
    rest = {key: value for key, value in config.items() if key != EXTENSION_KEY}
    return {**rest, EXTENSION_KEY: dict(extension)} if extension else rest


def without(config: Mapping[str, Any], *names: str) -> Config:
    """A copy of the configuration without these values of its extension."""
    if not isinstance(config.get(EXTENSION_KEY), dict):
        return dict(config)
    rest = {key: value for key, value in extension_of(config).items() if key not in names}
    return with_extension(config, rest if rest.keys() - HEADER_KEYS else {})


def fingerprint(betas: Array, prediction_type: str) -> str:
    """Digest of the diffusion that an extension was made for.

    Computed from float32 betas, because math libraries differ in the last bit of float64.
    """
    return hashlib.sha256(betas.astype("<f4").tobytes() + prediction_type.encode()).hexdigest()[:16]


def valid_extension(config: Mapping[str, Any]) -> Config | None:
    """The extension of a configuration if it matches its betas and prediction type, else None."""
    extension, betas = config.get(EXTENSION_KEY), config.get("trained_betas")
    if not is_well_formed(extension) or betas is None:
        return None
    try:
        values = np.asarray(betas, dtype=np.float64)
    except (OverflowError, TypeError, ValueError):
        return None
    if values.ndim != 1:
        return None
    if config.get("rescale_betas_zero_snr"):
        with np.errstate(all="ignore"):
            values = schedules.rescale_zero_terminal_snr(values)
    expected = fingerprint(values, str(config.get("prediction_type", "epsilon")))
    return extension if extension["fingerprint"] == expected else None


def is_well_formed(extension: Any) -> TypeGuard[Config]:
    """Whether a value read from a file has the structure of an extension."""
    if not isinstance(extension, dict) or "fingerprint" not in extension:
        return False
    name, params = extension.get("beta_schedule", ""), extension.get("beta_schedule_params", {})
    return (
        isinstance(name, str)
        and isinstance(params, dict)
        and all(isinstance(value, (int, float)) for value in params.values())
    )


def beta_schedule_of(config: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """Name and parameters of the beta schedule of a configuration.

    A schedule that stock diffusers lacks is saved as `trained_betas` with the beta_schedule
    "linear"; the extension holds its name.

    Args:
        config: configuration of a scheduler, or the content of scheduler_config.json.

    Returns:
        The name, "trained_betas" for unnamed betas, and the parameters that the betas depend on,
        such as {"beta_start": 0.0001, "beta_end": 0.02} or {"tau": 0.7}.
    """
    name, params = str(config.get("beta_schedule", "linear")), dict[str, float]()
    if config.get("trained_betas") is not None:
        extension = valid_extension(config) or {}
        name = extension.get("beta_schedule", "trained_betas")
        params = extension.get("beta_schedule_params", {})
    ends = schedules.BETA_RANGE.get(name, ())
    defaults = {"beta_start": 0.0001, "beta_end": 0.02}
    return name, {**{key: config.get(key, defaults[key]) for key in ends}, **params}


def with_schedule_by_name(config: Config, overrides: Config) -> Config:
    """Restore the name of an extension schedule in the configuration if `overrides` change it.

    The betas saved for stock diffusers would otherwise take precedence over the overrides.

    Args:
        config: configuration of a scheduler.
        overrides: values that override the configuration; updated in place.
    """
    if "trained_betas" in overrides or not SCHEDULE_KEYS & overrides.keys():
        return config
    extension = valid_extension(config)
    if extension is None or "beta_schedule" not in extension:
        return config
    params = {} if "beta_schedule" in overrides else extension.get("beta_schedule_params", {})
    overrides.setdefault("beta_schedule", extension["beta_schedule"])
    overrides["beta_schedule_params"] = {**params, **(overrides.get("beta_schedule_params") or {})}
    if extension.keys() <= HEADER_KEYS | {"beta_schedule", "beta_schedule_params"}:
        config = with_extension(config, {})  # nothing else is in it, so no warning is needed
    return {**config, "trained_betas": None}
