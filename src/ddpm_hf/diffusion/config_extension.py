"""What stock diffusers has no key for, as it stands under `_ddpm_hf` in a saved configuration.

Reads configurations as plain dictionaries and needs only numpy, so that a model card can be written
without torch. Travels with the weights.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np

from . import schedules

# The scheduler is known by name: a copy that travelled with other weights is another class object.
GAUSSIAN_SCHEDULER = "GaussianDDPMScheduler"
EXTENSION_KEY = "_ddpm_hf"
"""Key of the extension in scheduler_config.json and in unet/config.json."""
FORMAT_VERSION = 1
MARKS = {"format_version", "fingerprint"}
SCHEDULE_KEYS = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "beta_schedule_params"
}  # fmt: skip

Array = schedules.Array


def extension_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The extension in the configuration of a scheduler or a UNet, unchecked; {} without one."""
    extension = config.get(EXTENSION_KEY)
    return extension if isinstance(extension, Mapping) else {}


def with_extension(config: Mapping[str, Any], extension: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the configuration with this extension; without one if it is empty."""
    rest = {key: value for key, value in config.items() if key != EXTENSION_KEY}
    return {**rest, EXTENSION_KEY: dict(extension)} if extension else rest


def fingerprint(betas: Array, prediction_type: str) -> str:
    """What an extension belongs to; of float32, since libms differ in the last bit of float64."""
    return hashlib.sha256(betas.astype("<f4").tobytes() + prediction_type.encode()).hexdigest()[:16]


def valid_extension(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The extension of a configuration, if it was made for the betas and predictions there."""
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
    made_for = fingerprint(values, str(config.get("prediction_type", "epsilon")))
    return extension if extension["fingerprint"] == made_for else None


def is_well_formed(extension: Any) -> TypeGuard[dict[str, Any]]:
    """Whether this could be an extension: what stands in a file may be anything."""
    if not isinstance(extension, dict) or "fingerprint" not in extension:
        return False
    name, params = extension.get("beta_schedule", ""), extension.get("beta_schedule_params", {})
    return (
        isinstance(name, str)
        and isinstance(params, dict)
        and all(isinstance(value, (int, float)) for value in params.values())
    )


def without(config: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """A copy of the configuration whose extension lacks these values, and is dropped if empty."""
    if not isinstance(config.get(EXTENSION_KEY), dict):
        return dict(config)
    rest = {key: value for key, value in extension_of(config).items() if key not in names}
    return with_extension(config, rest if rest.keys() - MARKS else {})


def beta_schedule_of(config: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """The true name and parameters of the beta schedule in a configuration.

    A schedule that stock diffusers lacks is saved as `trained_betas`, beside which the key
    "beta_schedule" says "linear"; its own name stands in the extension.

    Args:
        config: of a scheduler, or as it is read from scheduler_config.json.

    Returns:
        The name, "trained_betas" where betas were given without one; and the parameters that these
        betas depend on, such as {"beta_start": 0.0001, "beta_end": 0.02} or {"tau": 0.7}.
    """
    name, params = str(config.get("beta_schedule", "linear")), dict[str, float]()
    if config.get("trained_betas") is not None:
        extension = valid_extension(config) or {}
        name = extension.get("beta_schedule", "trained_betas")
        params = extension.get("beta_schedule_params", {})
    ends = schedules.BETA_RANGE.get(name, ())
    defaults = {"beta_start": 0.0001, "beta_end": 0.02}
    return name, {**{key: config.get(key, defaults[key]) for key in ends}, **params}


def with_schedule_by_name(config: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The configuration with its own schedule by name, where `given` changes that schedule.

    Its betas, as they are written for stock, would win over the change.
    """
    if "trained_betas" in given or not SCHEDULE_KEYS & given.keys():
        return config
    extension = valid_extension(config)
    if extension is None or "beta_schedule" not in extension:
        return config
    params = {} if "beta_schedule" in given else extension.get("beta_schedule_params", {})
    given.setdefault("beta_schedule", extension["beta_schedule"])
    given["beta_schedule_params"] = {**params, **(given.get("beta_schedule_params") or {})}
    told = {"beta_schedule", "beta_schedule_params"}
    if extension.keys() <= MARKS | told:  # nothing is lost, so that nothing is to be warned about
        config = with_extension(config, {})
    return {**config, "trained_betas": None}
