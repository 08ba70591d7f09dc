"""Training set: images as the network sees them, augmented as a function of position."""

import signal
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from ddpm_hf.data.errors import DataError
from ddpm_hf.data.image_dataset import ImageDataset
from ddpm_hf.data.image_order import ShardOrder
from ddpm_hf.data.image_source import ImageSource, MapStyleImages, TensorSource, image_source
from ddpm_hf.diffusion.image_format import pad_edges, padded_size


class TrainingImages(torch.utils.data.Dataset[Any]):
    """Images as the network sees them: `training[epoch, index]` is float32 (C, H, W) in [-1, 1].

    If the source has labels, an item is a pair of image and class (int, -1 without label).

    Flips and crops are functions of (seed, epoch, index), independent of the number of workers and
    of resuming. The image is then padded to a multiple of `size_multiple` by replicating its edges;
    the native window starts at (padded - native) // 2.

    Args:
        images: result of `prepare_images`, a map-style dataset of float tensors (C, H, W) in
            [-1, 1], or an `ImageSource`.
        seed: seed of the augmentation, at least 0.
        random_flip: mirror each image horizontally with probability 1/2.
        size_multiple: divisor of the padded height and width, at least 1.

    Warns if tensors seem to be in [0, 1].

    Raises:
        DataError: if there are no images, or the first one is not a float tensor in [-1, 1].
            Other images are checked when they are read.
        ValueError: if `seed` or `size_multiple` is too small.

    Attributes:
        source: the images by position.
        labels: class of each image, (N,), or None.
        shape: padded shape of an image, (C, H, W).
        order: order of the images of a stream; None for a permutation of all images in each epoch.
    """

    order: ShardOrder | None = None

    def __init__(
        self,
        images: ImageDataset | MapStyleImages | ImageSource,
        *,
        seed: int = 0,
        random_flip: bool = False,
        size_multiple: int = 1,
    ) -> None:
        if seed < 0 or size_multiple < 1:
            raise ValueError(
                "`seed` must be at least 0 and `size_multiple` at least 1, got"
                f" {seed} and {size_multiple}"
            )
        self.images = images
        self.source = image_source(images)
        if self.source.num_images == 0:
            raise DataError("there are no images")
        self.labels = self.source.labels
        self.seed = seed
        self.random_flip = random_flip
        self.size_multiple = size_multiple
        self._draws: dict[int, NDArray[np.float32]] = {}
        first = self._first_image()
        if isinstance(self.source, TensorSource) and self.source.seems_to_be_in_0_to_1(first):
            warnings.warn(
                "the images seem to be in [0, 1], but must be in [-1, 1]: pass x * 2 - 1",
                stacklevel=2,
            )
        self.shape = tuple(_pad_to_multiple(first, size_multiple).shape[1:])

    def _first_image(self) -> Tensor:
        return self.source.read([0], np.zeros((1, 2), np.float32))

    def __len__(self) -> int:
        if self.source.num_images is None:
            raise TypeError("a stream of images has no length")
        return self.source.num_images

    def __getitem__(self, position: tuple[int, int]) -> Any:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[tuple[int, int]]) -> list[Any]:
        """A batch, for `DataLoader`; many times faster than single images."""
        indices = [index for _, index in positions]
        draws = np.stack([self._draws_of(epoch, index) for epoch, index in positions])  # (B, 3)
        x_0, labels = self._read(indices, draws[:, 1:])
        if self.random_flip:
            is_flipped = torch.from_numpy(draws[:, 0] < 0.5)
            x_0[is_flipped] = x_0[is_flipped].flip(-1)
        padded = list(_pad_to_multiple(x_0, self.size_multiple))
        return padded if labels is None else list(zip(padded, labels, strict=True))

    def unaugmented(self, indices: Sequence[int]) -> Tensor:
        """Images without flips and padding, cropped at the centre, (B, C, H, W)."""
        return self.source.read(indices, np.full((len(indices), 2), 0.5, np.float32))

    def dataset_index(self, index: int) -> int:
        """Index of an image in the dataset, which may have more images."""
        return index

    def _read(
        self, indices: Sequence[int], offsets: NDArray[np.float32]
    ) -> tuple[Tensor, list[int] | None]:
        """Images, in new memory, and their classes if the source has labels."""
        labels = None if self.labels is None else self.labels[indices].tolist()
        return self.source.read(indices, offsets), labels

    def _draws_of(self, epoch: int, index: int) -> NDArray[np.float32]:
        """Uniform numbers in [0, 1) of an image in an epoch: flip, top and left, (3,)."""
        if self.source.num_images is None:
            return np.random.default_rng((self.seed, epoch, index)).random(3, np.float32)
        if epoch not in self._draws:
            previous = list(self._draws.items())[-1:]  # a batch may span two epochs
            drawn = np.random.default_rng((self.seed, epoch)).random((len(self), 3), np.float32)
            self._draws = dict([*previous, (epoch, drawn)])
        draws: NDArray[np.float32] = self._draws[epoch][index]
        return draws


