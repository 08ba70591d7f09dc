"""Validation during training: held-out images, bits/dim, the best model, final calibration."""

import json
import math
import os
import shutil
import signal

import pytest
import torch
from PIL import Image
from tiny_runs import (
    Images,
    assert_equal_bits,
    checkpoint,
    metrics,
    on_grid,
    tiny_config,
    tiny_images,
    tiny_unet,
)

from ddpm_hf import ConfigError, GaussianDDPMPipeline, TrainingConfig, load, train
from ddpm_hf.data import DataError, TrainingImages
from ddpm_hf.hub.card_facts import card_facts
from ddpm_hf.hub.card_rendering import render_model_card
from ddpm_hf.training import build_images, parse_config
from ddpm_hf.training.dataset_setup import hold_out

OPTIONS = {
    "validation_split": "0.3",
    "validation_steps": 2,
    "validation_timesteps": 4,
    "num_train_timesteps": 20,
    "checkpointing_steps": 100,
}


def run(folder, dataset=None, **options):
    config = tiny_config(folder, **{**OPTIONS, **options})
    return train(config, unet=tiny_unet(), dataset=dataset or on_grid())


def measured(folder):
    entries = {entry["step"]: entry for entry in metrics(folder)}
    return {s: e["validation_bits_per_dim"] for s, e in entries.items() if len(e) > 6}


def test_held_out_and_training_images_are_disjoint():
    images = TrainingImages([torch.full((1, 4, 4), i / 10) for i in range(10)])
    training, held_out = hold_out(images, 0.3, seed=0)
    values = [{round(10 * part[0, i].max().item()) for i in range(len(part))}
              for part in (training, held_out)]  # fmt: skip
    assert len(held_out) == 3
    assert values[0] | values[1] == set(range(10))
    assert not values[0] & values[1]
    assert hold_out(images, 0.3, seed=0)[1].indices == held_out.indices
    assert hold_out(images, 0.3, seed=1)[1].indices != held_out.indices


@pytest.mark.slow
def test_bits_per_dim_are_measured_when_due_and_written_to_metrics_and_card(tmp_path, capsys):
    result = run(tmp_path)
    seen = measured(tmp_path)
    assert list(seen) == [2, 4, 6]
    assert all(math.isfinite(value) and value > 0 for value in seen.values())
    assert "6 images, 4 network calls each, every 2 updates" in capsys.readouterr().out
    facts = json.loads((result.model_dir / "training.json").read_text())
    metric = facts["metrics"][0]
    assert metric["value"] == seen[6]
    assert metric["how"].startswith("6 images that training held out, standard error ")
    assert "steps, 4 of them measured per image; decoder exact" in metric["how"]
    assert metric["args"]["bound"]["num_timesteps"] == 4
    assert facts["dataset"]["num_images"] == 14
    assert f"{seen[6]:.3f}"[:4] in render_model_card(card_facts(result.model_dir))


@pytest.mark.slow
def test_validation_does_not_change_the_weights_and_is_equal_after_resume(tmp_path):
    run(tmp_path / "straight")
    run(tmp_path / "seldom", validation_steps=6)
    stop = Images(on_grid(), 4 * 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(tmp_path / "resumed", dataset=stop).num_steps < 6
    run(tmp_path / "resumed")
    straight = checkpoint(tmp_path / "straight", 6)
    assert_equal_bits(checkpoint(tmp_path / "seldom", 6), straight)
    assert_equal_bits(checkpoint(tmp_path / "resumed", 6), straight)
    assert measured(tmp_path / "resumed")[6] == measured(tmp_path / "straight")[6]


@pytest.mark.slow
def test_each_validation_image_has_its_own_noise_and_timesteps(tmp_path):
    run(tmp_path, dataset=on_grid(1) * 20, max_train_steps=2)
    # The images are equal, so the standard error comes from noise and timesteps alone.
    assert metrics(tmp_path)[-1]["validation_standard_error"] > 1e-3


@pytest.mark.slow
def test_one_validation_image_is_measured_without_a_standard_error(tmp_path):
    """A twentieth of a few images is one image."""
    options = {"validation_split": "0.05", "keep_best": True, "max_train_steps": 2}
    for num_updates in (2, 4):  # the second run resumes
        result = run(tmp_path, on_grid(4), **options | {"max_train_steps": num_updates})
        (metric,) = json.loads((result.model_dir / "training.json").read_text())["metrics"]
        assert metric["name"] == "bits/dim of 1 held-out image (bound)"
        assert metric["value"] == measured(tmp_path)[num_updates]
        assert "standard_error" not in metric
        assert "nan" not in (result.model_dir / "README.md").read_text()
    shutil.rmtree(result.model_dir)
    run(
        tmp_path, on_grid(4), **options | {"max_train_steps": 4}
    )  # exports it with the logged value
    (again,) = json.loads((result.model_dir / "training.json").read_text())["metrics"]
    assert again == metric


@pytest.mark.slow
def test_the_best_model_is_kept(tmp_path):
    run(tmp_path, keep_best=True, validation_steps=1, max_train_steps=8, learning_rate=0.05)
    values = measured(tmp_path)
    best = min(values, key=values.get)
    facts = json.loads((tmp_path / "best" / "training.json").read_text())
    assert facts["steps"] == best
    assert facts["metrics"][0]["value"] == values[best]
    assert isinstance(load(tmp_path / "best"), GaussianDDPMPipeline)


@pytest.mark.slow
def test_a_run_that_starts_again_without_a_checkpoint_keeps_its_own_best_model(tmp_path):
    run(tmp_path, keep_best=True)
    shutil.rmtree(tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "model")
    file = tmp_path / "best" / "training.json"
    facts = json.loads(file.read_text())
    facts["metrics"][0]["value"] = -1.0  # of other options
    file.write_text(json.dumps(facts))
    run(tmp_path, keep_best=True)
    best = min(measured(tmp_path).values())
    assert json.loads(file.read_text())["metrics"][0]["value"] == best


@pytest.mark.slow
@pytest.mark.parametrize(
    ("classes", "prepares"),
    [(("",), False), (("cat", "dog"), False), (("",), True)],
    ids=["no classes", "classes", "training images prepared by a script"],
)
def test_a_split_of_the_dataset_is_validated(tmp_path, classes, prepares):
    for split, count in (("train", 6), ("test", 3)):
        for i in range(count):
            file = tmp_path / "photos" / split / classes[i % len(classes)] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 20 * i).save(file)
    config = TrainingConfig(
        **{**OPTIONS, "validation_split": "test"},
        dataset=str(tmp_path / "photos"),
        output_dir=str(tmp_path / "run"),
        max_train_steps=2,
        batch_size=2,
        num_samples=0,
    )
    result = train(config, unet=tiny_unet(), dataset=build_images(config) if prepares else None)
    assert measured(tmp_path / "run")
    facts = json.loads((result.model_dir / "training.json").read_text())
    assert facts["dataset"]["num_images"] == 6
    assert "of 3 held-out images" in facts["metrics"][0]["name"]


