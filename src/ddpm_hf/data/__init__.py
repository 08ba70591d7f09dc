"""Image datasets: loaded from any `datasets` source, decoded and resized once, and augmented.

    dataset = load_images("./photos")    # Hub name, folder, parquet or arrow files, save_to_disk
    images = prepare_images(dataset)     # memory-mapped uint8 or uint16, (C, H, W)
    training = TrainingImages(images)    # (epoch, index) -> float32 (C, H, W) in [-1, 1]

The docstring of `decoding` lists the supported file modes.
"""

from ddpm_hf.data.errors import DataError
from ddpm_hf.data.image_dataset import ImageDataset, prepare_images
from ddpm_hf.data.image_source import ImageSource
from ddpm_hf.data.sources import load_images
from ddpm_hf.data.training_dataset import TrainingImages, read_batches
from ddpm_hf.diffusion.image_format import ImageFacts
from ddpm_hf.diffusion.image_processor import to_unit_range

__all__ = [
    "DataError",
    "ImageDataset",
    "ImageFacts",
    "ImageSource",
    "TrainingImages",
    "load_images",
    "prepare_images",
    "read_batches",
    "to_unit_range",
]
