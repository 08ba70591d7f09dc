"""`evaluate` with images: from a model, files and memory, into JSON and card, and verified."""

import json
import os
import re
import sys
import time

import numpy as np
import pytest
from checkpoints import SHORT_CHAIN, tiny_unet
from image_sets import folder_of, rows
from image_zoo import encode
from PIL import Image
from processes import LIMIT_S, started_ranks
from transformers import ViTConfig, ViTModel
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

import ddpm_hf
from ddpm_hf import GaussianDDPMPipeline, GaussianDDPMScheduler
from ddpm_hf.cli import main
from ddpm_hf.commands.evaluate import METRICS
from ddpm_hf.data import ImageFacts
from ddpm_hf.evaluation import frechet_distance, precision_recall
from ddpm_hf.evaluation.measurement import ALL_METRICS
from ddpm_hf.evaluation.verify import OPTIONS
from ddpm_hf.sampling import open_drawn

SIZE, NUM_TRAIN, NUM_TEST = 8, 24, 20


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def pixels():
    """Smooth grey images: of each split, and drawn ones."""
    rng, names = np.random.default_rng(0), {"train": NUM_TRAIN, "test": NUM_TEST, "drawn": 22}
    small = {name: rng.integers(0, 256, (num, 3, 3), dtype=np.uint8) for name, num in names.items()}
    return {
        name: np.stack([np.asarray(Image.fromarray(x).resize((SIZE, SIZE))) for x in images])
        for name, images in small.items()
    }


def files(pixels):
    return {
        f"{split}/{i:02d}.png": encode(image)
        for split in ("train", "test")
        for i, image in enumerate(pixels[split])
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory, pixels):
    return folder_of(tmp_path_factory.mktemp("photos"), files(pixels))


@pytest.fixture
def model(tmp_path):
    unet = tiny_unet(in_channels=1, out_channels=1)
    unet.register_to_config(_ddpm_hf=ImageFacts(mode="L", height=SIZE, width=SIZE).to_config())
    folder = tmp_path / "model"
    GaussianDDPMPipeline(unet, GaussianDDPMScheduler(**SHORT_CHAIN)).save_pretrained(folder)
    return folder


