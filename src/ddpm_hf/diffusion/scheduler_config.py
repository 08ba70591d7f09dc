"""Loading and saving of a scheduler's configuration, compatible with stock diffusers.

A schedule that stock diffusers lacks is saved as its betas, and its name in the extension of the
configuration, whose fingerprint ties it to these betas. Travels with the weights.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, cast, overload

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from . import atomic_files, checks, config_checks, config_extension, schedules

Array = schedules.Array
Config = config_extension.Config

# Values measured on a network, each with its check, which returns the value as JSON.
CALIBRATION: dict[str, Callable[[Any, int], Any]] = {
    "x_0_mse": lambda mse, T: config_checks.check_x_0_mse(mse, T).tolist(),
    "calibrated_timesteps": config_checks.check_calibrated_timesteps,
    "recommended": config_checks.check_recommended,
}

Init = TypeVar("Init", bound=Callable[..., None])


def registered(init: Init) -> Init:
    """`register_to_config` of diffusers, typed so that the signature is kept."""
    return cast(Init, register_to_config(init))


class PortableScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Base class of the scheduler: a configuration with an extension that stock diffusers ignores.

    The fingerprint of the extension identifies the betas and the prediction type it belongs to.
    """

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = ...,
        return_unused_kwargs: Literal[False] = ...,
        **kwargs: Any,
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = ...,
        *,
        return_unused_kwargs: Literal[True],
        **kwargs: Any,
    ) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a scheduler from a folder or a Hub repository; arguments as in diffusers.

        Raises:
            OSError: if there is no scheduler.
            ValueError: if its configuration is malformed.
        """
        try:
            scheduler, unused = super().from_pretrained(
                pretrained_model_name_or_path, subfolder, return_unused_kwargs=True, **kwargs
            )
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            named = [cls.config_name, *(f"`{name}`" for name in kwargs)]
            if isinstance(error, ValueError) and any(name in f"{error}" for name in named):
                raise
            where = f"{cls.config_name} of {pretrained_model_name_or_path}"
            raise checks.error_in_file(where, error) from None
        # As tested in diffusers, no loaded value is marked as a default.
        loaded = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
        scheduler._internal_dict = FrozenDict(loaded)
        return (scheduler, unused) if return_unused_kwargs else scheduler

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> Config:
        """Override of the JSON reader of diffusers that limits the file size."""
        return atomic_files.read_json(Path(json_file))

    @classmethod
    def extract_init_dict(cls, config_dict: Config, **kwargs: Any) -> Any:
        """As in diffusers, but keywords may also set arguments that are not configuration keys."""
        own = {name: kwargs.pop(name) for name in cls.ignore_for_config if name in kwargs}
        init, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        return {**init, **own}, unused, hidden

    @overload
    @classmethod
    def from_config(
        cls, config: Any = ..., return_unused_kwargs: Literal[False] = ..., **kwargs: Any
    ) -> Self: ...

    @overload
    @classmethod
    def from_config(
        cls, config: Any = ..., *, return_unused_kwargs: Literal[True], **kwargs: Any
    ) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Create a scheduler from the configuration of this or a compatible one.

        Differs from diffusers: values that equal another class's default are kept; keys that only
        other schedulers use are dropped; an unknown key causes a warning; an extension made for
        other betas or another prediction type is dropped.

        Args:
            config: configuration of this or of a compatible scheduler.
            return_unused_kwargs: also return the unused keywords.
            kwargs: values that override those of `config`.
        """
        extension = None
        if isinstance(config, dict):
            config_checks.warn_of_unknown_keys(cls, {*config, *kwargs})
            config = _without_foreign_keys(
                cls, config_extension.with_schedule_by_name(config, kwargs)
            )
            config = config_extension.without(config, *CALIBRATION.keys() & kwargs.keys())
            extension = config.pop(config_extension.EXTENSION_KEY, None)
        scheduler, unused = super().from_config(config, return_unused_kwargs=True, **kwargs)
        scheduler._adopt_extension(extension)
        return (scheduler, unused) if return_unused_kwargs else scheduler

    @property
    def x_0_mse(self) -> Tensor | None:
        """Measured mean squared error m_t, (T,) float64; None if not calibrated."""
        mse = config_extension.extension_of(self.config).get("x_0_mse")
        return None if mse is None else torch.tensor(mse, dtype=torch.float64)

    @property
    def calibrated_timesteps(self) -> dict[str, dict[int, list[int]]]:
        """Calibrated timesteps by sampler and number of steps; {} if not calibrated."""
        trajectories = config_extension.extension_of(self.config).get("calibrated_timesteps", {})
        return {
            sampler: {int(K): list(steps) for K, steps in by_num_steps.items()}
            for sampler, by_num_steps in trajectories.items()
        }

    @property
    def recommended(self) -> dict[str, Any] | None:
        """The "scheduler" and "num_inference_steps" recommended by a sweep; None without one."""
        setting = config_extension.extension_of(self.config).get("recommended")
        return None if setting is None else dict(setting)

    def _resolve_betas(self, params: dict[str, float]) -> Array:
        """The configured betas; saves the name of an extension schedule in the extension."""
        betas, schedule = self._named_or_trained_betas(params)
        if self.config.rescale_betas_zero_snr:
            with np.errstate(divide="ignore"):  # log 0 at a last beta of 1
                betas = schedules.rescale_zero_terminal_snr(betas)
        self._fingerprint = config_extension.fingerprint(betas, self.config.prediction_type)
        if schedule:
            self._set_extension(schedule)
        return betas

    def _named_or_trained_betas(self, params: dict[str, float]) -> tuple[Array, Config]:
        """The configured betas, and the name and parameters of an extension schedule."""
        config = self.config
        T, name, trained = config.num_train_timesteps, config.beta_schedule, config.trained_betas
        params = config_checks.check_schedule_params(name, params)
        is_extension = name in schedules.EXTENSION_SCHEDULES
        if trained is not None:
            if is_extension:
                raise ValueError(
                    "`beta_schedule` must be left out if `trained_betas` are passed, got"
                    f" {name!r}; from_config(..., trained_betas=None) drops the betas of a"
                    " configuration"
                )
            betas = config_checks.check_betas("`trained_betas`", trained, T)
            self.register_to_config(trained_betas=betas.tolist())
            return betas, {}
        betas = schedules.named_betas(name, T, config.beta_start, config.beta_end, params)
        formula = f"betas of `beta_schedule` {name!r} with T = {T} and parameters {params}"
        betas = config_checks.check_betas(formula, betas, T)
        if not is_extension:
            return betas, {}
        self.register_to_config(beta_schedule="linear", trained_betas=betas.tolist())
        return betas, {"beta_schedule": name, "beta_schedule_params": params}

    def _adopt_extension(self, extension: Any) -> None:
        """Keep a loaded extension if it matches the betas and the prediction type."""
        if extension is None:
            return
        if not (
            config_extension.is_well_formed(extension)
            and extension["fingerprint"] == self._fingerprint
        ):
            checks.warn(
                f"the extension `{config_extension.EXTENSION_KEY}` was made for other betas or"
                " another prediction type and is ignored"
            )
            return
        for name in CALIBRATION.keys() & extension.keys():
            try:
                self._set_calibration(**{name: extension[name]})
            except (TypeError, ValueError) as error:
                checks.warn(
                    f"{name} in `{config_extension.EXTENSION_KEY}` of the configuration is"
                    f" ignored: {error}"
                )
                extension = {key: value for key, value in extension.items() if key != name}
        self._set_extension({**extension, **config_extension.extension_of(self.config)})

    def _set_calibration(self, **measured: Any) -> None:
        """Check measured values and add them to the extension; None is skipped."""
        T = self.config.num_train_timesteps
        valid = {k: CALIBRATION[k](value, T) for k, value in measured.items() if value is not None}
        if valid:
            self._set_extension({**config_extension.extension_of(self.config), **valid})

    def _set_extension(self, extension: Config) -> None:
        header = {
            "format_version": config_extension.FORMAT_VERSION,
            "fingerprint": self._fingerprint,
        }
        self.register_to_config(**{config_extension.EXTENSION_KEY: {**header, **extension}})

    def to_json_string(self) -> str:
        """The configuration as JSON, with the class name that stock diffusers loads."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = "DDPMScheduler"
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        """The settings, with the name of the schedule instead of its betas."""
        schedule = {"beta_schedule", "beta_start", "beta_end", "trained_betas"}
        settings = {k: v for k, v in self.config.items() if k[0] != "_" and k not in schedule}
        name, params = config_extension.beta_schedule_of(self.config)
        settings |= {"beta_schedule": name, **params}
        return f"{type(self).__name__} {json.dumps(settings, indent=2, sort_keys=True)}"


def _without_foreign_keys(cls: Any, config: Config) -> Config:
    """The configuration without the keys that only other schedulers use."""
    # Keys that newer versions of DDPMScheduler define are kept for it.
    known = cls._get_init_keys(cls) | cls._get_init_keys(diffusers.DDPMScheduler)
    kept = {k: v for k, v in config.items() if k in known or k[:1] == "_"}
    kept.pop("_use_default_values", None)
    if kept.get("variance_type", "") is None:  # "not learned" in DPMSolverMultistepScheduler
        del kept["variance_type"]
    return kept
