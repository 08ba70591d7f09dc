"""Pictures next to the result files; a failure to draw them is a warning, not an error."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddpm_hf.evaluation.calibration_results import CalibrationCurve
from ddpm_hf.evaluation.comparison_results import Comparison, Sweep
from ddpm_hf.evaluation.figures import BoundResult
from ddpm_hf.evaluation.sets import picture
from ddpm_hf.pictures import image_grid
from ddpm_hf.sampling import DrawnImages, open_drawn

_NUM_SAMPLES, _SAMPLES_PER_ROW, _MAX_NAME = 64, 12, 100


@contextmanager
def failures_as_warnings() -> Iterator[None]:
    """Errors inside become warnings."""
    try:
        yield
    except ImportError:
        warnings.warn(
            "plots need matplotlib and were skipped: pip install 'ddpm-hf[eval]'", stacklevel=2
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
    image_grid([picture(drawn, row) for row in shown]).save(folder / "samples.png")
    if pairs:
        cells = [picture(s, i) for pair in pairs for s, i in zip((drawn, real), pair, strict=True)]
        image_grid(cells, columns=8).save(folder / "closest-pairs.png")


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
    """Write comparison.png, and samples.png with a row per setting and a column per seed."""
    with failures_as_warnings():
        rows = [row for row in comparison.settings if (folder / row.folder / "drawn").is_dir()]
        sets = [open_drawn(folder / row.folder / "drawn") for row in rows]
        cells = [
            picture(drawn, i) if i < len(drawn) else None
            for drawn in sets
            for i in range(_SAMPLES_PER_ROW)
        ]
        if cells:
            names = [row.setting for row in rows]
            image_grid(cells, _SAMPLES_PER_ROW, names, _MAX_NAME).save(folder / "samples.png")
        from ddpm_hf.evaluation import plots

        plots.plot_comparison(comparison, folder / "comparison.png")
