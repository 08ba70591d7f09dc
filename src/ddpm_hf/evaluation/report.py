"""What an evaluation leaves: a JSON file, a table, lines for the model card."""

import json
import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ddpm_hf.diffusion.atomic_files import write_text
from ddpm_hf.locks import exclusive_folder
from ddpm_hf.text import counted

FILE_NAME = "evaluation.json"
BITS = "bits-per-dim"
VERDICTS = {"worse": "worse than real", "better": "better than real", "tie": "a tie with real"}
_DATASET = ("name", "hub_id", "split")
_USUAL = {
    "reference_split": "train", "on_bad_image": "error", "decoder": "exact", "batch_size": 64,
    "per_class": False,
}  # fmt: skip
NORMAL_95 = 1.96
MOST_CLASSES = 20  # that a person reads


@contextmanager
def results_folder(state: PartialState, output: str | os.PathLike[str] | None) -> Iterator[Path]:
    """The folder of the results, which nobody else has inside the block; a passing one for None.

    Raises:
        ValueError: if another process has it, or several of this command share the work without.
        OSError: if it cannot be written.
    """
    if output is None and state.num_processes > 1:
        raise ValueError("output must be a folder where several processes share the work")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(output or temporary).expanduser()
        with exclusive_folder(state, folder, "output"):
            yield folder


