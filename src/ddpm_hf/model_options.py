"""Name of a model, and options of loading it, which the commands share."""

from dataclasses import dataclass
from typing import ClassVar

from ddpm_hf.options import REQUIRED, Options, option


@dataclass(frozen=True, kw_only=True)
class ModelArgument(Options):
    """Name of the model."""

    model: str = option(
        REQUIRED,
        "Hub repository or folder of a model",
        metavar="MODEL",
        is_path=True,
        is_positional=True,
    )


@dataclass(frozen=True, kw_only=True)
class LoadOptions(Options):
    """Options of `load`: files of the model."""

    _argument_group_name: ClassVar[str] = "files of the model"

    revision: str | None = option(
        None, "branch, tag or commit of the model on the Hub (default: main)", is_recorded=False
    )
    variant: str | None = option(None, "variant of the weights, such as fp16", is_recorded=False)
    use_safetensors: bool = option(
        True,
        "load the pickled .bin weights of an old repository; they can run code, so only for"
        " authors you trust",
        flag="--allow-pickle",
        is_recorded=False,
    )
