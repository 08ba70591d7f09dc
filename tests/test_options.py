"""Every training option takes effect: another value changes exactly the expected outputs."""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import few_steps, tiny_config, tiny_images, tiny_unet

from ddpm_hf import TrainingConfig, load, train
from ddpm_hf.data import DataError, TrainingImages
from ddpm_hf.data.image_order import Batches
from ddpm_hf.losses import simple_loss
from ddpm_hf.pictures import image_grid
from ddpm_hf.randomness import noise_of_rows, seed_of, timestep_generator
from ddpm_hf.sampling import draw_images

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Folders of images in two classes, network configurations, and a saved network."""
    folder, rng = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    for name in ("photos", "others"):
        for i in range(12):
            path = folder / name / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)).save(path)
    (folder / "bad").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "bad" / "0.png")
    (folder / "bad" / "1.png").write_bytes(b"no image")
    for name, channels in (("unet", (8,)), ("wider", (16,))):
        network = tiny_unet(in_channels=3, out_channels=3, block_out_channels=channels)
        public = {key: value for key, value in network.config.items() if key[0] != "_"}
        (folder / f"{name}.json").write_text(json.dumps(public))
    tiny_unet(in_channels=3, out_channels=3).save_pretrained(folder / "pretrained")
    return folder


def run(inputs, folder, options):
    usual = {
        "dataset": "photos", "unet_config": "unet.json", "output_dir": str(folder), "seed": 0,
        "resolution": 8, "max_train_steps": 3, "batch_size": 4, "learning_rate": 1e-3,
        "lr_warmup_steps": 0, "num_samples": 0, "logging_steps": 1, "checkpointing_steps": 3,
    }  # fmt: skip
    chosen = usual | options
    for name in ("dataset", "unet_config", "pretrained"):
        if chosen.get(name):
            chosen[name] = str(inputs / chosen[name])
    return train(TrainingConfig(**chosen))


def outputs_of(folder):
    """The outputs of a run by kind; equal for equal options."""
    newest = max((folder / "checkpoints").iterdir())
    parts = json.loads((newest / "state.json").read_text())["parts"]
    digests = {
        path.stem: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in newest.glob("*.safetensors")
    }
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    metrics = [{k: v for k, v in json.loads(x).items() if k != "images_per_s"} for x in lines]
    files = sorted(
        str(path.relative_to(folder))
        for pattern in ("checkpoints/*", "samples/*", "ema_snapshots/*", "best", "model")
        for path in folder.glob(pattern)
    )
    grids = [hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("samples/*")]
    card = (folder / "model" / "README.md").read_text()
    return {
        "images": parts["images"], "network": parts["network"], "diffusion": parts["diffusion"],
        "objective": parts["objective"], "weights": digests["unet"], "average": digests["ema"],
        "metrics": metrics, "files": files, "grids": grids,
        "license": re.findall("^license: .*", card, re.MULTILINE),
    }  # fmt: skip


LEARNED = {"weights", "average", "metrics"}
PROPOSED = {"unet_config": None}
VALIDATED, DRAWN = {"validation_split": "0.3"}, {"num_samples": 1, "sample_inference_steps": 3}
EVALUATED = {
    "evaluate_steps": 3, "evaluate_num_images": 4, "evaluate_features": "pixels",
    "sample_inference_steps": 3,
}  # fmt: skip
# Option: another value, the outputs that change, and further options of both runs.
DIFFERENCES = {
    "dataset": ("others", LEARNED | {"images"}, {}),
    "split": ("train[:6]", LEARNED | {"images"}, {}),
    "resolution": (16, LEARNED | {"images", "network"}, {}),
    "image_mode": ("L", LEARNED | {"images", "network"}, PROPOSED),
    "bit_depth": (16, {"images"}, {}),  # 8-bit images give the same numbers
    "class_conditional": (True, LEARNED | {"images", "network"}, PROPOSED),
    "class_column": ("label", LEARNED | {"images", "network"}, PROPOSED),
    "crop": ("random", LEARNED, {}),
    "random_flip": (True, LEARNED, {}),
    "pretrained": ("pretrained", LEARNED | {"network", "diffusion"}, PROPOSED),
    "unet_config": ("wider.json", LEARNED | {"network"}, {}),
    "num_train_timesteps": (50, LEARNED | {"diffusion"}, {}),
    "beta_schedule": ("linear", LEARNED | {"diffusion"}, {}),
    "prediction_type": ("epsilon", LEARNED | {"diffusion"}, {}),
    "variance_type": ("fixed_large", {"diffusion"}, {}),
    "objective": ("vlb", LEARNED | {"objective"}, {}),
    "loss_weighting": ("min_snr", LEARNED, {}),
    "timestep_sampling": ("low_discrepancy", LEARNED, {}),
    "class_dropout": (0.9, LEARNED, PROPOSED | {"class_conditional": True}),
    "max_train_steps": (2, LEARNED | {"files"}, {}),
    "batch_size": (2, LEARNED, {}),
    "gradient_accumulation_steps": (
        2,
        LEARNED,
        {},
    ),  # sums in another order
    "learning_rate": (2e-3, LEARNED, {}),
    "lr_scheduler": ("constant", LEARNED, {}),
    "lr_warmup_steps": (2, LEARNED, {}),
    "weight_decay": (0.1, LEARNED, {}),
    "max_grad_norm": (0.01, LEARNED, {}),
    "ema_decay": (0.1, {"average"}, {}),
    "post_hoc_ema": (True, {"files"}, {}),
    "post_hoc_ema_steps": (1, {"files"}, {"post_hoc_ema_steps": 3}),
    "mixed_precision": ("bf16", LEARNED, {}),
    "gradient_checkpointing": (True, set(), {}),
    "seed": (1, LEARNED, {}),
    "validation_split": ("0.3", LEARNED | {"images"}, {}),
    "validation_steps": (1, {"metrics"}, VALIDATED),
    "validation_images": (2, {"metrics"}, VALIDATED),
    "validation_timesteps": (4, {"metrics"}, VALIDATED),
    "keep_best": (True, {"files"}, VALIDATED),
    "best_metric": ("fd", {"files"}, EVALUATED),
    "evaluate_steps": (2, {"metrics"}, EVALUATED),
    "evaluate_num_images": (6, {"metrics"}, EVALUATED),
    "evaluate_features": ("efficientnet-lite0", {"metrics"}, EVALUATED),
    "logging_steps": (3, {"metrics"}, {}),
    "sample_steps": (1, {"files", "grids"}, DRAWN | {"sample_steps": 3}),
    "num_samples": (2, {"grids"}, DRAWN | {"sample_steps": 3}),
    "sample_inference_steps": (5, {"grids"}, DRAWN | {"sample_steps": 3}),
    "checkpointing_steps": (1, {"files"}, {}),
    "checkpoints_total_limit": (1, {"files"}, {"checkpointing_steps": 1}),
    "license": ("mit", {"license"}, {}),
}
# Options whose effect does not show in the outputs of one process on a folder, and their tests.
ELSEWHERE = {
    "output_dir": "test_options.py",
    "dataset_config": "test_options.py",
    "dataset_revision": "test_options.py",
    "image_column": "test_options.py",
    "on_bad_image": "test_options.py",
    "dataloader_num_workers": "test_options.py",
    "use_safetensors": "test_training_components.py",
    "push_to_hub": "test_hub_push.py",
    "public": "test_hub_push.py",
    "compile": "test_training_speed.py",
    "num_threads": "test_training_speed.py",
    "calibrate": "test_training_validation.py",
    "ddp_timeout": "test_endings.py",
    "streaming": "test_streaming.py",
    "streaming_cache_gb": "test_streaming.py",
    "dry_run": "test_dry_run.py",
    "report_to": "test_trackers.py",
    "tracker_project_name": "test_trackers.py",
    "run_name": "test_trackers.py",
}


def test_every_option_is_tested():
    options = {option.name for option in dataclasses.fields(TrainingConfig)}
    assert DIFFERENCES.keys() | ELSEWHERE.keys() == options
    for name, file in ELSEWHERE.items():
        text = (TESTS / file).read_text()
        assert name in text or name.replace("_", "-") in text, file


@pytest.fixture(scope="module")
def outputs(inputs, tmp_path_factory):
    """Outputs of the run with the given options; each run is made once."""
    known = {}

    def run_once(options):
        key = json.dumps(options, sort_keys=True)
        if key not in known:
            folder = tmp_path_factory.mktemp("run")
            run(inputs, folder, options)
            known[key] = outputs_of(folder)
        return known[key]

    return run_once


@pytest.mark.slow
@few_steps
@pytest.mark.parametrize("name", DIFFERENCES)
def test_every_option_changes_exactly_the_expected_outputs(outputs, name):
    value, expected, options = DIFFERENCES[name]
    usual, changed = outputs(options), outputs(options | {name: value})
    assert {kind for kind in usual if usual[kind] != changed[kind]} == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "nope"}, "nope"),
        ({"dataset_config": "small"}, "config_name.* applies to datasets on the Hub"),
        ({"dataset_revision": "v1"}, "revision.* applies to datasets on the Hub"),
        ({"dataset": "bad"}, "1.png"),
    ],
    ids=["image_column", "dataset_config", "dataset_revision", "on_bad_image"],
)
def test_data_options_reach_the_loader(inputs, tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        run(inputs, tmp_path / "run", options)
    if "bad" in options.values():
        with pytest.warns(UserWarning, match="1.png"):
            run(inputs, tmp_path / "run", options | {"on_bad_image": "skip", "batch_size": 1})


class Reporting:
    """Images that log the process that reads them."""

    def __init__(self, file):
        self.file = file

    def __len__(self):
        return 8

    def __getitem__(self, index):
        with self.file.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return torch.full((1, 8, 8), index / 8)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_given_number_of_workers_reads_the_images(tmp_path, workers):
    options = {"dataloader_num_workers": workers, "max_train_steps": 4}
    config = tiny_config(tmp_path / "run", **options)
    train(config, unet=tiny_unet(), dataset=Reporting(tmp_path / "readers"))
    readers = set((tmp_path / "readers").read_text().split()) - {str(os.getpid())}
    assert len(readers) == workers


@pytest.mark.slow
@few_steps
def test_all_random_numbers_depend_on_seed_and_position_only(tmp_path):
    """Images, flips, timesteps, noise and dropout of every micro-batch, and the sample grid."""
    seen, images = [], tiny_images()

    def loss(denoiser, scheduler, x_0, t, noise):
        seen.append((x_0, t, noise, torch.initial_seed()))
        return simple_loss(denoiser, scheduler, x_0, t, noise)

    options = {"random_flip": True, "gradient_accumulation_steps": 2, "max_train_steps": 2}
    drawn = {"num_samples": 2, "sample_steps": 2, "sample_inference_steps": 3}
    config = tiny_config(tmp_path, seed=3, **options, **drawn)
    result = train(config, unet=tiny_unet(), dataset=images, loss=loss)

    batches = Batches(len(images), seed=3, batch_size=4, start=0, stop=2, accumulation=2)
    flipped = TrainingImages(images, seed=3, random_flip=True)
    places = iter(batches)
    for number, (x_0, t, noise, dropout) in enumerate(seen):
        step, micro_step = divmod(number, 2)
        rows = batches.rows(micro_step)
        assert torch.equal(x_0, torch.stack([flipped[place] for place in next(places)]))
        generator = timestep_generator(3, step, torch.device("cpu"))
        assert torch.equal(
            t, torch.randint(1000, (4,), generator=generator)[rows.start : rows.stop]
        )
        assert torch.equal(noise, noise_of_rows(3, step, rows, like=x_0))
        assert dropout == seed_of(3, "dropout", step, 0, micro_step)
    assert len(seen) == 4

    pipeline = load(result.model_dir)
    grid = draw_images(pipeline, 2, batch_size=2, seed=3, num_inference_steps=3, eta=0.0)
    saved = Image.open(tmp_path / "samples" / "step-00000002.png")
    assert np.array_equal(np.asarray(image_grid(grid)), np.asarray(saved))


def test_flips_equal_those_of_earlier_releases():
    image = torch.linspace(-1, 1, 64).reshape(1, 8, 8)
    training = TrainingImages([image] * 11, seed=3, random_flip=True)
    flipped = [[i for i in range(11) if not training[epoch, i].equal(image)] for epoch in (0, 1)]
    assert flipped == [[1, 3, 5, 6, 7, 8], [1, 2, 4]]
