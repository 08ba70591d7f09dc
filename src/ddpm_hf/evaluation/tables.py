"""Results as text tables, and as HTML tables for notebooks."""

import html
from typing import TYPE_CHECKING

from ddpm_hf.text import counted

if TYPE_CHECKING:
    from ddpm_hf.evaluation.calibration_results import CalibrationCurve, CheckpointCalibration
    from ddpm_hf.evaluation.comparison_results import (
        Comparison,
        ComparisonRow,
        RankedFigure,
        Sweep,
    )
    from ddpm_hf.evaluation.records import Row
    from ddpm_hf.evaluation.results import (
        BoundResult,
        ClassResult,
        DatasetFacts,
        Evaluation,
        MetricResult,
    )

VERDICTS = {"worse": "worse than real", "better": "better than real", "tie": "a tie with real"}
MAX_CLASSES = 20  # rows of a printed table
_FIGURES_PER_TABLE = 3
_STEPS_COLUMNS = {
    "bits_per_dim": "evenly spaced",
    "at_best_timesteps": "best timesteps",
    "published": "as published",
}


def html_table(rows: "list[Row]") -> str:
    """An HTML table of rows with the same or fewer columns than the first one."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = [
        "<tr>" + "".join(f"<td>{_html_cell(row.get(column))}</td>" for column in columns) + "</tr>"
        for row in rows
    ]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _html_cell(value: str | int | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else html.escape(str(value))


def evaluation_text(evaluation: "Evaluation") -> str:
    """All results: bits/dim, the metrics of images, the metrics per class."""
    figures, dataset = evaluation.image_metrics, evaluation.dataset
    bound = [bound_table(evaluation.bound, dataset)] if evaluation.bound else []
    images = [metric_table(figures, dataset)] if figures else []
    return "\n\n".join([*bound, *images, *(class_table(f) for f in figures if f.classes)])


def bound_table(bound: "BoundResult", dataset: "DatasetFacts") -> str:
    """The parts of the bound, and how they were measured."""
    lines = [f"{'':10} {'bits/dim':>9}   standard error"]
    for name, part in bound.parts.items():
        error = part.standard_error
        shown = "unknown (one image)" if error is None else f"{error:.4f}"
        lines.append(f"{name:10} {part.value:9.4f}   {shown}")
    height, width = bound.shape[1:]
    size = f"{height}x{width}"
    mode = ""
    if image := dataset.image:
        mode = f", {image.mode}"
        if (image.height, image.width) != (height, width):
            size = f"{image.height}x{image.width}, padded to {size}"
    lines += [
        "",
        f"data      {dataset.name}, {dataset.split}: {counted(bound.num_images, 'image')}"
        f"{dataset.held_out_suffix}, {size}{mode}, {bound.bit_depth} bit",
        f"bound     {bound_setup(bound)}",
    ]
    return "\n".join(lines)


def bound_setup(bound: "BoundResult") -> str:
    """Steps, decoder and seed of a bound in one line."""
    K, M = bound.num_inference_steps, bound.num_timesteps
    measured = f", {M:,} of them measured per image" if M < K else ""
    variances = ", calibrated variances" if bound.is_calibrated else ""
    return f"K = {K:,} steps{measured}{variances}; decoder {bound.decoder}; seed {bound.seed}"


def metric_table(figures: "tuple[MetricResult, ...]", dataset: "DatasetFacts") -> str:
    """The metrics of drawn images, next to their floors."""
    lines = [f"{'':18}{'value':>10}  {'95 % interval':23}{'drawn':>11}{'real':>11}"]
    lines += [f"{figure.label:18}{_measured_cells(figure)}" for figure in figures]
    lines += [f"note: {figure.label}: {figure.note}" for figure in figures if figure.note]
    first = figures[0]
    setup, (num_reference, num_others) = first.measured_with, first.floor_num_images
    split = setup.held_out_split
    others = f"of {split}{dataset.held_out_suffix}" if split else "of the other half"
    return "\n".join([
        *lines,
        "",
        f"value     {counted(first.num_drawn, 'drawn image')} against {first.num_real:,} of"
        f" {setup.reference_split}{dataset.trained_on_suffix}; by {setup.features.name}",
        f"drawn     the same for {num_others:,} drawn against {num_reference:,} real ones, mean of"
        f" {first.num_resamples} draws",
        f"real      {num_others:,} real ones {others} instead: what a perfect model would get;"
        " a tie is too close to tell at this number",
    ])  # fmt: skip


def _measured_cells(measured: "MetricResult | ClassResult") -> str:
    if measured.interval is None or measured.floor is None or measured.verdict is None:
        return f"{'-':>10}  {measured.note}"
    low, high = measured.interval
    return (
        f"{measured.value:10.4g}  {f'{low:.4g} .. {high:.4g}':23}{measured.floor.drawn:11.4g}"
        f"{measured.floor.real:11.4g}  {VERDICTS[measured.verdict]}"
    )


def class_table(figure: "MetricResult") -> str:
    """A metric for each class, the worst first."""
    classes = figure.classes or ()
    title = f"{figure.label} per class"
    lines = [f"{title:28}{'95 % interval':23}{'drawn':>11}{'real':>11}"]
    for row in classes[:MAX_CLASSES]:
        counts = f" ({row.num_drawn:,} drawn, {row.num_real:,} real)" if row.interval else ""
        lines.append(f"{row.class_name[:18]:18}{_measured_cells(row)}{counts}")
    if len(classes) > MAX_CLASSES:
        lines.append(f"and {len(classes) - MAX_CLASSES:,} more classes, in the JSON file")
    return "\n".join(lines)


def comparison_text(comparison: "Comparison | Sweep") -> str:
    """Settings against figures, each with its interval and its rank, and the floor."""
    rows = comparison.settings
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    starts = range(0, len(names), _FIGURES_PER_TABLE)
    tables = [_settings_table(rows, names[start : start + _FIGURES_PER_TABLE]) for start in starts]
    return "\n\n".join([*tables, "\n".join(_comparison_notes(comparison))])


def _comparison_notes(comparison: "Comparison | Sweep") -> list[str]:
    options, dataset = comparison.options, comparison.dataset
    notes = ["value +- half of the 95 % interval; a tie is too close to the best to tell"]
    figures = [figure for row in comparison.settings for figure in row.figures.values()]
    images = next((figure for figure in figures if figure.num_drawn is not None), None)
    if images is not None:
        notes += [
            f"{counted(images.num_drawn or 0, 'drawn image')} against {images.num_real:,} real ones"
            f" of {dataset.name}{dataset.trained_on_suffix}; by {options.features}; seed"
            f" {options.seed}",
            "s/image: of one process while drawing, median over batches",
        ]
    elif figures:
        count = figures[0].num_images or 0
        notes.append(
            f"{counted(count, 'image')} of {dataset.name}, {dataset.split}{dataset.held_out_suffix}"
        )
    for reason in dict.fromkeys(row.reason for row in comparison.left_out):
        settings = [row.setting for row in comparison.left_out if row.reason == reason]
        notes.append(f"left out: {'; '.join(settings)}: {reason}")
    return notes


def _settings_table(rows: "tuple[ComparisonRow, ...]", names: list[str]) -> str:
    having = {name: [row.figures[name] for row in rows if name in row.figures] for name in names}
    best = [next(f for f in having[name] if f.rank == "best") for name in names]
    width = max(len("real images"), *(len(row.setting) for row in rows))
    head = f"{'':{width}}  {'calls':>6}  {'s/image':>8}"
    lines = [head + "".join(f"  {having[name][0].label:>18}{'':5}" for name in names)]
    for row in rows:
        calls, seconds = row.num_network_calls, row.seconds_per_image
        line = f"{row.setting:{width}}  {'' if calls is None else f'{calls:,}':>6}"
        line += f"  {'' if seconds is None else f'{seconds:.3g}':>8}"
        lines.append(line + "".join(f"  {_cell(row.figures.get(name)):>23}" for name in names))
    if sizes := next((f.floor_num_images for f in best if f.floor_num_images), None):
        lines.append(f"at {sizes[1]:,} images against {sizes[0]:,}:")
        for title, kind in (("  the best", "drawn"), ("  real images", "real")):
            values = [f"{getattr(f.floor, kind):.4g}{'':5}" if f.floor else "" for f in best]
            lines.append(f"{title:{width + 18}}" + "".join(f"  {value:>23}" for value in values))
    return "\n".join(line.rstrip() for line in lines)


def _cell(figure: "RankedFigure | None") -> str:
    if figure is None:
        return ""
    return f"{figure.value:.4g} +- {figure.half_width:.2g} {figure.rank:4}"


def sweep_text(sweep: "Sweep") -> str:
    """The settings of a sweep, the recommended one, and remarks."""
    chosen = sweep.recommended
    recommended = f"recommended: {chosen.scheduler}, K = {chosen.num_inference_steps:,}"
    return "\n".join([comparison_text(sweep), "", recommended, *sweep.remarks])


def calibration_text(calibration: "CheckpointCalibration") -> str:
    """Predicted bits/dim of few steps, caveats, and the sweep."""
    curve = calibration.curve
    lines = [curve_table(curve), f"measured on {image_source(calibration)}"]
    lines += [f"note: {remark}" for remark in curve.remarks]
    if curve.calibrated_timesteps is not None:
        lines.append("the timesteps suit DDIM and DPM-Solver++ 2M; other samplers were not tested")
    if calibration.sweep is not None:
        lines += ["", sweep_text(calibration.sweep)]
    return "\n".join(lines)


def curve_table(curve: "CalibrationCurve") -> str:
    """Bits/dim against K, each with the loss against all steps."""
    rows = [row.to_dict() for row in curve.steps]
    columns = {key: title for key, title in _STEPS_COLUMNS.items() if key in rows[0]}
    lines = ["bits/dim of K steps, predicted, and the loss against all steps:", ""]
    lines += [f"{'K':>6}" + "".join(f"  {title:>18}" for title in columns.values())]
    of_all_steps = curve.steps[-1].bits_per_dim
    for row in rows:
        cells = [f"{row[key]:9.3f} {row[key] - of_all_steps:+8.3f}" for key in columns]
        lines.append(f"{row['num_inference_steps']:>6,}" + "".join(f"  {cell}" for cell in cells))
    error = curve.steps[-1].standard_error
    precision = "" if error is None else f"; standard error of the last line {error:.3f}"
    lines += [
        "",
        f"{counted(curve.num_images, 'image')}{precision}; took {curve.seconds:,.0f} s",
        "the best timesteps are best for the bound only: sample at evenly spaced ones",
    ]
    if "published" in columns:
        lines.append("as published: evenly spaced, variances calibrated in the last step only")
    else:
        lines.append("a learned variance adapts to each part of an image, and loses less")
    return "\n".join(lines)


def image_source(calibration: "CheckpointCalibration") -> str:
    """Number and origin of the measured images."""
    dataset, count = calibration.dataset, counted(calibration.curve.num_images, "image")
    return f"{count} of {dataset.name}, {dataset.split}{dataset.held_out_suffix}"
