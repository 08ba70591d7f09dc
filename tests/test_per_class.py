"""Metrics per class, of labelled images and of a class-conditional model."""

import json

import numpy as np
import pytest
from checkpoints import SHORT_CHAIN, tiny_unet
from image_sets import folder_of
from image_zoo import encode

import ddpm_hf
from ddpm_hf import GaussianDDPMPipeline, GaussianDDPMScheduler
from ddpm_hf.cli import main
from ddpm_hf.data import ImageFacts
from ddpm_hf.evaluation import frechet_distance
from ddpm_hf.evaluation.results import Evaluation

NAMES = ("ant", "bee", "cow")
NUM = {"train": 14, "test": 10}
small_classes = pytest.mark.filterwarnings("ignore:3 of 3 classes have fewer than 100")
pytestmark = [pytest.mark.slow, small_classes]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def images_of(number, level, rng):
    """Grey images (N, 8, 8) around a level."""
    return rng.integers(level - 20, level + 20, (number, 8, 8), dtype=np.uint8)


@pytest.fixture(scope="module")
def pixels():
    """Images by split and class."""
    rng = np.random.default_rng(0)
    return {
        split: {name: images_of(num, 50 + 70 * i, rng) for i, name in enumerate(NAMES)}
        for split, num in NUM.items()
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory, pixels):
    files = {
        f"{split}/{name}/{i:02d}.png": encode(image)
        for split, of_split in pixels.items()
        for name, images in of_split.items()
        for i, image in enumerate(images)
    }
    return folder_of(tmp_path_factory.mktemp("photos"), files)


def flat(images):
    return np.repeat(images.reshape(len(images), 1, -1), 3, 1).reshape(len(images), -1) / 255


def test_each_class_is_measured_separately_and_the_worst_comes_first(
    tmp_path, pixels, photos, capsys
):
    rng = np.random.default_rng(1)
    # The bees look like cows, and there are few ants; drawn in turn.
    of = {0: images_of(3, 50, rng), 1: images_of(12, 190, rng), 2: images_of(12, 190, rng)}
    labels = np.array([0] * 3 + [1, 2] * 12)
    drawn = np.empty((27, 8, 8), np.uint8)
    for number, images in of.items():
        drawn[labels == number] = images
    np.savez(tmp_path / "drawn.npz", drawn[..., None], labels)
    how = ["--metrics", "fd", "precision-recall", "--features", "pixels", "--per-class"]
    drawn_file, output = str(tmp_path / "drawn.npz"), str(tmp_path / "out")
    assert main(["evaluate", drawn_file, str(photos), "--output", output, *how]) == 0
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    evaluation = Evaluation.from_dict(content)
    assert evaluation.to_dict() == content
    assert "--per-class" in evaluation.command.split()
    fd, precision, _ = evaluation.results
    rows = {row.class_name: row for row in fd.classes}
    assert next(iter(rows)) == "bee"
    assert rows["bee"].verdict == "worse"
    assert rows["cow"].verdict == "tie"
    assert (rows["ant"].value, rows["ant"].num_drawn) == (None, 3)
    assert (rows["cow"].num_drawn, rows["cow"].num_real) == (12, 14)
    for number, name in ((1, "bee"), (2, "cow")):
        want = frechet_distance(flat(pixels["train"][name]), flat(of[number]))
        assert rows[name].value == pytest.approx(want, rel=1e-5)  # the features are float32
        assert rows[name].floor_between == "training and held-out images"
    assert {row.class_name: row.value for row in precision.classes}["bee"] == 0
    of_class = {(row["name"], row["class"]): row["value"] for row in evaluation.rows()}
    assert of_class["fd", "cow"] == rows["cow"].value
    assert of_class["fd", None] == fd.value
    printed = capsys.readouterr().out
    assert "Frechet distance per class" in printed
    assert "(12 drawn, 14 real)" in printed
    assert "too few images: fd needs 4 of each" in printed


@pytest.mark.filterwarnings("ignore:`timestep_spacing`")
def test_a_model_draws_its_classes_in_turn_and_they_are_matched_by_name(tmp_path, photos):
    """Model and dataset number the classes differently."""
    unet = tiny_unet(in_channels=1, out_channels=1, num_class_embeds=4)
    facts = ImageFacts(mode="L", height=8, width=8, class_names=NAMES[::-1])
    unet.register_to_config(_ddpm_hf=facts.to_config())
    pipeline = GaussianDDPMPipeline(unet, GaussianDDPMScheduler(**SHORT_CHAIN))
    options = {"metrics": ["fd"], "features": "pixels", "num_images": 14, "per_class": True,
               "num_inference_steps": 2, "progress": False}  # fmt: skip
    with pytest.warns(UserWarning, match="3 of 3 classes have fewer than 100 real or drawn images"):
        (fd,) = ddpm_hf.evaluate(pipeline, photos, **options).results
    assert {row.class_name: row.num_drawn for row in fd.classes} == dict(
        zip(NAMES[::-1], (5, 5, 4), strict=True)
    )


def test_images_without_common_classes_are_rejected(photos, pixels, tmp_path):
    drawn, options = pixels["test"]["ant"], {"metrics": ["fd"], "features": "pixels"}
    for labels, message in ((None, "`per_class` needs images with"), (9, "no class is in both")):
        arrays = [drawn[..., None]] + ([] if labels is None else [np.full(10, labels)])
        np.savez(tmp_path / "drawn.npz", *arrays)
        with pytest.raises(ValueError, match=message):
            ddpm_hf.evaluate(tmp_path / "drawn.npz", photos, per_class=True, **options)
    pipeline = GaussianDDPMPipeline(tiny_unet(), GaussianDDPMScheduler(**SHORT_CHAIN))
    with pytest.raises(ValueError, match="`per_class` needs a class-conditional model"):
        ddpm_hf.evaluate(pipeline, photos, per_class=True, **options)
