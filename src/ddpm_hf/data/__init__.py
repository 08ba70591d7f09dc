"""Image datasets: loaded from any `datasets` source, decoded and resized once, and augmented.

    dataset = load_images("./photos")    # Hub name, folder, parquet or arrow files, save_to_disk
    images = prepare_images(dataset)     # memory-mapped uint8 or uint16, (C, H, W)
    training = TrainingImages(images)    # (epoch, index) -> float32 (C, H, W) in [-1, 1]

A set of images is prepared once before training, or streamed while training reads it:

|                       | prepared                           | streamed                            |
|-----------------------|------------------------------------|-------------------------------------|
| files are found by    | sources: image_folder, splits,     | shard_files                         |
|                       | hub_datasets                       |                                     |
| labels are read by    | labels; of a folder: folder_labels,| labels; shards: parquet_shards,     |
|                       | folder_metadata                    | tar_shards                          |
| files are checked by  | encoded_images, file_limits        | file_limits, remote_files           |
| images are decoded by | decoding, image_conversion         | decoding, image_conversion          |
|  called by            | preprocessing                      | shard_cache                         |
| the result is kept in | image_dataset, preparation_cache:  | shard_cache: the shards that are    |
|                       | all images, until they are deleted | needed next, up to a limit          |
| folder of the cache   | ddpm_hf next to the Arrow files of | ddpm_hf_streams next to it; labels  |
|                       | `datasets` (HF_DATASETS_CACHE)     | of .tar files in its folder index   |
| batches are read by   | training_dataset, from an          | streaming                           |
|                       | image_source                       |                                     |
| image_order shuffles  | all images, in each epoch          | the shards, and the images of the   |
|                       |                                    | few shards that are read at a time  |

The docstring of `decoding` lists the supported file modes. Public names load on first use, so that
a folder is checked before torch is imported.
"""

from typing import TYPE_CHECKING

from ddpm_hf.utils.first_use import imported_on_first_use

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

__getattr__ = imported_on_first_use(
    __name__,
    {
        "data.errors": "DataError",
        "data.image_dataset": "ImageDataset prepare_images",
        "diffusion.image_format": "ImageFacts",
        "data.image_source": "ImageSource",
        "data.training_dataset": "TrainingImages read_batches",
        "data.sources": "load_images",
        "diffusion.image_processor": "to_unit_range",
    },
)
