"""Index of a stream: its shards, with their numbers of images and labels."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import PurePosixPath

import numpy as np

from ddpm_hf.data.labels import Labels


@dataclass(frozen=True)
class Shard:
    """A file with images.

    Attributes:
        location: path or URL.
        num_rows: number of images.
        num_bytes: size of the file.
        modified: modification time of a local file in ns; 0 for a URL.
    """

    location: str
    num_rows: int
    num_bytes: int
    modified: int = 0

    @property
    def name(self) -> str:
        """The name of the file."""
        return PurePosixPath(self.location).name


@dataclass(frozen=True)
class ShardIndex:
    """The shards of a stream; images are numbered through all of them.

    Attributes:
        shards: in the order of their names, without empty ones.
        column: image column of parquet files; "" for .tar files.
        labels: class of each image, (N,); None if not requested.
        class_names: names of the classes, if known.
    """

    shards: tuple[Shard, ...]
    column: str = ""
    labels: Labels | None = field(default=None, compare=False, repr=False)
    class_names: tuple[str, ...] | None = field(default=None, compare=False, repr=False)

    @cached_property
    def starts(self) -> list[int]:
        """Index of the first image of each shard, and the number of all images."""
        return [0, *accumulate(shard.num_rows for shard in self.shards)]

    @property
    def num_images(self) -> int:
        """Number of images in all shards."""
        return self.starts[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """Shard and row of an image."""
        shard = bisect_right(self.starts, index) - 1
        return shard, index - self.starts[shard]

    def select(self, numbers: Sequence[int]) -> "ShardIndex":
        """Some of the shards."""
        labels = self.labels
        if labels is not None:
            parts = [labels[self.starts[n] : self.starts[n + 1]] for n in numbers]
            labels = np.concatenate(parts)
        shards = tuple(self.shards[number] for number in numbers)
        return ShardIndex(shards, self.column, labels, self.class_names)

    @property
    def digest(self) -> str:
        """Hash of names, sizes, rows and labels of the shards, independent of their locations."""
        facts = [(shard.name, shard.num_rows, shard.num_bytes) for shard in self.shards]
        sums = hashlib.sha256(repr((self.column, facts)).encode())
        sums.update(b"" if self.labels is None else self.labels.tobytes())
        return sums.hexdigest()[:16]
