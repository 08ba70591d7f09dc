"""Figures as text tables, and rows as HTML tables."""

import html

from ddpm_hf.evaluation.figures import BoundResult, ClassResult, DatasetFacts, MetricResult
from ddpm_hf.evaluation.records import Row
from ddpm_hf.text import counted

VERDICTS = {"worse": "worse than real", "better": "better than real", "tie": "a tie with real"}
MAX_CLASSES = 20  # rows of a printed table


def html_table(rows: list[Row]) -> str:
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


def figures_text(
    bound: BoundResult | None, figures: tuple[MetricResult, ...], dataset: DatasetFacts
) -> str:
    """All figures: bits/dim, the metrics of images, the metrics per class."""
    of_bound = [bound_table(bound, dataset)] if bound else []
    of_images = [metric_table(figures, dataset)] if figures else []
    return "\n\n".join([*of_bound, *of_images, *(class_table(f) for f in figures if f.classes)])


def bound_table(bound: BoundResult, dataset: DatasetFacts) -> str:
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


def bound_setup(bound: BoundResult) -> str:
    """Steps, decoder and seed of a bound in one line."""
    K, M = bound.num_inference_steps, bound.num_timesteps
    measured = f", {M:,} of them measured per image" if M < K else ""
    eta = "" if bound.eta is None else f", eta {bound.eta:g}"
    variances = ", calibrated variances" if bound.is_calibrated else ""
    return f"K = {K:,} steps{eta}{measured}{variances}; decoder {bound.decoder}; seed {bound.seed}"


def metric_table(figures: tuple[MetricResult, ...], dataset: DatasetFacts) -> str:
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


def _measured_cells(measured: MetricResult | ClassResult) -> str:
    if measured.interval is None or measured.floor is None or measured.verdict is None:
        return f"{'-':>10}  {measured.note}"
    low, high = measured.interval
    return (
        f"{measured.value:10.4g}  {f'{low:.4g} .. {high:.4g}':23}{measured.floor.drawn:11.4g}"
        f"{measured.floor.real:11.4g}  {VERDICTS[measured.verdict]}"
    )


def class_table(figure: MetricResult) -> str:
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
