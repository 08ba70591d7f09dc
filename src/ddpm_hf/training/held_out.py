"""Images that are measured and not trained on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_hf.data import TrainingImages
from ddpm_hf.randomness import seed_of


class Selection(torch.utils.data.Dataset[Tensor]):
    """Some of the training images, under numbers of their own."""

    def __init__(self, images: TrainingImages, indices: Sequence[int]) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: tuple[int, int]) -> Tensor:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[tuple[int, int]]) -> list[Tensor]:
        """A batch at once, for `DataLoader`."""
        return self.images.__getitems__([(epoch, self.indices[i]) for epoch, i in positions])


def hold_out(images: TrainingImages, share: float, seed: int) -> tuple[Selection, Selection]:
    """The images to train on, and a share of them, drawn by the seed, that is held out."""
    generator = torch.Generator().manual_seed(seed_of(seed, "validation"))
    order: list[int] = torch.randperm(len(images), generator=generator).tolist()
    count = max(1, round(share * len(images)))
    return Selection(images, sorted(order[count:])), Selection(images, sorted(order[:count]))


HeldOut = Selection | TrainingImages


def validation_share(text: str | None) -> float | None:
    """The share of the training images that `validation_split` names, or None if it is a split."""
    try:
        return float(text or "")
    except ValueError:
        return None
