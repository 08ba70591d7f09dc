"""The training set: prepared images as the network sees them, augmented by position."""

import signal
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from itertools import count, islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ddpm_hf.data.errors import DataError
from ddpm_hf.data.image_dataset import ImageDataset
from ddpm_hf.diffusion.image_processor import centred_window, padded_size

_NUM_LOOKED_AT = 16
_LARGEST = 1.001  # a rounding error is none of our business, 0..255 is


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 or uint16 as float32 in [-1, 1]: 0 gives -1, 255 or 65535 gives 1."""
    if pixels.dtype == torch.uint8:
        return pixels.to(torch.float32).div_(127.5).sub_(1)
    if pixels.dtype == torch.uint16:
        return pixels.to(torch.float32).div_(32767.5).sub_(1)
    raise TypeError(f"pixels must be uint8 or uint16, got {pixels.dtype}")


class Images(Protocol):
    """Any sequence of float images in [-1, 1], (C, H, W)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


class TrainingImages(torch.utils.data.Dataset[Any]):
    """What the network sees: `training[epoch, index]` is a float32 image (C, H, W) in [-1, 1].

    Where the images were prepared with their labels it is the pair of that image and its class, an
    int, -1 where it has none.

    Flips and crops are drawn from (seed, epoch, index) alone, so that neither the number of
    workers nor a resumed run changes them. Then the image is padded at its edges, replicated, to a
    multiple of `size_multiple`: the native window starts at (padded - native) // 2.

    Args:
        images: of `prepare_images`, or any sequence of float tensors (C, H, W) in [-1, 1].
        seed: of the augmentation, at least 0.
        random_flip: mirror every second image or so, left to right.
        size_multiple: of height and width, at least 1.

    Warns where tensors seem to lie in [0, 1].

    Raises:
        DataError: if there are no images, or they are not float tensors in [-1, 1] of one shape:
            of the first ones here, of each as it is read, with its index.
        ValueError: if seed or size_multiple is too small.
    """

    def __init__(
        self,
        images: ImageDataset | Images,
        *,
        seed: int = 0,
        random_flip: bool = False,
        size_multiple: int = 1,
    ) -> None:
        if seed < 0 or size_multiple < 1:
            raise ValueError(f"seed >= 0 and size_multiple >= 1, got {seed} and {size_multiple}")
        if len(images) == 0:
            raise DataError("there are no images")
        self.images = images
        self.labels = images.labels if isinstance(images, ImageDataset) else None
        self.seed = seed
        self.random_flip = random_flip
        self.size_multiple = size_multiple
        self._draws: dict[int, NDArray[np.float32]] = {}
        self._native_shape: torch.Size | None = None
        first = self._load([0], np.zeros((1, 3), np.float32))
        if not isinstance(images, ImageDataset) and self._seem_to_lie_in_0_to_1(first):
            warnings.warn(
                "the values of the images seem to lie in [0, 1]; black is -1 here: give x * 2 - 1",
                stacklevel=2,
            )
        self.shape = tuple(_pad_to_multiple(first, size_multiple).shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: tuple[int, int]) -> Any:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[tuple[int, int]]) -> list[Any]:
        """A batch at once, for `DataLoader`: many times faster than one by one."""
        draws = np.stack([self._draws_of(epoch)[index] for epoch, index in positions])  # (B, 3)
        x_0 = self._load([index for _, index in positions], draws)
        if self.random_flip:
            is_flipped = torch.from_numpy(draws[:, 0] < 0.5)
            x_0[is_flipped] = x_0[is_flipped].flip(-1)
        padded = list(_pad_to_multiple(x_0, self.size_multiple))
        if self.labels is None:
            return padded
        labels = self.labels[[index for _, index in positions]].tolist()
        return list(zip(padded, labels, strict=True))

    def _draws_of(self, epoch: int) -> NDArray[np.float32]:
        """Flip, top and left of all images in an epoch, (N, 3) in [0, 1)."""
        if epoch not in self._draws:
            recent = list(self._draws.items())[-1:]  # a batch may touch two epochs
            drawn = np.random.default_rng((self.seed, epoch)).random((len(self), 3), np.float32)
            self._draws = dict([*recent, (epoch, drawn)])
        return self._draws[epoch]

    def _load(self, indices: Sequence[int], draws: NDArray[np.float32]) -> Tensor:
        """Images as float32 (B, C, H, W), not yet flipped or padded."""
        if isinstance(self.images, ImageDataset):
            places = zip(indices, draws[:, 1].tolist(), draws[:, 2].tolist(), strict=True)
            pixels = np.stack([self.images.window(*place) for place in places])
            return to_unit_range(torch.from_numpy(pixels))
        x_0 = torch.stack([self._read(index) for index in indices]).to(torch.float32)
        low, high = torch.aminmax(x_0)  # NaN where one is in x_0, which no comparison holds for
        if not (low >= -_LARGEST and high <= _LARGEST):
            raise _out_of_range(indices, x_0)
        return x_0

    def _seem_to_lie_in_0_to_1(self, first: Tensor) -> bool:
        """Whether the first image has no value below 0, and some others, spread evenly, neither."""
        if first.min() < 0 or first.max() == 0:
            return False
        some = range(0, len(self), -(-len(self) // _NUM_LOOKED_AT))
        return bool(self._load(some, np.zeros((len(some), 3), np.float32)).min() >= 0)

    def _read(self, index: int) -> Tensor:
        try:
            image = self.images[index]
        except (DataError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DataError(f"image {index} cannot be read: {reason}") from error
        self._check_image(index, image)
        return image

    def _check_image(self, index: int, image: Any) -> None:
        if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim != 3:
            is_tensor = isinstance(image, Tensor)
            kind = f"{image.dtype} {tuple(image.shape)}" if is_tensor else type(image).__name__
            raise DataError(f"images must be float tensors (C, H, W), image {index} is {kind}")
        if self._native_shape is None:
            self._native_shape = image.shape
        expected = self._native_shape
        if image.shape != expected:
            shapes = f"{tuple(image.shape)}, but image 0 {tuple(expected)}"
            raise DataError(f"images must have one shape, image {index} has {shapes}")


def _out_of_range(indices: Sequence[int], x_0: Tensor) -> DataError:
    """The error that names the first image with a value outside of [-1, 1]."""
    lows, highs = torch.aminmax(x_0.flatten(1), dim=1)
    first = int((~((lows >= -_LARGEST) & (highs <= _LARGEST))).nonzero()[0])
    found = f"{lows[first]:g}..{highs[first]:g}"
    return DataError(f"images must be in [-1, 1], image {indices[first]} has {found}")


def read_batches(loader: DataLoader[Any]) -> Generator[Any]:
    """The batches of a loader over `TrainingImages`; an error names the rows.

    A batch is images (B, C, H, W), or, where they have labels, these and their classes (B,).

    Args:
        loader: with a batch sampler that gives the same batches again.
    Raises:
        DataError: if an image cannot be read, or a process that reads them was killed.
    """
    batches = _iterate(loader)
    for number in count():
        try:
            batch = next(batches, None)
        except DataError as error:
            if "Original Traceback" not in str(error):
                raise
            # torch puts the traceback of the worker before its message.
            raise DataError(str(error).strip().splitlines()[-1].split(": ", 1)[1]) from error
        except (RuntimeError, OSError, EOFError) as error:
            # Where it dies while it hands a batch over, the connection breaks.
            is_killed = not isinstance(error, RuntimeError) or "DataLoader worker (" in str(error)
            if not (loader.num_workers and is_killed):
                raise
            sampler: Any = loader.batch_sampler
            positions = next(islice(iter(sampler), number, None))
            raise DataError(
                f"a process that reads images ended while rows {_few(positions)} were due: {error}"
            ) from error
        if batch is None:
            return
        yield batch


def _iterate(loader: DataLoader[Any]) -> Iterator[Any]:
    """`iter(loader)`, which tells of a killed worker when the next batch is asked for.

    torch tells of it at once, by a handler of SIGCHLD: an exception in the midst of anything, of an
    update that is half made.
    """
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    batches = iter(loader)
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    return batches


def _few(positions: Sequence[tuple[int, int]]) -> str:
    rows = [str(index) for _, index in positions]
    return ", ".join(rows[:8]) + ", ..." * (len(rows) > 8)


def _pad_to_multiple(x_0: Tensor, multiple: int) -> Tensor:
    """Replicate the edges of (B, C, H, W)."""
    height, width = padded_size(x_0.shape[-2:], multiple)
    rows, columns = centred_window(x_0.shape[-2:], (height, width))
    if (height, width) == x_0.shape[-2:]:
        return x_0
    around = (columns.start, width - columns.stop, rows.start, height - rows.stop)
    return F.pad(x_0, around, mode="replicate")
