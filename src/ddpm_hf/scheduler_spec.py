"""A sampler as it is called on the command line and in reports: a scheduler and its options.

DDIM
DDPM:eta=0
DPMSolverMultistep:algorithm_type=sde-dpmsolver++,timestep_spacing=trailing

Loads nothing heavy, so that a wrong name is answered at once.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from ddpm_hf.text import did_you_mean

# Those of diffusers that sample a model of this kind.
SCHEDULERS = (
    "DDPM", "DDIM", "PNDM", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep",
    "DEISMultistep", "SASolver", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete",
    "KDPM2Discrete", "KDPM2AncestralDiscrete", "LMSDiscrete",
)  # fmt: skip
NAMES_HELP = (
    f"{', '.join(SCHEDULERS)}; with options of the class in diffusers as "
    "DPMSolverMultistep:algorithm_type=sde-dpmsolver++,timestep_spacing=trailing, and eta of its "
    "step as DDPM:eta=0"
)


@dataclass(frozen=True)
class SchedulerSpec:
    """Which scheduler takes the steps.

    Attributes:
        scheduler: the name of its class without "Scheduler"; None for the model's own.
        options: of its configuration, in place of what that says.
        eta: noise of its step; None for its own default.
    """

    scheduler: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    eta: float | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """The sampler of that name; `str` of it is a name again.

        Raises:
            ValueError: if there is none, naming the choices.
        """
        if not re.fullmatch(r"[\w.:,=+-]+", text):  # cards show it, and as code
            raise ValueError(f"{text!r} must be NAME or NAME:option=value,...")
        name, _, listed = text.partition(":")
        name = name.removesuffix("Scheduler")
        if name not in SCHEDULERS:
            hint = did_you_mean(name, SCHEDULERS) or f"; choices: {', '.join(SCHEDULERS)}"
            raise ValueError(f"there is no scheduler {name!r}{hint}")
        pairs = [part.partition("=") for part in listed.split(",")] if listed else []
        if wrong := ["".join(pair) for pair in pairs if not (pair[0] and pair[2])]:
            raise ValueError(f"{text!r} must be NAME:option=value,..., got the option {wrong[0]!r}")
        options = {option: _value(value) for option, _, value in pairs}
        eta = options.pop("eta", None)
        if eta is not None and not (isinstance(eta, int | float) and 0 <= eta <= 1):
            raise ValueError(f"{text!r}: eta must be a number in [0, 1], got {eta!r}")
        return cls(name, options, eta)

    def with_options(self, **options: Any) -> Self:
        """The sampler with these options, but for those that are None."""
        given = {option: value for option, value in options.items() if value is not None}
        return replace(self, options={**self.options, **given})

    def __str__(self) -> str:
        options = dict(self.options) | ({} if self.eta is None else {"eta": self.eta})
        listed = ",".join(f"{option}={_text(value)}" for option, value in options.items())
        return (self.scheduler or "own") + (f":{listed}" if listed else "")


def stock_scheduler(name: str) -> tuple[str, dict[str, Any]] | None:
    """What diffusers' own `DDPMPipeline` takes the same steps by: a class and its options.

    That pipeline scales nothing and passes no eta, but a generator; it has no calibrated variances.
    Its DDIM is not `DDPM:eta=0` where x_0 is clipped: eps stays as it was.

    Args:
        name: of a sampler.
    Returns:
        None for a sampler that it cannot run.
    """
    sampler = SchedulerSpec.parse(name)
    kind, options, eta = sampler.scheduler, dict(sampler.options), sampler.eta
    is_published = options.pop("x_0_mse", "calibrated") is None
    can_run = {
        "DDPM": is_published and eta in (None, 1),
        "DDIM": eta in (None, 0),
        "DPMSolverMultistep": eta is None,
    }
    return (f"{kind}Scheduler", options) if kind and can_run.get(kind) else None


def _value(text: str) -> Any:
    """A number, true, false or null as in JSON; anything else is text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, dict | list | str) else value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
