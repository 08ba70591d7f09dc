"""Speed of reading training images, compared with PIL in `set_transform` of `datasets`.

    python tests/benchmarks/bench_data.py [--resolution 64] [--num-images 512] [--json FILE]

Reads an epoch of JPEG photos of 320x240 pixels, cropped from two photos of scikit-learn.
Stock is the transformation of train_unconditional.py in diffusers with PIL and numpy: resize, crop,
flip, and convert to floats in [-1, 1]. This package decodes and resizes once, timed separately.
"""

import argparse
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from common import keep, machine, parser_of, race, ratio
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader

from ddpm_hf.data import TrainingImages, load_images, prepare_images
from ddpm_hf.randomness import Batches

BATCH_SIZE = 16


def write_photos(folder: Path, number: int) -> None:
    photos, cut = load_sample_images().images, np.random.default_rng(0)
    for i in range(number):
        photo = photos[i % len(photos)]
        y, x = (int(cut.integers(photo.shape[axis] - size)) for axis, size in enumerate((240, 320)))
        Image.fromarray(photo[y : y + 240, x : x + 320]).save(folder / f"{i:05}.jpg", quality=90)


def stock_loader(folder: Path, resolution: int) -> DataLoader[Any]:
    def one(image: Image.Image) -> torch.Tensor:
        image = image.convert("RGB")
        scale = resolution / min(image.size)
        size = tuple(max(resolution, round(side * scale)) for side in image.size)
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = ((side - resolution) // 2 for side in size)
        image = image.crop((left, top, left + resolution, top + resolution))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32).div(255).sub(0.5).div(0.5)

    photos = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    photos.set_transform(lambda rows: {"input": [one(image) for image in rows["image"]]})
    return DataLoader(photos, batch_size=BATCH_SIZE, shuffle=True, drop_last=True)


def report(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        photos, cache = Path(folder, "photos"), Path(folder, "cache")
        photos.mkdir()
        write_photos(photos, options.num_images)
        datasets.config.HF_DATASETS_CACHE = cache
        datasets.disable_progress_bars()
        theirs = stock_loader(photos, options.resolution)
        start = time.perf_counter()
        prepared = prepare_images(
            load_images(str(photos)),
            resolution=options.resolution,
            cache_dir=cache,
            progress=False,
        )
        preparing = time.perf_counter() - start
        images = TrainingImages(prepared, random_flip=True)
        epoch = len(images) // BATCH_SIZE
        ours = DataLoader(
            images,
            batch_sampler=Batches(
                num_images=len(images), seed=0, batch_size=BATCH_SIZE, start=0, stop=epoch
            ),
        )
        times = race({"stock": lambda: list(theirs), "ours": lambda: list(ours)}, options.turns)
    per_image = {what: statistics.median(t) / (epoch * BATCH_SIZE) for what, t in times.items()}
    return {
        "machine": machine(options),
        "us_per_image": {what: 1e6 * each for what, each in per_image.items()},
        "times_stock": ratio(times, "stock", "ours"),
        "preparing_us_per_image": 1e6 * preparing / len(images),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--num-images", type=int, default=512)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    results = report(options)
    each = results["us_per_image"]
    print(
        f"image of {options.resolution} pixels from a JPEG of 320x240: stock "
        f"{each['stock']:.0f} us, ours {each['ours']:.0f} us ({results['times_stock']:.0f} times "
        f"as fast), preparation {results['preparing_us_per_image']:.0f} us"
    )
    keep(results, options)


if __name__ == "__main__":
    main()