@pytest.mark.parametrize("split", ["1.5", "0", "test"])
def test_an_invalid_validation_split_raises(tmp_path, split):
    with pytest.raises(ConfigError, match="validation_split"):
        run(tmp_path / "run", validation_split=split)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_unknown_validation_split_is_named_by_its_option(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    config = TrainingConfig(
        **{**OPTIONS, "validation_split": "tset"},
        dataset=str(tmp_path),
        output_dir=str(tmp_path / "run"),
        max_train_steps=2,
        batch_size=2,
    )
    with pytest.raises(DataError, match="`validation_split` must be one of train, got 'tset'"):
        train(config, unet=tiny_unet())


def test_a_fraction_is_a_number_in_python_and_the_same_text_on_the_command_line():
    given = TrainingConfig(dataset="x", validation_split=0.25)
    assert given == parse_config(["x", "--validation-split", "0.25"])
    assert given.validation_split == "0.25"


@pytest.mark.slow
def test_the_finished_model_is_calibrated(tmp_path, capsys):
    straight = run(tmp_path / "one", calibrate=True)
    assert "6 held-out images, 21 network calls each, at the end" in capsys.readouterr().out
    curve = load(straight.model_dir).scheduler.x_0_mse
    assert curve.shape == (20,)
    assert (curve > 0).all()
    card = (straight.model_dir / "README.md").read_text()
    assert "### Fewer steps" in card
    assert "predicted from 6 held-out images" in card
    assert not list((tmp_path / "one").glob(".unfinished*"))
    # A finished run without calibration: the same command only calibrates.
    run(tmp_path / "two")
    again = run(tmp_path / "two", calibrate=True)
    assert torch.equal(load(again.model_dir).scheduler.x_0_mse, curve)


@pytest.mark.slow
def test_a_signal_ends_the_calibration_which_the_next_start_completes(tmp_path):
    def start(action):
        unet, calls = tiny_unet(), []

        def count(module, inputs):
            calls.extend([1] if not module.training else [])
            if len(calls) == 40:  # the check of the network is the first call
                action()

        unet.register_forward_pre_hook(count)
        config = tiny_config(tmp_path, **OPTIONS | {"validation_split": None, "calibrate": True})
        return train(config, unet=unet, dataset=on_grid()), len(calls)

    stopped, num_calls = start(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert stopped.stopped_by == signal.SIGTERM
    assert num_calls == 40
    assert load(stopped.model_dir).scheduler.x_0_mse is None
    result, _ = start(lambda: None)
    assert result.stopped_by is None
    assert load(result.model_dir).scheduler.x_0_mse is not None


@pytest.mark.slow
def test_a_failed_calibration_warns_and_the_model_is_written(tmp_path, caplog):
    images = tiny_images(6)  # not 8-bit values
    config = tiny_config(tmp_path, **OPTIONS | {"validation_split": None, "calibrate": True})
    result = train(config, unet=tiny_unet(), dataset=images)
    assert "could not calibrate the model" in caplog.text
    assert load(result.model_dir).scheduler.x_0_mse is None
