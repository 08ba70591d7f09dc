"""Image sources: where training images come from, by position."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_hf.data.errors import DataError
from ddpm_hf.data.image_dataset import ImageDataset
from ddpm_hf.data.labels import Labels
from ddpm_hf.diffusion.image_processor import to_unit_range

_MAX_VALUE = 1.001  # tolerates rounding errors
_NUM_RANGE_SAMPLES = 16


@runtime_checkable
class ImageSource(Protocol):
    """Training images by position.

    The image at a position never changes, so that a resumed run reads the same images.

    Attributes:
        num_images: N; None if unknown, as for a stream, which is then read at positions 0, 1, ...
        labels: class of each image, (N,), or None.
    """

    num_images: int | None
    labels: Labels | None

    def read(self, positions: Sequence[int], offsets: NDArray[np.float32]) -> Tensor:
        """Images at these positions, (B, C, H, W), float32 in [-1, 1], in new memory.

        Args:
            positions: position of each image, (B,).
            offsets: vertical and horizontal position of a crop in [0, 1), (B, 2); ignored by
                sources that do not crop.
        """


class MapStyleImages(Protocol):
    """A map-style dataset of float images in [-1, 1], (C, H, W); tensors and lists qualify."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


def image_source(images: ImageDataset | MapStyleImages | ImageSource) -> ImageSource:
    """The images as an `ImageSource`."""
    if isinstance(images, ImageDataset):
        return PreparedSource(images)
    return images if isinstance(images, ImageSource) else TensorSource(images)


class PreparedSource:
    """Source of prepared images; those prepared with crop="random" are cropped at the offsets."""

    def __init__(self, images: ImageDataset) -> None:
        self.images, self.labels = images, images.labels
        self.num_images: int | None = len(images)

    def read(self, positions: Sequence[int], offsets: NDArray[np.float32]) -> Tensor:
        """Images at these positions; see `ImageSource`."""
        crops = zip(positions, *offsets.T.tolist(), strict=True)
        return to_unit_range(torch.from_numpy(np.stack([self.images.window(*c) for c in crops])))


class TensorSource:
    """Source of float tensors, each checked when it is read."""

    labels: Labels | None = None

    def __init__(self, images: MapStyleImages) -> None:
        self.images = images
        self.num_images: int | None = len(images)
        self._shape: torch.Size | None = None  # of image 0, once it is read

    def read(self, positions: Sequence[int], offsets: NDArray[np.float32]) -> Tensor:
        """Images at these positions; see `ImageSource`.

        Raises:
            DataError: if an image cannot be read, or is not a float tensor in [-1, 1] of the shape
                of image 0; names its index.
        """
        x_0 = torch.stack([self.image(index) for index in positions]).to(torch.float32)
        low, high = torch.aminmax(x_0)  # NaN if x_0 contains NaN; then no comparison is true
        if not (low >= -_MAX_VALUE and high <= _MAX_VALUE):
            raise _out_of_range(positions, x_0)
        return x_0

    def seems_to_be_in_0_to_1(self, first: Tensor) -> bool:
        """Whether the first image, and then a sample of all images, has no negative value."""
        if first.min() < 0 or first.max() == 0:
            return False
        count = len(self.images)
        sample = range(0, count, -(-count // _NUM_RANGE_SAMPLES))
        return bool(self.read(sample, np.zeros((len(sample), 2), np.float32)).min() >= 0)

    def image(self, index: int) -> Tensor:
        """The image at an index, (C, H, W), of its own type.

        Raises:
            DataError: as `read`, except for values outside [-1, 1].
        """
        try:
            image = self.images[index]
        except (DataError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DataError(f"image {index} cannot be read: {reason}") from error
        self._check(index, image)
        return image

    def _check(self, index: int, image: Any) -> None:
        if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim != 3:
            is_tensor = isinstance(image, Tensor)
            kind = f"{image.dtype} {tuple(image.shape)}" if is_tensor else type(image).__name__
            raise DataError(f"images must be float tensors (C, H, W), image {index} is {kind}")
        if self._shape is None:
            self._shape = image.shape
        if image.shape != self._shape:
            raise DataError(
                f"images must have one shape, image {index} has {tuple(image.shape)}, but image 0"
                f" {tuple(self._shape)}"
            )


def _out_of_range(positions: Sequence[int], x_0: Tensor) -> DataError:
    """The error that names the first image with a value outside [-1, 1]."""
    lows, highs = torch.aminmax(x_0.flatten(1), dim=1)
    first = int((~((lows >= -_MAX_VALUE) & (highs <= _MAX_VALUE))).nonzero()[0])
    values = f"{lows[first]:g}..{highs[first]:g}"
    return DataError(f"images must be in [-1, 1], image {positions[first]} has {values}")
