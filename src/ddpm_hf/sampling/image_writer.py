"""Drawn images in the forms that others read: pictures, npz, npy, parquet, a grid."""

import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import numpy as np
from accelerate import PartialState
from diffusers import UNet2DModel
from tqdm.auto import tqdm

from ddpm_hf.diffusion.atomic_files import (
    remove_folder,
    replacing_file,
    replacing_files,
    write_text,
)
from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.locks import exclusive_folder
from ddpm_hf.pictures import MAX_PICTURE_CHANNELS, grid_by_row, image_grid, is_picture, to_pil
from ddpm_hf.sampling.image_reader import (
    OPTIONS_NAME,
    Array,
    DrawnImages,
    Labels,
    open_parts,
    options_path,
)
from ddpm_hf.sampling.sampling_record import (
    Settings,
    about_images,
    bit_depth_of,
    difference,
    settings_in,
)
from ddpm_hf.sampling.sharded_sampling import draw_parts
from ddpm_hf.shared_work import distributed_state, on_main_process

ROWS_AT_ONCE = 128  # also a row group of parquet, which `datasets` reads whole
_OTHERWISE = "pass overwrite=True to draw anew, or another output=PATH"


def save_drawn(
    pipeline: GaussianDDPMPipeline,
    output: str | Path,
    num_images: int,
    *,
    seed: int = 0,
    batch_size: int = 16,
    class_labels: Sequence[int | str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    model: Mapping[str, Any] | None = None,
    **call: Any,
) -> bool:
    """Draw images into a file or folder whose name says its form.

    The name of a picture, such as "grid.png", is one grid of all. "x.npz" holds pixels (N, H, W, C)
    of uint8 or uint16 as `arr_0`, and the classes (N,) as `arr_1`, which is what guided-diffusion's
    evaluator reads; "x.npy" the same pixels in float32, in [0, 1]. "x.parquet" has the columns
    `image` and `label`, and `datasets` opens it. Any other name is a folder of 00000.png, ...

    How they were drawn is written beside it, but for a grid, as NAME.json. Until all are drawn they
    are in the folder NAME.parts, where a call that was killed goes on. All processes of `accelerate
    launch` share the drawing; the main one writes the output. Memory does not grow with
    `num_images`, but for a grid.

    Args:
        pipeline, num_images, seed, batch_size, class_labels, progress, **call: as for `draw_to`.
        output: where, and by its ending how.
        overwrite: replace what is there; of a folder only its numbered pictures.
        model: what it is called, as JSON values: kept beside the images, and compared with nothing.
    Returns:
        whether anything was drawn: False where `output` held these very images.
    Raises:
        ValueError: if `output` holds images that were drawn otherwise (naming the option and both
            values), or cannot hold such images; if another process draws into it; if the pipeline
            cannot draw them.
        OSError: if it cannot be written.
    """
    output, state = Path(output).expanduser(), distributed_state()
    about = about_images(
        pipeline,
        num_images,
        model,
        seed=seed,
        batch_size=batch_size,
        class_labels=class_labels,
        dtype=_kept_as(output, pipeline.unet),
        call=call,
    )
    parts = parts_of(output)
    with drawing_into(output, state):
        if on_main_process(state, lambda: _is_finished(output, about["settings"], overwrite)):
            return False
        overwrite = overwrite or is_picture(output)
        draw_parts(state, pipeline, parts, about, overwrite=overwrite, progress=progress, call=call)
        if state.is_main_process:
            _write(open_parts(parts), output, progress)
            if not is_picture(output):
                write_text(options_path(output), json.dumps(about, indent=1) + "\n")
            remove_folder(parts)
    return True


def drawing_into(output: Path, state: PartialState) -> AbstractContextManager[None]:
    """Inside, these processes alone draw into `output`; InUseError where others do."""
    return exclusive_folder(state, parts_of(output), "output", output=output)


def parts_of(output: Path) -> Path:
    """Where the images are until `output` is written."""
    return output.with_name(f"{output.name}.parts")


def kept_settings(output: Path, overwrite: bool) -> Settings:
    """Those of the images that are begun or, unless they are to go, finished; {} without any."""
    begun = settings_in(parts_of(output) / OPTIONS_NAME)
    return begun or (not overwrite and settings_in(options_path(output))) or {}


def check_is_free(output: Path) -> None:
    """Raise ValueError if images would replace or join some of which nobody knows the options."""
    if _holds_images(output) and not options_path(output).is_file():
        what = f"{output} is there" if output.is_file() else f"{output} holds images"
        raise ValueError(f"{what} already; {_OTHERWISE}")


def _holds_images(output: Path) -> bool:
    return output.is_file() or (output.is_dir() and any(output.glob("[0-9]*.png")))


def _is_finished(output: Path, settings: Settings, overwrite: bool) -> bool:
    """Whether `output` holds these images; ValueError if it holds others that must stay."""
    _check_place(output)
    begun, done = settings_in(parts_of(output) / OPTIONS_NAME), settings_in(options_path(output))
    if overwrite or (begun is not None and difference(begun, settings) is None):
        return False
    check_is_free(output)
    is_there = done is not None and _holds_images(output)
    # Of a grid, nobody wants the half that was drawn otherwise.
    there = done if is_there else None if is_picture(output) else begun
    if there is not None and (otherwise := difference(there, settings)):
        raise ValueError(f"{output} holds images of {otherwise}; {_OTHERWISE}")
    return is_there


def _check_place(output: Path) -> None:
    """Fails before the work, if at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    is_folder = _writer(output) is None
    if output.exists() and output.is_dir() != is_folder:
        what, wanted = ("file", "folder") if is_folder else ("folder", "file")
        raise ValueError(f"{output} is a {what}, and a {wanted} is to be written; choose another")


def _kept_as(output: Path, unet: UNet2DModel) -> str:
    """What `output` keeps of the images.

    Raises:
        ValueError: if it is made of pictures, and none has so many channels.
    """
    suffix = output.suffix.lower()
    if suffix == ".npy" or is_picture(output):
        return "float32"
    bit_depth, num_channels = bit_depth_of(unet), unet.config.in_channels
    if suffix == ".npz":
        return f"uint{bit_depth}"
    if num_channels > MAX_PICTURE_CHANNELS:
        raise ValueError(
            f"{output}: no picture file holds the {num_channels} channels of this model; choose an "
            "output that ends in .npz or .npy (or in .png, for a grid to look at)"
        )
    if num_channels == 1:
        return f"uint{bit_depth}"
    if bit_depth == 16:  # PIL has colour in 8 bits only
        message = "PNG gets 8 of the 16 bits of this model; an output that ends in .npz has all"
        warnings.warn(message, stacklevel=2)
    return "uint8"


def _write(drawn: DrawnImages, output: Path, progress: bool) -> None:
    """The output, whole or not at all, but for a folder that was there: that fills up."""
    write = _writer(output)
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
    names = _names(drawn, drawn.labels)
    rows = [names[number] for number in drawn.labels]
    grid_by_row(images, rows).save(path)


def _names(drawn: DrawnImages, labels: Labels) -> list[str]:
    """What the classes are called; one without a name, such as the null class, by its number."""
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
    for _, images in _pieces(drawn, progress):
        file.write(images.tobytes())


def _write_parquet(drawn: DrawnImages, path: Path, progress: bool) -> None:
    import datasets  # here, since they take seconds to load
    import pyarrow as pa
    import pyarrow.parquet as pq

    features, labels, count = datasets.Features(image=datasets.Image()), drawn.labels, len(drawn)
    if labels is not None:
        features["label"] = datasets.ClassLabel(names=_names(drawn, labels))
    with pq.ParquetWriter(path, features.arrow_schema) as writer:
        for rows, images in _pieces(drawn, progress):
            cells = [
                {"bytes": _png(image), "path": _file_name(i, count)}
                for i, image in zip(rows, images, strict=True)
            ]
            columns: dict[str, Any] = {"image": cells}
            if labels is not None:
                columns["label"] = labels[rows.start : rows.stop]
            writer.write_table(pa.table(columns, features.arrow_schema))


def _write_folder(drawn: DrawnImages, path: Path, progress: bool) -> None:
    count = len(drawn)

    def stale() -> Iterator[Path]:
        # A photo may be 1st.png, or have the eight digits of a date.
        return (file for file in path.glob("*.png") if re.fullmatch(r"\d{5,7}", file.stem))

    with replacing_files(path, last=_file_name(count - 1, count), stale=stale) as folder:
        for rows, images in _pieces(drawn, progress):
            for i, image in zip(rows, images, strict=True):
                to_pil(image).save(folder / _file_name(i, count))


def _png(image: Array) -> bytes:
    file = io.BytesIO()
    to_pil(image).save(file, "png")
    return file.getvalue()


def _file_name(i: int, count: int) -> str:
    return f"{i:0{max(5, len(str(count - 1)))}d}.png"


def _pieces(drawn: DrawnImages, progress: bool) -> Iterator[tuple[range, Array]]:
    """Images as they are kept, a few at once, with their indices."""
    silent = None if progress else True
    with tqdm(total=len(drawn), desc="writing", unit="image", leave=False, disable=silent) as bar:
        for start in range(0, len(drawn), ROWS_AT_ONCE):
            rows = range(start, min(start + ROWS_AT_ONCE, len(drawn)))
            yield rows, drawn.stored(rows)
            bar.update(len(rows))


_Writer = Callable[[DrawnImages, Path, bool], None]
_WRITERS = {".npz": _write_npz, ".npy": _write_npy, ".parquet": _write_parquet}


def _writer(output: Path) -> _Writer | None:
    """What writes a file of that name; None for a folder."""
    return _write_grid if is_picture(output) else _WRITERS.get(output.suffix.lower())
