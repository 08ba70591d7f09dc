"""Training images nearest to a picture: is it a copy?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ddpm_hf.app.served_models import ServedModel
from ddpm_hf.data import DataError, load_images
from ddpm_hf.data.training_dataset import TrainingImages
from ddpm_hf.evaluation.model_images import facts_of, prepared_like
from ddpm_hf.pictures import Pixels

MAX_VALUES = 2**28  # of all images, one byte each
NUM_REFERENCES = 256


@dataclass(frozen=True)
class NearImage:
    """A training image near a picture.

    Attributes:
        row: its row in the dataset.
        distance: root mean squared difference of the pixels, in units of the range.
        image: (H, W, C) in [0, 1].
    """

    row: int
    distance: float
    image: Pixels


@dataclass(frozen=True)
class TrainingSet:
    """Training images of a model.

    Attributes:
        pixels: (N, C, H, W) uint8.
        own_distances: distance of some training images to their nearest other one.
    """

    pixels: Tensor
    own_distances: Tensor

    @classmethod
    def load(cls, model: ServedModel, dataset: str, split: str = "train") -> "TrainingSet":
        """The images of a dataset in the format of a model.

        Args:
            model: the model.
            dataset: folder, files or name, as for training.
            split: its split.
        Raises:
            DataError: if the images cannot be read, do not fit the model, or are too many.
        """
        images = TrainingImages(
            prepared_like(facts_of(model.pipeline.unet), load_images(dataset, split=split))
        )
        width, height = model.size
        values_per_image = width * height * model.pipeline.unet.config.in_channels
        if (size := len(images) * values_per_image) > MAX_VALUES:
            raise DataError(f"`data` has {size:,} pixel values, more than {MAX_VALUES:,}")
        rows = range(len(images))
        pixels = torch.cat([
            _bytes(torch.stack(images.__getitems__([(0, row) for row in rows[i : i + 256]])))
            for i in rows[::256]
        ])  # fmt: skip
        some = torch.linspace(0, len(pixels) - 1, min(len(pixels), NUM_REFERENCES)).long()
        distances = _distances(pixels[some], pixels)
        distances[torch.arange(len(some)), some] = torch.inf
        return cls(pixels, distances.min(1).values)

    def nearest(self, model: ServedModel, picture: Image.Image, count: int) -> list[NearImage]:
        """The nearest images, the nearest first."""
        x_0 = model.pipeline.encode_images(picture).cpu()
        height, width = self.pixels.shape[-2:]
        top, left = (x_0.shape[-2] - height) // 2, (x_0.shape[-1] - width) // 2
        window = x_0[..., top : top + height, left : left + width]
        distances = _distances(_bytes(window), self.pixels)[0]
        values, rows = distances.topk(min(count, len(distances)), largest=False)
        images = self.pixels[rows].permute(0, 2, 3, 1).float().numpy() / 255
        found = zip(rows.tolist(), values.tolist(), images, strict=True)
        return [NearImage(*near) for near in found]

    def share_closer(self, distance: float) -> float:
        """Share of training images that are closer than this to their nearest other one."""
        return (self.own_distances < distance).float().mean().item()


def _bytes(x_0: Tensor) -> Tensor:
    return ((x_0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Root mean squared differences in units of the range, (len(a), len(b))."""
    x, y = (z.flatten(1).float() / 255 for z in (a, b))
    distances: Tensor = torch.cdist(x, y) / x.shape[1] ** 0.5
    return distances


def training_sets(
    models: Sequence[ServedModel], dataset: str, split: str
) -> dict[str, TrainingSet]:
    """Training images by the name of the model, for the models that they fit.

    Raises:
        DataError: if they fit none.
    """
    sets: dict[str, TrainingSet] = {}
    problems: list[DataError] = []
    for model in models:
        try:
            sets[model.name] = TrainingSet.load(model, dataset, split)
        except DataError as error:
            problems.append(error)
    if not sets:
        raise problems[0]
    return sets
