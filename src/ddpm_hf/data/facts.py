"""What the images of a data set are, as it is kept with the weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

IMAGE_MODES = ("L", "LA", "RGB", "RGBA")  # one letter per channel
MAX_SIZE = 8192


@dataclass(frozen=True)
class ImageFacts:
    """What the images of a data set are; kept with the weights, so that samples come back alike.

    Attributes:
        mode: "L", "LA", "RGB" or "RGBA": 1, 2, 3 or 4 channels.
        height: in pixels, before any padding, 1..8192.
        width: likewise.
        bit_depth: 8 or 16 bits per channel.
        class_names: names of the labels in their order, or None.
    """

    mode: str
    height: int
    width: int
    bit_depth: int = 8
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, IMAGE_MODES)
        check_choice("bit_depth", self.bit_depth, (8, 16))
        check_size("height", self.height)
        check_size("width", self.width)

    @property
    def num_channels(self) -> int:
        """Channels of a training tensor: one per letter of the mode."""
        return len(self.mode)

    def to_config(self) -> dict[str, Any]:
        """The JSON form, as it stands in `unet/config.json` under `_ddpm_hf`."""
        image = {name: getattr(self, name) for name in ("mode", "height", "width", "bit_depth")}
        config: dict[str, Any] = {"format_version": 1, "image": image}
        return config | ({"class_names": list(self.class_names)} if self.class_names else {})

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ImageFacts":
        """The facts in the JSON form of `to_config`.

        Raises:
            ValueError: if the format is newer than this package, or a value is missing or wrong.
        """
        if config.get("format_version") != 1:
            raise ValueError(f"format_version must be 1, got {config.get('format_version')!r}")
        names = config.get("class_names")
        try:
            return cls(**config["image"], class_names=tuple(map(str, names)) if names else None)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the facts of an image data set: {config!r}") from error


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def check_size(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a number of pixels that an image may have."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZE:
        raise ValueError(f"{name} must be an int in 1..{MAX_SIZE}, got {value!r}")
