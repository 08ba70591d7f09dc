"""Speed of reading training images, compared with PIL in `set_transform` of `datasets`.

    python tests/benchmarks/bench_data.py [--resolution 64] [--num-images 512] [--batch-size 16]
        [--json FILE]

Reads an epoch of JPEG photos of 320x240 pixels, cropped from two photos of scikit-learn.
Stock is the transformation of train_unconditional.py in diffusers with PIL and numpy: resize, crop,
flip, and convert to floats in [-1, 1]. This package decodes and resizes once, timed separately. The
same images are also read from a cached stream of 32 parquet shards. Opening a shard takes about as
long as reading an image of 64 pixels: for shards of a realistic size pass

    --num-images 6400 --batch-size 64
"""

import argparse
import random
import statistics
import tempfile
import time
import warnings
from functools import partial
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
from ddpm_hf.data.image_order import Batches
from ddpm_hf.data.shard_files import find_shards
from ddpm_hf.data.streaming import StreamedTrainingImages, open_stream

NUM_SHARDS = 32


def write_photos(folder: Path, number: int) -> None:
    photos, cut = load_sample_images().images, np.random.default_rng(0)
    for i in range(number):
        photo = photos[i % len(photos)]
        y, x = (int(cut.integers(photo.shape[axis] - size)) for axis, size in enumerate((240, 320)))
        Image.fromarray(photo[y : y + 240, x : x + 320]).save(folder / f"{i:05}.jpg", quality=90)


def stock_loader(folder: Path, resolution: int, batch_size: int) -> DataLoader[Any]:
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
    return DataLoader(photos, batch_size=batch_size, shuffle=True, drop_last=True)


def our_loader(images: TrainingImages, batch_size: int) -> DataLoader[Any]:
    batches = Batches(
        num_images=len(images),
        seed=0,
        batch_size=batch_size,
        start=0,
        stop=len(images) // batch_size,
        order=getattr(images, "order", None),
    )
    return DataLoader(images, batch_sampler=batches)


def streamed_images(photos: Path, folder: Path, resolution: int) -> TrainingImages:
    cells = [{"bytes": path.read_bytes(), "path": None} for path in sorted(photos.iterdir())]
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": cells}, features=features)
    for number in range(NUM_SHARDS):
        rows.shard(NUM_SHARDS, number).to_parquet(folder / f"train-{number:02}.parquet")
    files = find_shards(str(folder / "*.parquet"))
    stream = open_stream(files, resolution=resolution, cache_dir=folder)
    return StreamedTrainingImages(stream, random_flip=True)


def report(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        photos, cache = Path(folder, "photos"), Path(folder, "cache")
        photos.mkdir()
        write_photos(photos, options.num_images)
        datasets.config.HF_DATASETS_CACHE = cache
        datasets.disable_progress_bars()
        theirs = stock_loader(photos, options.resolution, options.batch_size)
        start = time.perf_counter()
        prepared = prepare_images(
            load_images(str(photos)),
            resolution=options.resolution,
            cache_dir=cache,
            progress=False,
        )
        preparing = time.perf_counter() - start
        ours = our_loader(TrainingImages(prepared, random_flip=True), options.batch_size)
        stream = streamed_images(photos, Path(folder), options.resolution)
        streamed = our_loader(stream, options.batch_size)
        loaders = {"stock": theirs, "ours": ours, "streamed": streamed}
        calls = {what: partial(list, loader) for what, loader in loaders.items()}
        times = race(calls, options.turns)
    num_images = len(ours) * options.batch_size
    per_image = {what: statistics.median(t) / num_images for what, t in times.items()}
    return {
        "machine": machine(options),
        "us_per_image": {what: 1e6 * each for what, each in per_image.items()},
        "times_stock": ratio(times, "stock", "ours"),
        "times_prepared": ratio(times, "streamed", "ours"),
        "preparing_us_per_image": 1e6 * preparing / len(prepared),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-images", type=int, default=512)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    results = report(options)
    each = results["us_per_image"]
    print(
        f"image of {options.resolution} pixels from a JPEG of 320x240: stock "
        f"{each['stock']:.0f} us, ours {each['ours']:.0f} us ({results['times_stock']:.0f} times "
        f"as fast), preparation {results['preparing_us_per_image']:.0f} us; from a cached stream "
        f"{each['streamed']:.0f} us ({results['times_prepared']:.2f} times as slow as prepared)"
    )
    keep(results, options)


if __name__ == "__main__":
    main()
