"""Datasets of a training run: paths, bit depth, sizes, and outputs inside the dataset."""

import json
from pathlib import Path

import datasets
import image_zoo as zoo
import pytest
import torch
from checkpoints import tiny_unet
from image_sets import folder_of

from ddpm_hf import TrainingConfig, train
from ddpm_hf.training import ConfigError, parse_config

PHOTOS = {f"{i}.png": zoo.encode(zoo.colour(8, 8)) for i in range(4)}


def tiny_run(output_dir, images=None, channels=3, **options):
    options = {"batch_size": 2, "max_train_steps": 1, "num_samples": 0} | options
    config = TrainingConfig(output_dir=str(output_dir), **options)
    return train(config, unet=tiny_unet(in_channels=channels), dataset=images)


def test_a_tilde_is_expanded_in_all_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("dataset: ~/photos\noutput_dir: ~/run\n")
    config = parse_config(["--config", "~/recipe.yaml", "--pretrained", "~/model"])
    assert config.dataset == str(tmp_path / "photos")
    assert config.run_folder() == tmp_path / "run"
    assert config.pretrained == str(tmp_path / "model")
    assert TrainingConfig(unet_config="~/unet.json").unet_config == str(tmp_path / "unet.json")
    assert TrainingConfig(dataset="~/photos").run_folder() == Path("runs/photos")


@pytest.mark.parametrize(
    "argv",
    [
        ["https://user:S3cret@example.com/a.zip"],
        ["https://example.com/a?token=S3cret", "--dataset", "b"],
    ],
)
def test_secrets_in_urls_are_hidden(argv):
    with pytest.raises(ConfigError) as caught:
        parse_config(argv)
    assert "S3cret" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`timestep_spacing`")
def test_photos_with_one_16_bit_grey_image_are_trained_on_in_8_bits(tmp_path):
    files = {**PHOTOS, "deep.png": zoo.encode(zoo.grey(8, 8).astype("uint16") * 257)}
    dataset = str(folder_of(tmp_path / "photos", files))
    options = {"dataset": dataset, "num_samples": 1, "sample_inference_steps": 2}
    with pytest.warns(UserWarning, match="1 of 5 images: 16 bits"):
        tiny_run(tmp_path / "run", **options)
    assert (tmp_path / "run" / "samples" / "step-00000001.png").is_file()
    tiny_run(tmp_path / "deep", bit_depth=16, **options)
    image = json.loads((tmp_path / "deep/model/training.json").read_text())["dataset"]["image"]
    assert (image["mode"], image["bit_depth"]) == ("RGB", 16)
    assert (tmp_path / "deep" / "samples" / "step-00000001.png").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`timestep_spacing`")
def test_a_run_inside_its_dataset_resumes_without_training_on_its_samples(tmp_path):
    photos = folder_of(tmp_path / "photos", PHOTOS)
    options = {"dataset": str(photos), "num_samples": 1, "sample_inference_steps": 2}
    tiny_run(photos / "runs" / "photos", **options)
    # The warning appears when a run starts, not when it resumes.
    result = tiny_run(photos / "runs" / "photos", max_train_steps=2, **options)
    assert result.num_steps == 2
    data = json.loads((result.model_dir / "training.json").read_text())["dataset"]
    assert data["num_images"] == 4
    assert data["left_out"] == {"in folders of training runs": 4}


@pytest.mark.parametrize("shape", [(1, 1), (2, 8), (8, 1)])
def test_images_below_3_pixels_per_side_are_rejected(tmp_path, shape):
    with pytest.raises(ConfigError, match=f"at least 3 pixels per side, got {shape[1]}x{shape[0]}"):
        tiny_run(tmp_path / "run", -torch.rand(4, 1, *shape), channels=1)
    with pytest.raises(ConfigError, match="`resolution` must be at least 3, got 2"):
        TrainingConfig(resolution=2)


@pytest.mark.slow
def test_a_folder_loaded_by_datasets_is_trained_on(tmp_path):
    root = folder_of(tmp_path / "photos", PHOTOS)
    images = datasets.load_dataset("imagefolder", data_dir=str(root))
    assert tiny_run(tmp_path / "run", images).num_steps == 1
