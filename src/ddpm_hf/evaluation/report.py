"""What an evaluation leaves: a JSON file, a table, lines for the model card."""

import json
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ddpm_hf.diffusion.files import write_text
from ddpm_hf.wording import counted

FILE_NAME = "evaluation.json"


def read_result(folder: Path, name: str, file_name: str = FILE_NAME) -> dict[str, Any] | None:
    """The result of that name that an earlier evaluation left, or None.

    Larger than a configuration: it lists every image.
    """
    try:
        report = json.loads((folder / file_name).read_text(encoding="utf-8"))
        results = [result for result in report["results"] if result["name"] == name]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return results[0] if results else None


def write_report(
    folder: Path,
    model: dict[str, Any],
    dataset: dict[str, Any],
    results: list[dict[str, Any]],
    file_name: str = FILE_NAME,
) -> Path:
    """Write the JSON file of an evaluation.

    Args:
        folder: gets the file.
        model: its name, revision and the hash of its weights.
        dataset: its name and split, and what its images are.
        results: one of each measure.
        file_name: of the file.
    """
    path = folder / file_name
    report = {
        "format_version": 1,
        "model": model,
        "dataset": dataset,
        "results": results,
        "versions": {name: version(name) for name in ("ddpm-hf", "diffusers", "torch")},
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    write_text(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return path


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
        f"{counted(result['num_images'], 'image')}, {size}, {image['mode']}, "
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


def card_result(result: dict[str, Any], dataset: dict[str, Any]) -> dict[str, Any]:
    """A result of bits/dim as the model card takes it."""
    error = result["standard_error"]
    precision = "" if error is None else f", standard error {error:.2g}"
    return {
        "type": "bits-per-dim",
        "name": f"bits/dim (bound, K = {result['num_inference_steps']:,})",
        "value": result["value"],
        "how": f"{counted(result['num_images'], 'image')}{precision}; {how(result)}",
        "dataset": {key: dataset[key] for key in ("name", "hub_id", "split") if key in dataset},
    }
