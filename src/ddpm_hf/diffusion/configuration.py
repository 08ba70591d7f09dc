"""How a scheduler's configuration travels: readable by stock, and what stock lacks under one key.

Stock keys never lie: a schedule that stock does not know is written as its betas, and the extension
that names it belongs to these betas. Travels with the weights.
"""

import hashlib
import json
from typing import Any

import numpy as np
from diffusers.configuration_utils import ConfigMixin

from . import checks, schedules

EXTENSION_FORMAT_VERSION = 1
SCHEDULE_KEYS = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "beta_schedule_params"
}  # fmt: skip

Array = schedules.Array


class TravellingConfig(ConfigMixin):  # type: ignore[misc]
    """The configuration of a scheduler whose extension is kept under `_ddpm_hf`.

    A subclass sets `_fingerprint`, by which an extension is known to belong to its betas.
    """

    _fingerprint: str

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in diffusers; arguments that configurations do not hold can be given by keyword."""
        own = {name: kwargs.pop(name) for name in cls.ignore_for_config if name in kwargs}
        init, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        return {**init, **own}, unused, hidden

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """As in diffusers, with three differences.

        No given value is dropped for standing at another class's default; a key that nobody knows
        is warned about; an extension made for other betas or another prediction type is left out.

        Args:
            config: configuration of this or of a compatible scheduler.
            return_unused_kwargs: return the unused keywords, too.
            kwargs: values that win over those of `config`.
        """
        extension = None
        if isinstance(config, dict):
            checks.warn_of_unknown_keys(cls, {*config, *kwargs})
            extension = config.get("_ddpm_hf")
            ours = ("_ddpm_hf", "_use_default_values")
            config = {key: value for key, value in config.items() if key not in ours}
            if config.get("variance_type", "") is None:  # DPMSolver's word for "not learned"
                del config["variance_type"]
            config = _reopened(config, extension, kwargs)
        scheduler, unused = super().from_config(config, return_unused_kwargs=True, **kwargs)
        scheduler._adopt_extension(extension)
        return (scheduler, unused) if return_unused_kwargs else scheduler

    def _adopt_extension(self, extension: Any) -> None:
        if extension is None:
            return
        if isinstance(extension, dict) and extension.get("fingerprint") == self._fingerprint:
            self._keep_extension({**extension, **self.config.get("_ddpm_hf", {})})
        else:
            checks.warn(
                "the configuration's `_ddpm_hf` was made for other betas or another prediction_type"
                " and is left out"
            )

    def _keep_extension(self, extension: dict[str, Any]) -> None:
        """Under one key with an underscore, which stock diffusers carries along unread."""
        mark = {"format_version": EXTENSION_FORMAT_VERSION, "fingerprint": self._fingerprint}
        self.register_to_config(_ddpm_hf={**mark, **extension})

    def to_json_string(self) -> str:
        """The configuration, under the class name that stock diffusers loads."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = "DDPMScheduler"
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _reopened(config: dict[str, Any], extension: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The configuration with a schedule of ours by its name, where `given` changes that schedule.

    Its betas, as they are written for stock, would win over the change.
    """
    if not isinstance(extension, dict) or "beta_schedule" not in extension:
        return config
    if "trained_betas" in given or not SCHEDULE_KEYS & given.keys():
        return config
    betas, prediction_type = config.get("trained_betas"), config.get("prediction_type", "epsilon")
    if extension.get("fingerprint") != fingerprint(np.array(betas, float), prediction_type):
        return config
    params = {} if "beta_schedule" in given else extension["beta_schedule_params"]
    given.setdefault("beta_schedule", extension["beta_schedule"])
    given["beta_schedule_params"] = {**params, **(given.get("beta_schedule_params") or {})}
    return {**config, "trained_betas": None}


def fingerprint(betas: Array, prediction_type: str) -> str:
    """What an extension belongs to; of float32, since libms differ in the last bit of float64."""
    return hashlib.sha256(betas.astype("<f4").tobytes() + prediction_type.encode()).hexdigest()[:16]
