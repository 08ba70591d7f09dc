"""A comparison as people read it: a table, curves, and rows of samples."""

import warnings
from pathlib import Path
from typing import Any

from ddpm_hf.evaluation.report import BITS, held_out, trained_on
from ddpm_hf.evaluation.sets import picture
from ddpm_hf.pictures import image_grid
from ddpm_hf.sampling import open_drawn
from ddpm_hf.text import counted

_SHOWN_PER_ROW, _FIGURES_PER_TABLE, _LONGEST_NAME = 12, 3, 100


def table(result: dict[str, Any]) -> str:
    """Settings against figures, each with its interval and its rank, and the floor.

    Args:
        result: of `compare`.
    """
    rows, left_out = result["settings"], result["left_out"]
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    starts = range(0, len(names), _FIGURES_PER_TABLE)
    parts = [_table(rows, names[start : start + _FIGURES_PER_TABLE]) for start in starts]
    images = next((f for row in rows for f in row["figures"].values() if "num_drawn" in f), None)
    options, dataset = result["options"], result["dataset"]
    said = ["value +- half of the 95 % interval; a tie is too close to the best to tell"]
    if images:
        said.append(
            f"{counted(images['num_drawn'], 'drawn image')} against {images['num_real']:,} real"
            f" ones of {dataset['name']}{trained_on(dataset)}; by {options['features']}; seed"
            f" {options['seed']}"
        )
        said.append("s/image: of one process while it drew, median over batches")
    elif rows:
        count = rows[0]["figures"][BITS]["num_images"]
        of_split = f"{dataset['name']}, {dataset['split']}{held_out(dataset)}"
        said.append(f"{counted(count, 'image')} of {of_split}")
    for reason in dict.fromkeys(row["reason"] for row in left_out):
        which = [row["setting"] for row in left_out if row["reason"] == reason]
        said.append(f"left out: {'; '.join(which)}: {reason}")
    return "\n\n".join([*parts, "\n".join(said)])


def _table(rows: list[dict[str, Any]], names: list[str]) -> str:
    figures = {name: [row["figures"].get(name) for row in rows] for name in names}
    labels = {name: next(f["label"] for f in figures[name] if f) for name in names}
    best = {name: next(f for f in figures[name] if f and f["rank"] == "best") for name in names}
    width = max(len("real images"), *(len(row["setting"]) for row in rows))
    head = f"{'':{width}}  {'calls':>6}  {'s/image':>8}"
    lines = [head + "".join(f"  {labels[name]:>18}{'':5}" for name in names)]
    for row in rows:
        calls, seconds = row["num_network_calls"], row["seconds_per_image"]
        line = f"{row['setting']:{width}}  {'' if calls is None else f'{calls:,}':>6}"
        line += f"  {'' if seconds is None else f'{seconds:.3g}':>8}"
        lines.append(line + "".join(f"  {_cell(row['figures'].get(name)):>23}" for name in names))
    floors = {name: best[name].get("floor") for name in names}
    if any(floors.values()):
        sizes = next(f["floor_num_images"] for f in best.values() if "floor_num_images" in f)
        margin = width + 18
        lines.append(f"at {sizes[1]:,} images against {sizes[0]:,}:")
        for title, key in (("  the best", "drawn"), ("  real images", "real")):
            cells = [f"{floor[key]:.4g}{'':5}" if floor else "" for floor in floors.values()]
            lines.append(f"{title:{margin}}" + "".join(f"  {cell:>23}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def _cell(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return ""
    low, high = figure["interval"]
    return f"{figure['value']:.4g} +- {(high - low) / 2:.2g} {figure['rank']:4}"


def save_pictures(result: dict[str, Any], folder: Path) -> None:
    """comparison.png, the curves, and samples.png; without them the result is no worse.

    A row of samples is of one setting, and a column of one seed.
    """
    try:
        rows = [row for row in result["settings"] if (folder / row["folder"] / "drawn").is_dir()]
        sets = [open_drawn(folder / row["folder"] / "drawn") for row in rows]
        cells = [
            picture(drawn, i) if i < len(drawn) else None
            for drawn in sets
            for i in range(_SHOWN_PER_ROW)
        ]
        if cells:
            names = [row["setting"] for row in rows]
            image_grid(cells, _SHOWN_PER_ROW, names, _LONGEST_NAME).save(folder / "samples.png")
        from ddpm_hf.evaluation.plots import plot_comparison

        plot_comparison(result, folder / "comparison.png")
    except ImportError:
        warnings.warn("no plot without matplotlib: pip install 'ddpm-hf[eval]'", stacklevel=2)
    except Exception as error:
        warnings.warn(f"the pictures were not drawn: {error}", stacklevel=2)