def read_results(folder: Path, file_name: str = FILE_NAME) -> list[dict[str, Any]]:
    """The results that an earlier evaluation left; none where there was none.

    Larger than a configuration: they list every image.
    """
    try:
        report = json.loads((folder / file_name).read_text(encoding="utf-8"))
        return [result for result in report["results"] if isinstance(result["name"], str)]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def report_of(
    model: dict[str, Any],
    dataset: dict[str, Any],
    results: list[dict[str, Any]],
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """All that an evaluation found, as JSON values.

    Args:
        model: its name, revision and the hash of its weights.
        dataset: its name and split, and what its images are.
        results: one of each figure.
        options: of `evaluate`, by which it can be done again.
    """
    options = options or {}
    command = command_of([model["name"]], dataset["name"], options) if options else None
    return {
        "format_version": 1,
        "model": model,
        "dataset": dataset,
        "results": results,
        "options": options,
        **made_by(command),
    }


def made_by(command: str | None) -> dict[str, Any]:
    """What a report says of its origin."""
    return {
        "command": command,
        "versions": {name: version(name) for name in ("ddpm-hf", "diffusers", "torch")},
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def write_report(folder: Path, report: dict[str, Any], file_name: str = FILE_NAME) -> Path:
    """Write the JSON file of an evaluation."""
    path = folder / file_name
    write_text(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return path


def command_of(subjects: list[str], dataset: str, options: dict[str, Any]) -> str:
    """The command line that measures the same, without the options that are usual."""
    words = ["ddpm-hf", "evaluate", *subjects, dataset]
    for name, value in options.items():
        if value is not None and value != _USUAL.get(name):
            values = value if isinstance(value, list) else [value] if value is not True else []
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def tables(report: dict[str, Any]) -> str:
    """All results as people read them."""
    results = report["results"]
    bits = [table(result, report["dataset"]) for result in results if result["name"] == BITS]
    figures = [result for result in results if result["name"] != BITS]
    of_classes = [class_table(figure) for figure in figures if "classes" in figure]
    compared = [comparison(figures, report["dataset"])] if figures else []
    return "\n\n".join([*bits, *compared, *of_classes])


def held_out(dataset: dict[str, Any]) -> str:
    """What is said behind "20 images of train", where these are those that training held out."""
    return " that training held out" if dataset.get("held_out") else ""


def trained_on(dataset: dict[str, Any]) -> str:
    """What is said behind "380 of train", where these are those that it did not hold out."""
    left_out = dataset.get("held_out")
    return f" without the {left_out['num_held_out']:,} that training held out" if left_out else ""


def comparison(figures: list[dict[str, Any]], dataset: dict[str, Any]) -> str:
    """The figures that compare drawn images with real ones, each beside its floor."""
    lines = [f"{'':18}{'value':>10}  {'95 % interval':23}{'drawn':>11}{'real':>11}"]
    for figure in figures:
        low, high = figure["interval"]
        floor, verdict = figure["floor"], VERDICTS[figure["verdict"]]
        lines.append(
            f"{figure['label']:18}{figure['value']:10.4g}  {f'{low:.4g} .. {high:.4g}':23}"
            f"{floor['drawn']:11.4g}{floor['real']:11.4g}  {verdict}"
        )
    lines += [f"note: {f['label']}: {f['note']}" for f in figures if f["note"]]
    first = figures[0]
    sizes = first["floor_num_images"]
    split = first["held_out_split"]
    beside = f"of {split}{held_out(dataset)}" if split else "of the other half"
    return "\n".join([
        *lines,
        "",
        f"value     {counted(first['num_drawn'], 'drawn image')} against"
        f" {first['num_real']:,} of {first['reference_split']}{trained_on(dataset)}; by"
        f" {first['features']['name']}",
        f"drawn     the same of {sizes[1]:,} drawn against {sizes[0]:,} real ones, mean of"
        f" {first['num_resamples']} draws",
        f"real      of {sizes[1]:,} real ones {beside} instead: what a perfect model would get;"
        " a tie is too close to tell at this number",
    ])  # fmt: skip


def class_table(figure: dict[str, Any]) -> str:
    """A figure of each class, the worst first."""
    rows = figure["classes"]
    names = [str(row["class"])[:18] for row in rows]
    title = f"{figure['label']} of each class"
    lines = [f"{title:28}{'95 % interval':23}{'drawn':>11}{'real':>11}"]
    for name, row in list(zip(names, rows, strict=True))[:MOST_CLASSES]:
        if row["value"] is None:
            lines.append(f"{name:18}{'-':>10}  {row['note']}")
            continue
        low, high = row["interval"]
        lines.append(
            f"{name:18}{row['value']:10.4g}  {f'{low:.4g} .. {high:.4g}':23}"
            f"{row['floor']['drawn']:11.4g}{row['floor']['real']:11.4g}  {VERDICTS[row['verdict']]}"
            f" ({row['num_drawn']:,} drawn, {row['num_real']:,} real)"
        )
    if len(rows) > MOST_CLASSES:
        lines.append(f"and {len(rows) - MOST_CLASSES:,} classes more, in the JSON file")
    return "\n".join(lines)


def table(result: dict[str, Any], dataset: dict[str, Any]) -> str:
    """A result of bits/dim as people read it."""
    lines = [f"{'':10} {'bits/dim':>9}   standard error"]
    for name, part in result["parts"].items():
        error = part["standard_error"]
        shown = "unknown (one image)" if error is None else f"{error:.4f}"
        lines.append(f"{name:10} {part['value']:9.4f}   {shown}")
    height, width = result["shape"][1:]
    image = dataset["image"]
    size = f"{height}x{width}"
    if (image["height"], image["width"]) != (height, width):
        size = f"{image['height']}x{image['width']}, padded to {size}"
    lines += [
        "",
        f"data      {dataset['name']}, {dataset['split']}: "
        f"{counted(result['num_images'], 'image')}{held_out(dataset)}, {size}, {image['mode']}, "
        f"{result['bit_depth']} bit",
        f"bound     {how(result)}",
    ]
    return "\n".join(lines)


def how(result: dict[str, Any]) -> str:
    """How bits/dim were measured, in a line."""
    K, M = result["num_inference_steps"], result["num_timesteps"]
    measured = f", {M:,} of them measured per image" if M < K else ""
    variances = ", calibrated variances" if result.get("is_calibrated") else ""
    return (
        f"K = {K:,} steps{measured}{variances}; decoder {result['decoder']}; seed {result['seed']}"
    )


def card_results(report: dict[str, Any]) -> list[dict[str, Any]]:
    """All results as the model card takes them, each with the options that measure it again."""
    dataset = {key: report["dataset"][key] for key in _DATASET if key in report["dataset"]}
    rows = []
    for result in report["results"]:
        is_bits = result["name"] == BITS
        options = report["options"] | {"metrics": [BITS if is_bits else result["metric"]]}
        options = {
            name: value
            for name, value in options.items()
            if value is not None and name != "per_class"  # of which the card says nothing
        }
        row = (_bits_row if is_bits else _figure_row)(result, report["dataset"])
        interval = row.pop("interval")
        command = command_of([report["model"]["name"]], dataset["name"], options)
        args = {"evaluate": options, "interval": interval, "weights": report["model"]["weights"]}
        args |= {} if is_bits else {"features": result["features"]["digest"]}
        if left_out := report["dataset"].get("held_out"):
            args["held_out"] = left_out
        row |= {"how": f"{row['how']}; by {command}", "dataset": dataset, "args": args}
        rows.append(row)
    return rows


def _bits_row(result: dict[str, Any], dataset: dict[str, Any]) -> dict[str, Any]:
    error, value = result["standard_error"], result["value"]
    precision = "" if error is None else f", standard error {error:.2g}"
    half_width = NORMAL_95 * (error or 0.0)
    return {
        "type": BITS,
        "name": f"bits/dim (bound, K = {result['num_inference_steps']:,})",
        "value": value,
        "how": f"{counted(result['num_images'], 'image')}{held_out(dataset)}{precision};"
        f" {how(result)}",
        "interval": [value - half_width, value + half_width],
    }


def _figure_row(result: dict[str, Any], dataset: dict[str, Any]) -> dict[str, Any]:
    low, high = result["interval"]
    floor, steps = result["floor"], result["num_inference_steps"]
    K = f"; K = {steps:,}, {result['scheduler']}" if steps else ""
    return {
        "type": result["name"],
        "name": f"{result['label']} ({result['features']['name']})",
        "value": result["value"],
        "how": f"{counted(result['num_drawn'], 'drawn image')} against {result['num_real']:,} of"
        f" {result['reference_split']}{trained_on(dataset)}{K}; 95 % interval {low:.4g} to"
        f" {high:.4g}; at {result['floor_num_images'][1]:,} images {floor['drawn']:.4g}, real ones"
        f" {floor['real']:.4g}: {VERDICTS[result['verdict']]}",
        "interval": [low, high],
    }
