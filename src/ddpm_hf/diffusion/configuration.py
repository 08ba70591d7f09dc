"""How a scheduler's configuration travels: readable by stock, and what stock lacks under one key.

Stock keys never lie: a schedule that stock does not know is written as its betas, and the extension
that names it belongs to these betas. Travels with the weights.
"""

import json
from typing import Any

from diffusers.configuration_utils import ConfigMixin

from . import checks, extension


class PortableConfig(ConfigMixin):  # type: ignore[misc]
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
        own = None
        if isinstance(config, dict):
            checks.warn_of_unknown_keys(cls, {*config, *kwargs})
            config = dict(extension.reopened(config, kwargs))
            own = config.pop("_ddpm_hf", None)
            config.pop("_use_default_values", None)
            if config.get("variance_type", "") is None:  # DPMSolver's word for "not learned"
                del config["variance_type"]
        scheduler, unused = super().from_config(config, return_unused_kwargs=True, **kwargs)
        scheduler._adopt_extension(own)
        return (scheduler, unused) if return_unused_kwargs else scheduler

    def _adopt_extension(self, own: Any) -> None:
        if own is None:
            return
        if isinstance(own, dict) and own.get("fingerprint") == self._fingerprint:
            self._keep_extension({**own, **self.config.get("_ddpm_hf", {})})
        else:
            checks.warn(
                "the configuration's `_ddpm_hf` was made for other betas or another prediction_type"
                " and is left out"
            )

    def _keep_extension(self, own: dict[str, Any]) -> None:
        """Under one key with an underscore, which stock diffusers carries along unread."""
        mark = {"format_version": extension.FORMAT_VERSION, "fingerprint": self._fingerprint}
        self.register_to_config(_ddpm_hf={**mark, **own})

    def to_json_string(self) -> str:
        """The configuration, under the class name that stock diffusers loads."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = "DDPMScheduler"
        return json.dumps(config, indent=2, sort_keys=True) + "\n"
