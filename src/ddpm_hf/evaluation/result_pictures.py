"""Pictures next to the result files; a failure to draw them is a warning, not an error."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ddpm_hf.evaluation.calibration_results import CalibrationCurve
from ddpm_hf.evaluation.comparison_results import (
    Comparison,
    ComparisonRow,
    Sweep,
    sampler_labels,
    setting_labels,
)
from ddpm_hf.evaluation.figures import BoundResult
from ddpm_hf.pictures import image_grid, to_pil, to_rgb
from ddpm_hf.sampling import DrawnImages, open_drawn
from ddpm_hf.utils.text import how_to_install

_NUM_SAMPLES, _SAMPLES_PER_ROW, _PAIRS_PER_ROW, _MAX_NAME = 64, 12, 4, 100


@contextmanager
def failures_as_warnings() -> Iterator[None]:
    """Turn errors in the block into warnings."""
    try:
        yield
    except ImportError:
        warnings.warn(
            f"plots need matplotlib and were skipped: {how_to_install('eval')}", stacklevel=2
        )
    except Exception as error:
        warnings.warn(f"the pictures could not be drawn: {error}", stacklevel=2)


def save_samples(
    folder: Path, drawn: DrawnImages, real: DrawnImages, pairs: list[tuple[int, int]]
) -> None:
    """Write samples.png, and closest-pairs.png with each drawn image next to the real one.

    Args:
        folder: of the evaluation.
        drawn, real: the sets.
        pairs: (drawn, real) indices; no picture for an empty list.
    """
    shown = range(min(_NUM_SAMPLES, len(drawn)))
    image_grid([_picture(drawn, row) for row in shown]).save(folder / "samples.png")
    if pairs:
        groups = [_group([_picture(drawn, i), _picture(real, j)]) for i, j in pairs]
        columns = min(len(groups), _PAIRS_PER_ROW)
        titles = ["drawn | real"] * columns
        image_grid(groups, columns, column_names=titles).save(folder / "closest-pairs.png")


def save_bound_plots(bound: BoundResult, folder: Path) -> None:
    """Write bits-per-timestep.png and rate-distortion.png."""
    with failures_as_warnings():
        from ddpm_hf.evaluation import plots

        plots.plot_terms(bound, folder / "bits-per-timestep.png")
        plots.plot_rate_distortion(bound, folder / "rate-distortion.png")


def save_calibration_plot(curve: CalibrationCurve, folder: Path) -> None:
    """Write calibration.png."""
    with failures_as_warnings():
        from ddpm_hf.evaluation import plots

        plots.plot_calibration(curve, folder / "calibration.png")


def save_comparison_pictures(comparison: Comparison | Sweep, folder: Path) -> None:
    """Write comparison.png, and samples.png.

    The samples have a row per sampler and a column per number of steps, with four seeds each; with
    a single number of steps, a row per setting and a column per seed.
    """
    with failures_as_warnings():
        _save_samples_of(comparison.settings, folder)
        from ddpm_hf.evaluation import plots

        plots.plot_comparison(comparison, folder / "comparison.png")


def save_ema_pictures(
    rows: Sequence[ComparisonRow], lengths: Mapping[str, float], folder: Path
) -> None:
    """Write ema.png, the figures over the length, and samples.png with a row per length.

    Args:
        rows: of a sweep over averages; a row without a length is the run's own model.
        lengths: sigma_rel by name of the row.
        folder: of the sweep.
    """
    with failures_as_warnings():
        _save_samples_of(rows, folder)
        from ddpm_hf.evaluation import plots

        plots.plot_ema_sweep(rows, lengths, folder / "ema.png")


def _group(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in two columns, close together, in a white frame."""
    width, height = pictures[0].size
    group = Image.new("RGB", (2 * width, -(-len(pictures) // 2) * height), "white")
    for i, image in enumerate(pictures):
        group.paste(to_rgb(image), (i % 2 * width, i // 2 * height))
    return ImageOps.expand(group, max(1, width // 16), "white")


def _save_samples_of(rows: Sequence[ComparisonRow], folder: Path) -> None:
    """Write samples.png of the settings with drawn images, if there are any."""
    rows = [row for row in rows if (folder / row.folder / "drawn").is_dir()]
    sets = {row.setting: open_drawn(folder / row.folder / "drawn") for row in rows}
    if not sets:
        return
    numbers = sorted({row.num_inference_steps for row in rows if row.num_inference_steps})
    if len(numbers) < 2:
        grid = _row_per_setting(sets, setting_labels(rows))
    else:
        labels, by_sampler = sampler_labels(rows), dict[str, dict[int | None, Image.Image]]()
        for row in rows:
            drawn, label = sets[row.setting], labels[row.setting] or row.setting
            four = [_picture(drawn, i) for i in range(min(4, len(drawn)))]
            by_sampler.setdefault(label, {})[row.num_inference_steps] = _group(four)
        groups = [cells.get(K) for cells in by_sampler.values() for K in numbers]
        titles = [f"K = {K:,}" for K in numbers]
        grid = image_grid(groups, len(numbers), list(by_sampler), _MAX_NAME, titles)
    grid.save(folder / "samples.png")


def _row_per_setting(sets: Mapping[str, DrawnImages], labels: Mapping[str, str]) -> Image.Image:
    cells = [
        _picture(drawn, i) if i < len(drawn) else None
        for drawn in sets.values()
        for i in range(_SAMPLES_PER_ROW)
    ]
    return image_grid(cells, _SAMPLES_PER_ROW, [labels[key] for key in sets], _MAX_NAME)


def _picture(images: DrawnImages, row: int) -> Image.Image:
    """One image of a set."""
    (pixels,) = images.read(range(row, row + 1))
    return to_pil(pixels / np.iinfo(pixels.dtype).max)
