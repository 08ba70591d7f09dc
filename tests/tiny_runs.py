"""Training runs that take a second, and readers of the files that they write."""

import json
import os
import signal

import pytest
import torch
from checkpoints import tiny_unet
from safetensors.torch import load_file

from ddpm_hf import TrainingConfig, train
from ddpm_hf.training.resolve import Machine, resolve

# With few steps the scheduler warns about the gap between x_T and the first timestep.
few_steps = pytest.mark.filterwarnings("ignore:`timestep_spacing`")


def tiny_images(count=11):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(1, 8, 8, generator=generator) * 2 - 1 for _ in range(count)]


def on_grid(count=20):
    """Images with 8-bit pixel values, as the decoder term of the bound requires."""
    return [((image + 1) * 127.5).round() / 127.5 - 1 for image in tiny_images(count)]


class Images:
    """Images that call `action` at the read number `at`, counted from 1."""

    def __init__(self, images, at, action):
        self.images, self.at, self.action, self.reads = images, at, action, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == self.at:
            self.action()
        return self.images[index]


def tiny_config(folder, **overrides):
    options = {
        "output_dir": str(folder),
        "max_train_steps": 6,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "timestep_sampling": "uniform",
        "lr_warmup_steps": 2,
        "logging_steps": 1,
        "checkpointing_steps": 2,
        "num_samples": 0,
    }
    return TrainingConfig(**{**options, **overrides})


def resolved(options, machine=None, **facts):
    """The complete configuration for a small dataset on a CPU."""
    usual = {
        "num_images": 100, "image_size": 32, "learns_variance": False, "num_channels": 32,
        "prediction_type": "v_prediction", "has_custom_loss": False,
    }  # fmt: skip
    return resolve(options, machine or Machine("cpu"), **usual | facts)


def run(folder, *, dataset=None, unet=None, **overrides):
    return train(
        tiny_config(folder, **overrides),
        unet=unet or tiny_unet(),
        dataset=dataset or tiny_images(),
    )


def checkpoint(folder, step):
    """The tensors of a checkpoint, copied: safetensors maps the file, which a test may change."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    return {
        f"{file.name}:{name}": value.clone()
        for file in sorted(path.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def assert_equal_bits(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def stop_reading_at(read, number=signal.SIGTERM):
    return Images(tiny_images(), read, lambda: os.kill(os.getpid(), number))
