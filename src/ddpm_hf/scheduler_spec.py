"""Specification of a scheduler in text, on the command line and in reports.

    DDIM
    DDPM:eta=0
    DPMSolverMultistep:algorithm_type=sde-dpmsolver++,timestep_spacing=trailing

Imports only the standard library, so that a wrong name is reported before torch is loaded.
"""

import json
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from ddpm_hf.utils.text import did_you_mean

# The schedulers of diffusers that sample from a discrete-time model with a beta schedule.
SCHEDULERS = (
    "DDPM", "DDIM", "PNDM", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep",
    "DEISMultistep", "SASolver", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete",
    "KDPM2Discrete", "KDPM2AncestralDiscrete", "LMSDiscrete",
)  # fmt: skip
# What a checkpoint or a card may choose. Other options change the betas, or cost time and memory.
_FOREIGN_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "timestep_spacing": ("leading", "linspace", "trailing", "quadratic"),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    "solver_order": (1, 2, 3),
    "use_karras_sigmas": (False, True),
    "x_0_mse": (None,),
}
NAMES_HELP = (
    f"{', '.join(SCHEDULERS)}; with options of the diffusers class as in "
    "DPMSolverMultistep:algorithm_type=sde-dpmsolver++,timestep_spacing=trailing, and with eta of "
    "its step as in DDPM:eta=0"
)


@dataclass(frozen=True)
class SchedulerSpec:
    """A scheduler with changed options.

    Attributes:
        scheduler: name of its class without "Scheduler"; None for the model's own scheduler.
        options: configuration options that replace those of the model.
        eta: noise of its step, in [0, 1]; None for the default of the step.
    """

    scheduler: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    eta: float | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a specification; `str` is the inverse.

        Raises:
            ValueError: if the text is malformed or the scheduler unknown, with the choices.
        """
        if not re.fullmatch(r"[\w.:,=+-]+", text):  # model cards show the text, also as code
            raise ValueError(f"{text!r} must have the form NAME or NAME:option=value,...")
        name, _, options_text = text.partition(":")
        name = name.removesuffix("Scheduler")
        if name not in SCHEDULERS:
            hint = did_you_mean(name, SCHEDULERS) or f"; choices: {', '.join(SCHEDULERS)}"
            raise ValueError(f"unknown scheduler {name!r}{hint}")
        pairs = [part.partition("=") for part in options_text.split(",")] if options_text else []
        if malformed := ["".join(pair) for pair in pairs if not (pair[0] and pair[2])]:
            raise ValueError(
                f"{text!r} must have the form NAME:option=value,..., got the option "
                f"{malformed[0]!r}"
            )
        options = {option: _parse_value(value) for option, _, value in pairs}
        eta = options.pop("eta", None)
        if eta is not None and not (isinstance(eta, int | float) and 0 <= eta <= 1):
            raise ValueError(f"eta in {text!r} must be a number in [0, 1], got {eta!r}")
        return cls(name, options, eta)

    @classmethod
    def parse_foreign(cls, text: str) -> Self:
        """Parse a specification of a checkpoint or card, which may only choose how to sample.

        Raises:
            ValueError: as `parse`, and for any other option or value.
        """
        spec = cls.parse(text)
        for option, value in spec.options.items():
            choices = _FOREIGN_OPTIONS.get(option, ())
            if not any(type(value) is type(choice) and value == choice for choice in choices):
                raise ValueError(
                    f"`{option}`={_format_value(value):.100} is not an option of a sampler that a"
                    " model may set; pass the scheduler yourself if you trust it"
                )
        return spec

    def with_options(self, **options: Any) -> Self:
        """A copy with changed configuration options; None leaves an option unchanged."""
        changed = {option: value for option, value in options.items() if value is not None}
        return replace(self, options={**self.options, **changed})

    def __str__(self) -> str:
        options = dict(self.options) | ({} if self.eta is None else {"eta": self.eta})
        options_text = ",".join(f"{name}={_format_value(x)}" for name, x in options.items())
        return (self.scheduler or "own") + (f":{options_text}" if options_text else "")


_READABLE = {
    "x_0_mse=null": "uncalibrated",
    "algorithm_type=sde-dpmsolver++": "SDE",
    "algorithm_type=dpmsolver++": "ODE",
    "use_karras_sigmas=true": "Karras sigmas",
}


def readable_names(names: Iterable[str]) -> dict[str, str]:
    """Names of schedulers for plots: "DDPM, uncalibrated" for "DDPM:x_0_mse=null".

    A timestep spacing that all of them share is left out.

    Args:
        names: specifications.
    """
    specs = {name: SchedulerSpec.parse(name) for name in names}
    spacings = {spec.options.get("timestep_spacing") for spec in specs.values()}
    shared = {"timestep_spacing"} if len(spacings) == 1 else set()
    return {name: _readable(spec, shared) for name, spec in specs.items()}


def _readable(spec: SchedulerSpec, left_out: Container[str]) -> str:
    words = [spec.scheduler or "own"]
    for option, value in spec.options.items():
        if option not in left_out:
            text = f"{option}={_format_value(value)}"
            plain = f"{value}" if option == "timestep_spacing" else text.replace("_", " ")
            words.append(_READABLE.get(text, plain))
    return ", ".join(words + ([] if spec.eta is None else [f"eta {spec.eta:g}"]))


def scheduler_name(text: str) -> str:
    """The normal form of a specification.

    Raises:
        ValueError: as `SchedulerSpec.parse`.
    """
    return str(SchedulerSpec.parse(text))


def stock_scheduler(name: str) -> tuple[str, Mapping[str, Any]] | None:
    """The class and options with which the `DDPMPipeline` of diffusers samples in the same way.

    That pipeline passes a generator to the scheduler's step, but no eta, and has no calibrated
    variances. Its DDIM differs from `DDPM:eta=0` if x_0 is clipped, because eps is not recomputed.

    Args:
        name: specification of a scheduler.
    Returns:
        None if the stock pipeline cannot sample in this way.
    """
    spec = SchedulerSpec.parse(name)
    kind, options, eta = spec.scheduler, dict(spec.options), spec.eta
    is_uncalibrated = options.pop("x_0_mse", "calibrated") is None
    is_supported = {
        "DDPM": is_uncalibrated and eta in (None, 1),
        "DDIM": eta in (None, 0),
        "DPMSolverMultistep": eta is None,
    }
    return (f"{kind}Scheduler", options) if kind and is_supported.get(kind) else None


def _parse_value(text: str) -> Any:
    """A number, boolean or null in JSON notation; any other text stays text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, dict | list | str) else value


def _format_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
