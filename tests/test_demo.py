"""training/demo.py: data, classifier, and the program with a short training run."""

import functools
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

from ddpm_hf import load
from ddpm_hf.data import prepare_images

pytestmark = pytest.mark.slow

PATH = Path(__file__).parents[1] / "training" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(PATH.parent))  # as Python does for a file that it runs
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(PATH.parent))
    return module


@pytest.fixture(scope="module")
def split():
    """Training values, held-out values, training labels, held-out labels."""
    values, labels = load_digits(return_X_y=True)
    return train_test_split(values, labels, test_size=0.2, stratify=labels, random_state=0)


@pytest.fixture(scope="module")
def judged(demo, split):
    known, held_out, known_labels, _ = split
    classifier = demo.fit_judge(known, known_labels)
    return lambda values: demo.judge(classifier, values, known), classifier, held_out


def test_images_represent_every_digit_exactly(demo):
    values = load_digits().data
    back = demo.to_values(demo.to_images(values))
    np.testing.assert_array_equal(back.round(), values)
    # A level is 255/16 grey values wide: rounding changes it by at most 0.5 * 16/255.
    assert np.abs(back - values).max() <= 8 / 255


def test_the_digits_are_prepared_as_8_bit_greyscale_images_of_8x8(demo, tmp_path):
    images = demo.to_images(load_digits().data[:20])
    prepared = prepare_images(demo.as_dataset(images), cache_dir=tmp_path, progress=False)
    assert (prepared.facts.mode, prepared.facts.height, prepared.facts.width) == ("L", 8, 8)
    for index, image in enumerate(images):
        np.testing.assert_array_equal(prepared[index][0].numpy(), np.asarray(image))


@pytest.mark.slow
def test_the_probabilities_of_the_classifier_are_calibrated(judged, split):
    _, classifier, held_out = judged
    labels = split[3]
    probabilities = classifier.predict_proba(held_out)
    right = probabilities.argmax(1) == labels
    # 99% of 360 digits are right, with a standard error of 0.5%.
    assert right.mean() > 0.97
    assert abs(probabilities.max(1).mean() - right.mean()) < 0.02
    assert log_loss(labels, probabilities) < 0.1


def test_real_digits_have_no_shortcomings(demo, judged):
    judge, _, held_out = judged
    one_half, other_half = judge(held_out[::2]), judge(held_out[1::2])
    assert demo.shortcomings(one_half, other_half) == []
    assert sum(one_half["share_of_digit"]) == pytest.approx(1, abs=1e-3)  # rounded to 4 places


@pytest.mark.slow
def test_noise_and_mixed_digits_have_shortcomings(demo, judged):
    judge, _, held_out = judged
    real = judge(held_out)
    noise = np.random.default_rng(0).uniform(0, 16, (500, 64))
    assert demo.shortcomings(judge(noise), real)
    mixed = (held_out[:250] + held_out[-250:]) / 2
    assert any("recognised" in line for line in demo.shortcomings(judge(mixed), real))


@pytest.mark.slow
def test_a_missing_digit_is_named(demo, judged, split):
    judge, _, held_out = judged
    without_sevens = held_out[split[3] != 7]
    (only,) = demo.shortcomings(judge(without_sevens), judge(held_out))
    assert only.endswith("are a 7")


def test_copies_of_training_digits_have_distance_0(judged, split):
    judge, _, held_out = judged
    assert judge(split[0][:100])["distance_to_training"] == 0
    assert judge(held_out)["distance_to_training"] > 0.5


def test_starting_over_deletes_only_files_of_the_demo(demo, tmp_path):
    for name in ("model/unet/config.json", "checkpoints/step/x", "samples.png", "thesis.tex"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    demo.start_over(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.filterwarnings("ignore:`timestep_spacing`")
def test_the_demo_completes_repeats_and_fails_after_a_short_training_run(
    demo, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(demo, "NUM_TRAIN_TIMESTEPS", 50)
    # The new process takes seconds to import torch.
    monkeypatch.setattr(demo, "draw_elsewhere", functools.cache(demo.draw_elsewhere))
    monkeypatch.setattr(demo, "NUM_INFERENCE_STEPS", 20)
    monkeypatch.setattr(demo, "NUM_SCORED", 80)
    monkeypatch.setattr(demo, "NUM_BOUND_CALLS", 4)
    monkeypatch.setattr(demo, "NUM_CALIBRATED", 8)
    monkeypatch.setattr(demo, "NUM_COMPARED", 4)
    folder = tmp_path / "demo"
    arguments = ["--output", str(folder), "--steps", "3"]
    assert demo.main(arguments) == 1
    output = capfd.readouterr().out
    assert "import of ddpm_hf halted" in output  # in the new process
    assert "DDPMPipeline" in output
    assert "GaussianDDPMPipeline" not in output

    for name in demo.PICTURES:
        with Image.open(folder / name) as picture:
            assert min(picture.size) >= 400
            assert np.asarray(picture.convert("L")).std() > 10
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["drawn"]["count"] == 80
    assert scores["real"]["recognised"] > 0.9
    assert scores["shortcomings"]
    # The float32 tables of diffusers are off by up to 1e-3; a grey value is 1/255 wide.
    assert scores["largest_difference_to_stock"] <= 2
    card = (folder / "model" / "README.md").read_text()
    assert "recognised digits" in card
    assert f"{scores['drawn']['recognised']:.4g}" in card
    assert "Fewer steps" in card
    assert load(folder / "model").scheduler.config["_ddpm_hf"]["x_0_mse"]

    weights = folder / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    trained, metrics = weights.read_bytes(), (folder / "metrics.jsonl").read_text()
    assert demo.main(arguments) == 1
    assert weights.read_bytes() == trained
    assert (folder / "metrics.jsonl").read_text() == metrics
    assert json.loads((folder / "scores.json").read_text()) == scores
