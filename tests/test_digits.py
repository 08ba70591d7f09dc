"""training/digits.py: the digits of scikit-learn as images, and their classifier."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

from ddpm_hf.data import prepare_images

PATH = Path(__file__).parents[1] / "training" / "digits.py"


@pytest.fixture(scope="module")
def digits():
    spec = importlib.util.spec_from_file_location("digits", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_images_represent_every_digit_exactly(digits):
    values = load_digits().data
    pixels = np.stack([np.asarray(image) for image in digits.to_images(values)])
    back = pixels.reshape(-1, 64) * (16 / 255)
    np.testing.assert_array_equal(back.round(), values)
    # A level is 255/16 grey values wide: rounding changes it by at most 0.5 * 16/255.
    assert np.abs(back - values).max() <= 8 / 255


def test_the_digits_are_prepared_as_8_bit_greyscale_images_of_8x8(digits, tmp_path):
    images = digits.to_images(load_digits().data[:20])
    prepared = prepare_images(digits.as_dataset(images), cache_dir=tmp_path, progress=False)
    assert (prepared.facts.mode, prepared.facts.height, prepared.facts.width) == ("L", 8, 8)
    for index, image in enumerate(images):
        np.testing.assert_array_equal(prepared[index][0].numpy(), np.asarray(image))


@pytest.mark.slow
def test_the_probabilities_of_the_classifier_are_calibrated(digits):
    values, labels = load_digits(return_X_y=True)
    known, held_out, known_labels, held_out_labels = train_test_split(
        values, labels, test_size=0.2, stratify=labels, random_state=0
    )
    probabilities = digits.fit_judge(known, known_labels).predict_proba(held_out)
    right = probabilities.argmax(1) == held_out_labels
    # 99% of 360 digits are right, with a standard error of 0.5%.
    assert right.mean() > 0.97
    assert abs(probabilities.max(1).mean() - right.mean()) < 0.02
    assert log_loss(held_out_labels, probabilities) < 0.1
