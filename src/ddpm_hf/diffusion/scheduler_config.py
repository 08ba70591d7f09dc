"""How a scheduler's configuration travels: readable by stock, and what stock lacks under one key.

Stock keys never lie: a schedule that stock does not know is written as its betas, and the extension
that names it belongs to these betas. Travels with the weights.
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

from . import atomic_files, checks, config_extension, schedules

Array = schedules.Array

# What is measured on a network, as JSON values of what is given.
CALIBRATION: dict[str, Callable[[Any, int], Any]] = {
    "x_0_mse": lambda given, T: checks.check_x_0_mse(given, T).tolist(),
    "calibrated_timesteps": checks.check_calibrated_timesteps,
    "recommended": checks.check_recommended,
}

Init = TypeVar("Init", bound=Callable[..., None])


def registered(init: Init) -> Init:
    """diffusers' `register_to_config`, through which type checkers see the signature."""
    return cast(Init, register_to_config(init))


class PortableScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A scheduler that stock diffusers reads, and whose extension is kept under `_ddpm_hf`.

    By its fingerprint an extension is known to belong to the betas.
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
        """The scheduler of a folder or a repository of the Hub; arguments as in diffusers.

        Raises:
            OSError: if there is none.
            ValueError: if its configuration is malformed.
        """
        try:
            scheduler, unused = super().from_pretrained(
                pretrained_model_name_or_path, subfolder, return_unused_kwargs=True, **kwargs
            )
        except (AttributeError, LookupError, TypeError) as error:
            where = f"{cls.config_name} of {pretrained_model_name_or_path}"
            raise ValueError(f"{where}: {error}") from error
        # What was loaded was given, every key of it: as in diffusers, where its tests ask for that.
        given = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
        scheduler._internal_dict = FrozenDict(given)
        return (scheduler, unused) if return_unused_kwargs else scheduler

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """What diffusers reads a configuration by, within bounds."""
        return atomic_files.read_json(Path(json_file))

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in diffusers; arguments that configurations do not hold can be given by keyword."""
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
        """As in diffusers, with four differences.

        No given value is dropped for standing at another class's default; what means something to
        other schedulers only is left out; a key that nobody knows is warned about; an extension
        made for other betas or another prediction type is left out.

        Args:
            config: configuration of this or of a compatible scheduler.
            return_unused_kwargs: return the unused keywords, too.
            kwargs: values that win over those of `config`.
        """
        own = None
        if isinstance(config, dict):
            checks.warn_of_unknown_keys(cls, {*config, *kwargs})
            config = _without_foreign_keys(
                cls, config_extension.with_schedule_by_name(config, kwargs)
            )
            config = config_extension.without(config, *CALIBRATION.keys() & kwargs.keys())
            own = config.pop(config_extension.EXTENSION_KEY, None)
        scheduler, unused = super().from_config(config, return_unused_kwargs=True, **kwargs)
        scheduler._adopt_extension(own)
        return (scheduler, unused) if return_unused_kwargs else scheduler

    @property
    def x_0_mse(self) -> Tensor | None:
        """m_t as it was measured, (T,) float64; None for a scheduler that is not calibrated."""
        known = config_extension.extension_of(self.config).get("x_0_mse")
        return None if known is None else torch.tensor(known, dtype=torch.float64)

    @property
    def calibrated_timesteps(self) -> dict[str, dict[int, list[int]]]:
        """The timesteps that were found, by sampler and number of steps; {} where none were."""
        found = config_extension.extension_of(self.config).get("calibrated_timesteps", {})
        return {
            sampler: {int(K): list(steps) for K, steps in of.items()}
            for sampler, of in found.items()
        }

    @property
    def recommended(self) -> dict[str, Any] | None:
        """Scheduler and number of steps that a sweep found best; None where there was none."""
        found = config_extension.extension_of(self.config).get("recommended")
        return None if found is None else dict(found)

    def _resolve_betas(self, params: dict[str, float]) -> Array:
        """The configured betas; the name of a schedule that stock lacks goes to the extension."""
        betas, own = self._named_or_trained_betas(params)
        if self.config.rescale_betas_zero_snr:
            with np.errstate(divide="ignore"):  # log 0 at a last beta of 1
                betas = schedules.rescale_zero_terminal_snr(betas)
        self._fingerprint = config_extension.fingerprint(betas, self.config.prediction_type)
        if own:
            self._keep_extension(own)
        return betas

    def _named_or_trained_betas(self, params: dict[str, float]) -> tuple[Array, dict[str, Any]]:
        """The configured betas, and the name and parameters of a schedule that stock lacks."""
        config = self.config
        T, name, trained = config.num_train_timesteps, config.beta_schedule, config.trained_betas
        params = checks.check_schedule_params(name, params)
        is_own = name in schedules.OWN_SCHEDULES
        if trained is not None:
            if is_own:
                raise ValueError(
                    f"trained_betas and beta_schedule={name!r} contradict each other: pass one"
                    " (to from_config, trained_betas=None drops what the configuration holds)"
                )
            betas = checks.check_betas("trained_betas", trained, T)
            self.register_to_config(trained_betas=betas.tolist())
            return betas, {}
        betas = schedules.named_betas(name, T, config.beta_start, config.beta_end, params)
        betas = checks.check_betas(f"betas of beta_schedule {name!r}, T={T}, {params}", betas, T)
        if not is_own:
            return betas, {}
        self.register_to_config(beta_schedule="linear", trained_betas=betas.tolist())
        return betas, {"beta_schedule": name, "beta_schedule_params": params}

    def _adopt_extension(self, own: Any) -> None:
        if own is None:
            return
        if config_extension.is_well_formed(own) and own["fingerprint"] == self._fingerprint:
            for name in CALIBRATION.keys() & own.keys():
                try:
                    self._keep_calibration(**{name: own[name]})
                except (TypeError, ValueError) as error:
                    checks.warn(f"of the configuration's `_ddpm_hf` {name} is left out: {error}")
                    own = {key: value for key, value in own.items() if key != name}
            self._keep_extension({**own, **config_extension.extension_of(self.config)})
        else:
            checks.warn(
                "the configuration's `_ddpm_hf` was made for other betas or another prediction_type"
                " and is left out"
            )

    def _keep_calibration(self, **measured: Any) -> None:
        T = self.config.num_train_timesteps
        good = {k: CALIBRATION[k](value, T) for k, value in measured.items() if value is not None}
        if good:
            self._keep_extension({**config_extension.extension_of(self.config), **good})

    def _keep_extension(self, own: dict[str, Any]) -> None:
        """Under one key with an underscore, which stock diffusers carries along unread."""
        mark = {"format_version": config_extension.FORMAT_VERSION, "fingerprint": self._fingerprint}
        self.register_to_config(**{config_extension.EXTENSION_KEY: {**mark, **own}})

    def to_json_string(self) -> str:
        """The configuration, under the class name that stock diffusers loads."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = "DDPMScheduler"
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        """The settings, with the schedule under its true name instead of its betas."""
        told = {"beta_schedule", "beta_start", "beta_end", "trained_betas"}
        settings = {k: v for k, v in self.config.items() if k[0] != "_" and k not in told}
        name, params = config_extension.beta_schedule_of(self.config)
        settings |= {"beta_schedule": name, **params}
        return f"{type(self).__name__} {json.dumps(settings, indent=2, sort_keys=True)}"


def _without_foreign_keys(cls: Any, config: dict[str, Any]) -> dict[str, Any]:
    """What a scheduler of this class understands of a configuration, be it another's."""
    # Keys that stock's DDPM has gained since are kept for it.
    known = cls._get_init_keys(cls) | cls._get_init_keys(diffusers.DDPMScheduler)
    kept = {k: v for k, v in config.items() if k in known or k[:1] == "_"}
    kept.pop("_use_default_values", None)
    if kept.get("variance_type", "") is None:  # DPMSolver's word for "not learned"
        del kept["variance_type"]
    return kept
