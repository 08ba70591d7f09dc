"""The pixel faces in faces16/, and measures of drawn faces by what is known about the data.

A face combines parts in colours of a palette; every part and its colour is a column of the data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.neighbors import NearestNeighbors

FOLDER = Path(__file__).parent / "faces16"
CLASS = "hair_color"
COMBINED = ("hair", "hairColor", "skinColor")  # 3,960 combinations, 2,817 of them in train
NEAR = 8  # a pixel has a colour of the palette if each channel is at most this far from it, of 255
MOST_POINTS_BELOW = 0.10
NUM_TREES = 100


def load_faces() -> datasets.DatasetDict:
    """The splits train and test, with a column for each factor."""
    files = {split: str(FOLDER / f"{split}.parquet") for split in ("train", "test")}
    return datasets.load_dataset("parquet", data_files=files)


def to_pixels(images: Sequence[Image.Image]) -> np.ndarray:
    """Faces as pixels, (N, 16, 16, 3) uint8."""
    return np.stack([np.asarray(image) for image in images])


@dataclass(frozen=True)
class Scores:
    """Measures of a set of faces.

    Attributes:
        count: number of faces.
        as_asked: share of faces whose hair has the colour asked for, by a classifier.
        of_class: the same for each class.
        palette_pixels: share of pixels with a colour of the palette.
        palette_faces: share of faces all of whose pixels have one.
        new_combinations: share of faces with a hair style, hair colour and skin colour that no
            training face combines, by a classifier of each.
        copies: number of faces that equal a training face after rounding to the palette.
    """

    count: int
    as_asked: float
    of_class: dict[str, float]
    palette_pixels: float
    palette_faces: float
    new_combinations: float
    copies: int


class Judge:
    """Measures faces by what real ones have in common.

    Args:
        faces: training faces. Classifiers of the factors are fitted to them; their colours are the
            palette.
    """

    def __init__(self, faces: datasets.Dataset) -> None:
        pixels = to_pixels(faces["image"])
        self.class_names = faces.features[CLASS].names
        self._palette = np.unique(pixels.reshape(-1, 3), axis=0)
        self._colors = NearestNeighbors(n_neighbors=1, metric="chebyshev").fit(self._palette)
        self._known = {face.tobytes() for face in pixels}
        self._combinations = set(zip(*(faces[name] for name in COMBINED), strict=True))
        self._classifiers = {
            name: ExtraTreesClassifier(NUM_TREES, random_state=0, n_jobs=-1).fit(
                _features(pixels), faces[name]
            )
            for name in (CLASS, *COMBINED)
        }

    def __call__(self, images: Sequence[Image.Image], asked: Sequence[int]) -> Scores:
        """Measure faces.

        Args:
            images: faces.
            asked: class number of each.
        """
        rounded, is_near = self._rounded(to_pixels(images))
        features = _features(rounded)
        named = {name: tree.predict(features) for name, tree in self._classifiers.items()}
        is_right = named[CLASS] == np.asarray(asked)
        combinations = zip(*(named[name] for name in COMBINED), strict=True)
        return Scores(
            count=len(images),
            as_asked=float(is_right.mean()),
            of_class={
                name: float(is_right[np.asarray(asked) == number].mean())
                for number, name in enumerate(self.class_names)
                if number in asked
            },
            palette_pixels=float(is_near.mean()),
            palette_faces=float(is_near.all(axis=1).mean()),
            new_combinations=float(np.mean([c not in self._combinations for c in combinations])),
            copies=sum(face.tobytes() in self._known for face in rounded),
        )

    def _rounded(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels rounded to the palette, and which were near it, (N, 256)."""
        colors, inverse = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
        distances, nearest = self._colors.kneighbors(colors)
        rounded = self._palette[nearest[:, 0]][inverse].reshape(pixels.shape)
        return rounded, (distances[:, 0] <= NEAR)[inverse].reshape(len(pixels), -1)


def _features(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(len(pixels), -1)


def shortcomings(drawn: Scores, real: Scores) -> list[str]:
    """Reasons why drawn faces are not as good as real ones; empty if they are."""
    if real.as_asked - drawn.as_asked <= MOST_POINTS_BELOW:
        return []
    return [
        f"{drawn.as_asked:.1%} of the drawn faces have the hair colour asked for and "
        f"{real.as_asked:.1%} of the real ones: more than {MOST_POINTS_BELOW:.0%} fewer"
    ]


def table(drawn: Scores, real: Scores) -> str:
    """The scores of drawn and of held-out faces side by side."""
    rows = [
        ("", "drawn", "held out"),
        ("faces", f"{drawn.count:,}", f"{real.count:,}"),
        ("hair as asked, by a classifier", f"{drawn.as_asked:.1%}", f"{real.as_asked:.1%}"),
        *(
            (f"  {name}", f"{share:.1%}", f"{real.of_class[name]:.1%}")
            for name, share in drawn.of_class.items()
        ),
        (
            "pixels in a colour of the palette",
            f"{drawn.palette_pixels:.1%}",
            f"{real.palette_pixels:.1%}",
        ),
        (
            "faces in colours of the palette only",
            f"{drawn.palette_faces:.1%}",
            f"{real.palette_faces:.1%}",
        ),
        (
            "new combinations of hair style, hair and skin colour",
            f"{drawn.new_combinations:.1%}",
            f"{real.new_combinations:.1%}",
        ),
        ("copies of a training face", f"{drawn.copies}", f"{real.copies}"),
    ]
    return "\n".join(f"  {name:54}{a:>8}{b:>11}" for name, a, b in rows)