@pytest.fixture
def backbone(tmp_path):
    folder = tmp_path / "backbone"
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    ViTModel(config).save_pretrained(folder)
    BitImageProcessorPil(crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def evaluate(subject, dataset, **options):
    return ddpm_hf.evaluate(subject, dataset, **{"features": "pixels", "progress": False} | options)


def by_name(report):
    return {result["name"]: result for result in report["results"]}


def flat(images):
    return np.repeat(images.reshape(len(images), 1, -1), 3, 1).reshape(len(images), -1) / 255


def test_images_in_files_and_in_memory_measure_the_same(pixels, photos, tmp_path):
    drawn, metrics = pixels["drawn"], ("fd", "precision-recall", "memorisation")
    folder_of(tmp_path, {f"d/{i:02d}.png": encode(x) for i, x in enumerate(drawn)})
    np.savez(tmp_path / "d.npz", drawn[..., None])
    report = evaluate(drawn, photos, metrics=metrics)
    found = by_name(report)
    real, fake = flat(pixels["train"]), flat(drawn)
    # The features are float32.
    assert found["fd"]["value"] == pytest.approx(frechet_distance(real, fake), rel=1e-5)
    want = precision_recall(real, fake)
    assert (found["precision"]["value"], found["recall"]["value"]) == want
    assert found["fd"]["held_out_split"] == "test"
    assert found["fd"]["features"]["dims"] == 3 * SIZE**2
    json.dumps(report)
    as_rows = rows(*files(pixels).values())
    splits = {"train": as_rows.select(range(NUM_TRAIN)),
              "test": as_rows.select(range(NUM_TRAIN, NUM_TRAIN + NUM_TEST))}  # fmt: skip
    pil = [Image.fromarray(image) for image in drawn]
    for subject in (tmp_path / "d", tmp_path / "d.npz", pil):
        assert evaluate(subject, photos, metrics=metrics)["results"] == report["results"]
    assert evaluate(drawn, splits, metrics=metrics)["results"] == report["results"]


def test_without_held_out_images_the_floor_is_between_halves(pixels):
    real = rows(*files(pixels).values())
    found = by_name(evaluate(pixels["drawn"], real, num_images=20))
    assert set(found) == {"fd", "kid", "precision", "recall", "density", "coverage", "copies"}
    assert all(figure["floor_between"] == "halves" for figure in found.values())
    assert found["kid"]["num_drawn"] == 20
    assert found["kid"]["num_real"] == NUM_TRAIN + NUM_TEST
    assert found["kid"]["floor_num_images"] == [22, 10]


def command(model, photos, output, *more):
    options = ["--metrics", "fd", "memorisation", "bits-per-dim", "--features", "pixels",
               "--num-images", "12", "--num-inference-steps", "4"]  # fmt: skip
    return ["evaluate", str(model), str(photos), "--output", str(output), *options, *more]


def test_a_model_is_measured_by_the_images_that_it_draws(model, photos, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(command(model, photos, output)) == 0
    report = json.loads((output / "evaluation.json").read_text())
    found = by_name(report)
    drawn = open_drawn(output / "drawn")
    assert (len(drawn), drawn.options["num_inference_steps"]) == (12, 4)
    assert found["fd"]["num_inference_steps"] == 4
    assert found["bits-per-dim"]["num_images"] == 12
    assert report["model"]["weights"] == drawn.options["weights"]
    printed = capsys.readouterr().out
    for said in ("95 % interval", "Frechet distance", "share of copies", "bits/dim", "by pixels"):
        assert said in printed
    names = {path.name for path in output.iterdir()}
    assert {"samples.png", "closest-pairs.png", "evaluation.json"} <= names
    assert set(report["options"]) == OPTIONS
    # What is recorded measures the same again.
    again = evaluate(model, photos, **report["options"] | {"output": output})
    assert again["results"] == report["results"]


def test_what_a_card_claims_is_verified_and_what_was_changed_is_found(
    model, photos, tmp_path, capsys
):
    assert main([*command(model, photos, tmp_path / "out"), "--card"]) == 0
    card = model / "README.md"
    shown = re.sub(r"\\(.)", r"\1", card.read_text())
    assert f"ddpm-hf evaluate model {photos.name} --metrics fd --features pixels" in shown
    assert str(tmp_path) not in card.read_text()
    verify = ["evaluate", str(model), str(photos), "--output", str(tmp_path / "new"), "--verify"]
    capsys.readouterr()
    assert main(verify) == 0
    assert capsys.readouterr().out.count("\nreproduced ") + 1 == 3
    text = card.read_text()
    value = by_name(json.loads((tmp_path / "out" / "evaluation.json").read_text()))["fd"]["value"]
    assert str(value) in text
    card.write_text(text.replace(f"value: {value}", f"value: {value / 2}"))
    interval = r"(interval:\n *- )\S+(\n *- )\S+"  # a wide one does not help
    card.write_text(re.sub(interval, r"\g<1>0.0\g<2>1000000.0", card.read_text()))
    assert main(verify) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("NOT")] == [
        "NOT reproduced  Frechet distance (pixels)"
    ]


def test_figures_by_a_folder_of_a_network_are_verified_where_it_is_named(
    model, photos, tmp_path, capsys, backbone
):
    how = ["--metrics", "fd", "--num-images", "12", "--num-inference-steps", "4"]
    given = ["--features", str(backbone), "--output", str(tmp_path / "out")]
    assert main(["evaluate", str(model), str(photos), *how, *given, "--card"]) == 0
    verify = ["evaluate", str(model), str(photos), "--verify", "--output", str(tmp_path / "new")]
    assert main(verify) == 2
    assert f"pass --features PATH/{backbone.name}" in capsys.readouterr().err
    assert main([*verify, "--features", str(backbone)]) == 0
    assert capsys.readouterr().out.startswith("reproduced ")


CARD = """---
model-index:
- name: m
  results:
  - task: {type: unconditional-image-generation}
    dataset: {name: photos, type: photos}
    metrics:
    - {type: fd, name: fd, value: 1.0, args: ARGS}
---
"""
UNUSABLE = [
    "{evaluate: {metrics: [fd], use_safetensors: false}, interval: [0.0, 1.0]}",
    "{evaluate: {metrics: [fd], output: elsewhere}, interval: [0.0, 1.0]}",
    "{evaluate: {metrics: fd}, interval: [0.0, 1.0]}",
    "{evaluate: [fd], interval: [0.0, 1.0]}",
    "{evaluate: {metrics: [fd]}, interval: 1.0}",
    "{}",
]


@pytest.mark.parametrize("args", UNUSABLE)
def test_a_card_that_does_not_say_how_as_evaluate_does_cannot_be_verified(
    args, model, photos, capsys
):
    """A card is anybody's: it does not decide what is opened and where files go."""
    (model / "README.md").write_text(CARD.replace("ARGS", args))
    assert main(["evaluate", str(model), str(photos), "--verify"]) == 2
    assert "has no figure that says how to measure it" in capsys.readouterr().err


REFUSED = [
    ({"metrics": ["fid"]}, "metrics must be of bits-per-dim, fd, .*, got 'fid'"),
    ({"metrics": ["bits-per-dim"]}, "is of a model"),
    ({"scheduler": "DDIM"}, "scheduler is of a model"),
    ({"num_images": 0}, "num_images must be at least 1"),
    ({"reference_split": "none", "split": "neither"}, "'none' does not exist"),
    ({"features": "./missing"}, "does not exist"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_what_cannot_be_measured_is_said_with_the_choices(options, said, pixels, photos):
    with pytest.raises(ValueError, match=said):
        evaluate(pixels["drawn"], photos, **options)


def test_images_of_another_kind_than_the_data_are_no_set(photos):
    with pytest.raises(ValueError, match=r"\(N, H, W, C\) of uint8, .*float64 of shape \(2, 8, 8"):
        evaluate(np.full((2, 8, 8), 2.0), photos)


def test_the_command_knows_the_metrics_without_loading_them():
    assert METRICS == ALL_METRICS


@pytest.mark.slow
def test_two_processes_that_are_killed_and_started_again_measure_what_one_does(
    model, photos, tmp_path
):
    """Draws, features and figures; more images than one file of features holds."""
    arguments = ["evaluate", str(model), str(photos), "--metrics", "fd", "memorisation",
                 "--features", "pixels", "--num-images", "600", "--num-inference-steps", "2",
                 "--batch-size", "20"]  # fmt: skip
    assert main([*arguments, "--output", str(tmp_path / "one")]) == 0
    two = [sys.executable, "-m", "ddpm_hf", *arguments, "--output", str(tmp_path / "two")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    drawn = tmp_path / "two" / "drawn"
    with started_ranks(two, env=environment) as processes:
        began = time.monotonic()
        while len(list(drawn.glob("part-*"))) < 3:
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() - began < LIMIT_S
            time.sleep(0.01)
    assert 3 <= len(list(drawn.glob("part-*"))) < 30
    with started_ranks(two, env=environment) as processes:
        said = [process.communicate(timeout=LIMIT_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    one, two = (
        json.loads((tmp_path / name / "evaluation.json").read_text())["results"]
        for name in ("one", "two")
    )
    for figure in (*one, *two):
        figure.pop("seconds_per_image")
    assert two == one
