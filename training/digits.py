"""The 1,797 handwritten digits of scikit-learn as images, and a classifier that scores samples.

The digits have 8x8 pixels with 17 grey levels, 0 to 16, which 8-bit images represent exactly.
"""

from typing import Any

import datasets
import numpy as np
from PIL import Image
from sklearn.calibration import CalibratedClassifierCV
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC

SURE = 0.9  # a digit is recognised if the probability of its most likely class is at least this
MOST_POINTS_APART, LEAST_SHARE_OF_A_DIGIT = 0.10, 0.03


def to_images(values: np.ndarray) -> list[Image.Image]:
    """Convert digits, (N, 64) with values 0 to 16, to 8-bit greyscale images of 8x8 pixels."""
    pixels = (values * 255 / 16).round().astype(np.uint8).reshape(-1, 8, 8)
    return [Image.fromarray(image) for image in pixels]


def to_values(images: list[Image.Image]) -> np.ndarray:
    """Convert images to digits: (N, 64) with values 0 to 16, not integers for samples."""
    return np.stack([np.asarray(image) for image in images]).reshape(-1, 64) * (16 / 255)


def as_dataset(images: list[Image.Image]) -> datasets.Dataset:
    """A Hugging Face dataset of the images."""
    return datasets.Dataset.from_dict(
        {"image": images}, features=datasets.Features({"image": datasets.Image()})
    )


def fit_judge(values: np.ndarray, labels: np.ndarray) -> CalibratedClassifierCV:
    """A classifier with calibrated probabilities (temperature scaling, 1706.04599)."""
    svm = SVC(C=10, gamma="scale")
    return CalibratedClassifierCV(svm, method="temperature", cv=5).fit(values, labels)


def judge(classifier: Any, values: np.ndarray, known: np.ndarray) -> dict[str, Any]:
    """Scores of digits: recognised share, share of each class, distance to the training digits."""
    probabilities = classifier.predict_proba(values)
    named = np.bincount(probabilities.argmax(1), minlength=10) / len(values)
    distances, _ = NearestNeighbors(n_neighbors=1).fit(known / 16).kneighbors(values / 16)
    return {
        "count": len(values),
        "recognised": float((probabilities.max(1) >= SURE).mean()),
        "share_of_digit": [round(float(share), 4) for share in named],
        "distance_to_training": float(np.median(distances)),
    }


def shortcomings(drawn: dict[str, Any], real: dict[str, Any]) -> list[str]:
    """Reasons why the samples are not as recognisable as real digits; empty if they are."""
    wrong = []
    if abs(drawn["recognised"] - real["recognised"]) > MOST_POINTS_APART:
        wrong.append(
            f"{drawn['recognised']:.1%} of the samples are recognised and {real['recognised']:.1%} "
            f"of the real digits: a difference of more than {MOST_POINTS_APART:.0%}"
        )
    rare = [n for n, share in enumerate(drawn["share_of_digit"]) if share < LEAST_SHARE_OF_A_DIGIT]
    if rare:
        digits = ", ".join(map(str, rare))
        wrong.append(f"fewer than {LEAST_SHARE_OF_A_DIGIT:.0%} of the samples are a {digits}")
    return wrong


def side_by_side(drawn: dict[str, Any], real: dict[str, Any]) -> str:
    """Table of the scores of samples and held-out digits."""
    rows = [
        ("", "samples", "held-out real"),
        ("digits", drawn["count"], real["count"]),
        (f"recognised (p >= {SURE})", f"{drawn['recognised']:.1%}", f"{real['recognised']:.1%}"),
        (
            "distance to the nearest training digit",
            f"{drawn['distance_to_training']:.2f}",
            f"{real['distance_to_training']:.2f}",
        ),
    ]
    shares = zip(drawn["share_of_digit"], real["share_of_digit"], strict=True)
    rows += [(f"classified as {n}", f"{a:.1%}", f"{b:.1%}") for n, (a, b) in enumerate(shares)]
    return "\n".join(f"  {name:42}{a:>8}{b:>17}" for name, a, b in rows)
