"""Writers of sampled images: image folders, image grids, npz, npy and parquet."""

import io
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from diffusers import UNet2DModel
from tqdm.auto import tqdm

from ddpm_hf.diffusion.atomic_files import replacing_file, replacing_files
from ddpm_hf.image_batches import recorded_bit_depth
from ddpm_hf.pictures import MAX_PICTURE_CHANNELS, grid_by_row, image_grid, is_picture, to_pil
from ddpm_hf.sampling.array_files import Array, Labels
from ddpm_hf.sampling.image_reader import DrawnImages

CHUNK_SIZE = 128  # images; also the row group of parquet, which `datasets` reads as a whole


def is_folder(output: Path) -> bool:
    """Whether an output of this name is a folder of images."""
    return _file_writer(output) is None


def pixel_type_of(output: Path, unet: UNet2DModel) -> str:
    """The pixel type that `output` needs: "uint8", "uint16" or "float32".

    Raises:
        ValueError: if `output` consists of image files, which cannot hold the model's channels.
    """
    suffix = output.suffix.lower()
    if suffix == ".npy" or is_picture(output):
        return "float32"
    bit_depth, num_channels = recorded_bit_depth(unet), unet.config.in_channels
    if suffix == ".npz":
        return f"uint{bit_depth}"
    if num_channels > MAX_PICTURE_CHANNELS:
        raise ValueError(
            f"`output` {output}: image files cannot hold the {num_channels} channels of this model;"
            " choose a path that ends in .npz or .npy (or in .png, for a grid)"
        )
    if num_channels == 1:
        return f"uint{bit_depth}"
    if bit_depth == 16:  # Pillow supports colour in 8 bits only
        warnings.warn(
            "PNG files keep 8 of the model's 16 bits; an output that ends in .npz keeps all",
            stacklevel=2,
        )
    return "uint8"


def write_images(drawn: DrawnImages, output: Path, progress: bool) -> None:
    """Write the images to `output`, atomically unless it is an existing folder."""
    write = _file_writer(output)
    if write is None:
        _write_folder(drawn, output, progress)
        return
    with replacing_file(output) as path:
        write(drawn, path, progress)


def _write_grid(drawn: DrawnImages, path: Path, progress: bool) -> None:
    images = list(drawn.stored(range(len(drawn))))
    if drawn.labels is None:
        image_grid(images).save(path)
        return
    names = _all_class_names(drawn, drawn.labels)
    grid_by_row(images, drawn.labels.tolist(), names).save(path)


def _all_class_names(drawn: DrawnImages, labels: Labels) -> list[str]:
    """Class names by number; a class without a name, such as the null class, gets its number."""
    names = drawn.class_names or ()
    return [*names, *map(str, range(len(names), int(labels.max()) + 1))]


def _write_npz(drawn: DrawnImages, path: Path, progress: bool) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            _write_array(file, drawn, progress)
        if drawn.labels is not None:
            with archive.open("arr_1.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, drawn.labels)


def _write_npy(drawn: DrawnImages, path: Path, progress: bool) -> None:
    with path.open("wb") as file:
        _write_array(file, drawn, progress)


def _write_array(file: IO[bytes], drawn: DrawnImages, progress: bool) -> None:
    descr = np.lib.format.dtype_to_descr(drawn.stored(range(1)).dtype)
    header = {"descr": descr, "fortran_order": False, "shape": drawn.shape}
    np.lib.format.write_array_header_1_0(file, header)
    for _, images in _chunks(drawn, progress):
        file.write(images.tobytes())


def _write_parquet(drawn: DrawnImages, path: Path, progress: bool) -> None:
    import datasets  # takes seconds to load
    import pyarrow as pa
    import pyarrow.parquet as pq

    features, labels, count = datasets.Features(image=datasets.Image()), drawn.labels, len(drawn)
    if labels is not None:
        features["label"] = datasets.ClassLabel(names=_all_class_names(drawn, labels))
    with pq.ParquetWriter(path, features.arrow_schema) as writer:
        for rows, images in _chunks(drawn, progress):
            columns: dict[str, object] = {
                "image": [
                    {"bytes": _png(image), "path": _file_name(i, count)}
                    for i, image in zip(rows, images, strict=True)
                ]
            }
            if labels is not None:
                columns["label"] = labels[rows.start : rows.stop]
            writer.write_table(pa.table(columns, features.arrow_schema))


def _write_folder(drawn: DrawnImages, path: Path, progress: bool) -> None:
    count = len(drawn)

    def stale() -> Iterator[Path]:
        # A photo of the user may be called 1st.png, or have the eight digits of a date.
        return (file for file in path.glob("*.png") if re.fullmatch(r"\d{5,7}", file.stem))

    with replacing_files(path, last=_file_name(count - 1, count), stale=stale) as folder:
        for rows, images in _chunks(drawn, progress):
            for i, image in zip(rows, images, strict=True):
                to_pil(image).save(folder / _file_name(i, count))


def _png(image: Array) -> bytes:
    file = io.BytesIO()
    to_pil(image).save(file, "png")
    return file.getvalue()


def _file_name(i: int, count: int) -> str:
    return f"{i:0{max(5, len(str(count - 1)))}d}.png"


def _chunks(drawn: DrawnImages, progress: bool) -> Iterator[tuple[range, Array]]:
    """Indices and images of one chunk after the other, with a progress bar."""
    disable = None if progress else True
    with tqdm(total=len(drawn), desc="writing", unit="image", leave=False, disable=disable) as bar:
        for start in range(0, len(drawn), CHUNK_SIZE):
            rows = range(start, min(start + CHUNK_SIZE, len(drawn)))
            yield rows, drawn.stored(rows)
            bar.update(len(rows))


_FileWriter = Callable[[DrawnImages, Path, bool], None]
_FILE_WRITERS = {".npz": _write_npz, ".npy": _write_npy, ".parquet": _write_parquet}


def _file_writer(output: Path) -> _FileWriter | None:
    """The writer for a file of this name; None for a folder."""
    return _write_grid if is_picture(output) else _FILE_WRITERS.get(output.suffix.lower())
