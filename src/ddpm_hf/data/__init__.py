"""Image datasets: loaded from any `datasets` source, decoded and resized once, and augmented.

    dataset = load_images("./photos")    # Hub name, folder, parquet or arrow files, save_to_disk
    images = prepare_images(dataset)     # memory-mapped uint8 or uint16, (C, H, W)
    training = TrainingImages(images)    # (epoch, index) -> float32 (C, H, W) in [-1, 1]

The docstring of `decoding` lists the supported file modes. Public names load on first use, so that
a folder is checked before torch is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOME_OF = {
    "DataError": "data.errors",
    "ImageDataset": "data.image_dataset",
    "ImageFacts": "diffusion.image_format",
    "ImageSource": "data.image_source",
    "TrainingImages": "data.training_dataset",
    "load_images": "data.sources",
    "prepare_images": "data.image_dataset",
    "read_batches": "data.training_dataset",
    "to_unit_range": "diffusion.image_processor",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"ddpm_hf.{_HOME_OF[name]}"), name)
