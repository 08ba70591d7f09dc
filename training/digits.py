"""The 1,797 handwritten digits of scikit-learn as images, and a judge of drawn ones.

They have 8x8 pixels of 17 grey levels, 0 to 16, which survive the way to 8-bit images and back.
"""

from typing import Any

import datasets
import numpy as np
from PIL import Image
from sklearn.calibration import CalibratedClassifierCV
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC

SURE = 0.9  # a digit counts as recognised when the classifier gives its answer this probability
MOST_POINTS_APART, LEAST_SHARE_OF_A_DIGIT = 0.10, 0.03


def to_images(values: np.ndarray) -> list[Image.Image]:
    """Digits (N, 64) with values 0..16 as 8-bit grey images of 8x8."""
    pixels = (values * 255 / 16).round().astype(np.uint8).reshape(-1, 8, 8)
    return [Image.fromarray(image) for image in pixels]


def to_values(images: list[Image.Image]) -> np.ndarray:
    """The way back: (N, 64), 0..16, no longer whole numbers for drawn digits."""
    return np.stack([np.asarray(image) for image in images]).reshape(-1, 64) * (16 / 255)


def as_dataset(images: list[Image.Image]) -> datasets.Dataset:
    """Images as a Hugging Face data set, as they come from the Hub or from a folder."""
    return datasets.Dataset.from_dict(
        {"image": images}, features=datasets.Features({"image": datasets.Image()})
    )


def fit_judge(values: np.ndarray, labels: np.ndarray) -> CalibratedClassifierCV:
    """A classifier whose probabilities mean what they say (temperature scaling, 1706.04599)."""
    svm = SVC(C=10, gamma="scale")
    return CalibratedClassifierCV(svm, method="temperature", cv=5).fit(values, labels)


def judge(classifier: Any, values: np.ndarray, known: np.ndarray) -> dict[str, Any]:
    """What the classifier makes of digits, and how far they are from the digits trained on."""
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
    """What is wrong with the drawn digits; empty if they are as recognisable as real ones."""
    wrong = []
    if abs(drawn["recognised"] - real["recognised"]) > MOST_POINTS_APART:
        wrong.append(
            f"{drawn['recognised']:.1%} are recognised, of the real ones {real['recognised']:.1%}: "
            f"more than {MOST_POINTS_APART:.0%} apart"
        )
    rare = [n for n, share in enumerate(drawn["share_of_digit"]) if share < LEAST_SHARE_OF_A_DIGIT]
    if rare:
        digits = ", ".join(map(str, rare))
        wrong.append(f"fewer than {LEAST_SHARE_OF_A_DIGIT:.0%} of the drawn digits are a {digits}")
    return wrong


def side_by_side(drawn: dict[str, Any], real: dict[str, Any]) -> str:
    """The two results as a table."""
    rows = [
        ("", "drawn", "real, held out"),
        ("digits", drawn["count"], real["count"]),
        (f"recognised (p >= {SURE})", f"{drawn['recognised']:.1%}", f"{real['recognised']:.1%}"),
        (
            "distance to the nearest digit trained on",
            f"{drawn['distance_to_training']:.2f}",
            f"{real['distance_to_training']:.2f}",
        ),
    ]
    shares = zip(drawn["share_of_digit"], real["share_of_digit"], strict=True)
    rows += [(f"named {n}", f"{a:.1%}", f"{b:.1%}") for n, (a, b) in enumerate(shares)]
    return "\n".join(f"  {name:42}{a:>8}{b:>17}" for name, a, b in rows)
