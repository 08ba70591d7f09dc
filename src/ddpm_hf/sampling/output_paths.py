"""Paths of sampled images, and checks of them; imports no torch, so that a command fails early."""

from pathlib import Path

from ddpm_hf.diffusion.atomic_files import deleted_folder
from ddpm_hf.paths import has_file_suffix, names_an_output
from ddpm_hf.pictures import is_picture

ARRAY_FORMATS = (".npz", ".npy", ".parquet")
STUBS = (".h5", ".hdf")
HINT = "pass `overwrite=True` to replace them, or choose another `output`"


def batch_folder(output: Path) -> Path:
    """Folder of the batches until `output` is complete."""
    return output.with_name(f"{output.name}.parts")


def record_path(output: Path) -> Path:
    """File with the record of the images in `output`."""
    return output.with_name(f"{output.name}.json")


def check_output(output: Path) -> None:
    """Raise ValueError unless `output` can be a folder of images or a file of a known format."""
    if not names_an_output(output):
        raise ValueError(
            f"`output` must name a file or folder to write, such as samples.png or images, got"
            f" {str(output)!r}"
        )
    suffix = output.suffix.lower()
    # Pillow registers stubs, such as one for .h5.
    is_known = suffix in ARRAY_FORMATS or (is_picture(output) and suffix not in STUBS)
    if has_file_suffix(output) and not is_known:
        raise ValueError(
            f"`output` {output}: {suffix} is not a format of images here; choose a name that ends"
            f" in {', '.join(ARRAY_FORMATS)} or .png, or without a suffix for a folder"
        )


def check_is_free(output: Path) -> None:
    """Raise ValueError if `output` holds images without a record.

    A grid whose batches were being removed when its command was killed is drawn again.
    """
    if is_picture(output) and deleted_folder(batch_folder(output)).exists():
        return
    if holds_images(output) and not record_path(output).is_file():
        what = "exists" if output.is_file() else "contains images"
        raise ValueError(f"{output} {what} already: {HINT}")


def holds_images(output: Path) -> bool:
    """Whether `output` is a file, or a folder of sampled images."""
    return output.is_file() or (output.is_dir() and any(output.glob("[0-9]*.png")))