class Selection(torch.utils.data.Dataset[Any]):
    """A subset of training images, renumbered from 0; see `TrainingImages`."""

    order = None

    def __init__(self, images: TrainingImages, indices: Sequence[int]) -> None:
        self.images, self.indices = images, indices
        self.source, self.shape = images.source, images.shape
        self.labels = None if images.labels is None else images.labels[list(indices)]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: tuple[int, int]) -> Any:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[tuple[int, int]]) -> list[Any]:
        """A batch, for `DataLoader`."""
        return self.images.__getitems__([(epoch, self.indices[i]) for epoch, i in positions])

    def unaugmented(self, indices: Sequence[int]) -> Tensor:
        """Images without flips and padding, cropped at the centre, (B, C, H, W)."""
        return self.images.unaugmented([self.indices[i] for i in indices])

    def dataset_index(self, index: int) -> int:
        """Index of an image in the dataset."""
        return self.images.dataset_index(self.indices[index])


def read_batches(loader: DataLoader[Any]) -> Generator[Any]:
    """Iterate over the batches of a loader over `TrainingImages`; errors name the rows.

    A batch is images (B, C, H, W), or a pair of images and classes (B,) if there are labels.

    Args:
        loader: loader with a batch sampler that yields the same batches on every iteration.
    Raises:
        DataError: if an image cannot be read, or a worker process was killed.
    """
    batches = _iterate(loader)
    for number in count():
        try:
            batch = next(batches, None)
        except DataError as error:
            if "Original Traceback" not in str(error):
                raise
            # torch prepends the traceback of the worker to its message.
            raise DataError(str(error).strip().splitlines()[-1].split(": ", 1)[1]) from error
        except (RuntimeError, OSError, EOFError) as error:
            # The connection breaks if a worker is killed while it sends a batch.
            is_killed = not isinstance(error, RuntimeError) or "DataLoader worker (" in str(error)
            if not (loader.num_workers and is_killed):
                raise
            sampler: Any = loader.batch_sampler
            positions = next(islice(iter(sampler), number, None))
            raise DataError(
                f"a process that reads images ended while rows {_rows(positions)} were due: {error}"
            ) from error
        if batch is None:
            return
        yield batch


def _iterate(loader: DataLoader[Any]) -> Iterator[Any]:
    """`iter(loader)`, reporting a killed worker only when the next batch is requested.

    torch's SIGCHLD handler would raise at once, possibly in the middle of an update.
    """
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    batches = iter(loader)
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    return batches


def _rows(positions: Sequence[tuple[int, int]]) -> str:
    rows = [str(index) for _, index in positions]
    return ", ".join(rows[:8]) + ", ..." * (len(rows) > 8)


def _pad_to_multiple(x_0: Tensor, multiple: int) -> Tensor:
    return pad_edges(x_0, padded_size(x_0.shape[-2:], multiple))
