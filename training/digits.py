"""The 1,797 handwritten digits of scikit-learn as images, a classifier, and a model of them.

The digits have 8x8 pixels with 17 grey levels, 0 to 16, which 8-bit images represent exactly.
"""

from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers import UNet2DModel
from PIL import Image
from sklearn.calibration import CalibratedClassifierCV
from sklearn.svm import SVC

from ddpm_hf import TrainingConfig, train
from ddpm_hf.training import TrainingResult

NUM_UPDATES = 3000


def to_images(values: np.ndarray) -> list[Image.Image]:
    """Convert digits, (N, 64) with values 0 to 16, to 8-bit greyscale images of 8x8 pixels."""
    pixels = (values * 255 / 16).round().astype(np.uint8).reshape(-1, 8, 8)
    return [Image.fromarray(image) for image in pixels]


def as_dataset(images: list[Image.Image]) -> datasets.Dataset:
    """A Hugging Face dataset of the images."""
    return datasets.Dataset.from_dict(
        {"image": images}, features=datasets.Features({"image": datasets.Image()})
    )


def fit_judge(values: np.ndarray, labels: np.ndarray) -> CalibratedClassifierCV:
    """A classifier with calibrated probabilities (temperature scaling, 1706.04599)."""
    svm = SVC(C=10, gamma="scale")
    return CalibratedClassifierCV(svm, method="temperature", cv=5).fit(values, labels)


def build_unet() -> UNet2DModel:
    """A UNet with 32 channels at 8x8 and 64 channels at 4x4: 0.65M parameters."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def train_model(
    images: list[Image.Image], folder: Path, num_updates: int = NUM_UPDATES
) -> TrainingResult:
    """Train a model of the digits, or resume the run in `folder`: about 5 minutes on two cores."""
    config = TrainingConfig(
        dataset="scikit-learn digits",  # the name in the model card
        output_dir=str(folder),
        max_train_steps=num_updates,
        batch_size=64,
        learning_rate=2e-3,
        timestep_sampling="uniform",
        lr_warmup_steps=min(100, num_updates),
        ema_decay=0.999,
        sample_steps=500,
        checkpointing_steps=500,
    )
    torch.manual_seed(0)  # initial weights
    return train(config, unet=build_unet(), dataset=as_dataset(images))
