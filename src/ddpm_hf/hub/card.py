"""Model card of a checkpoint: written to its folder, updated with results, and shared."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ddpm_hf.diffusion.atomic_files import read_json, write_text
from ddpm_hf.hub.card_facts import card_facts
from ddpm_hf.hub.card_rendering import render_model_card
from ddpm_hf.hub.card_update import updated_card, with_license, with_space
from ddpm_hf.json_records import JsonObject, Record
from ddpm_hf.paths import ModelPaths
from ddpm_hf.run_record import MetricRecord


def write_model_card(folder: str | Path, repo_id: str | None = None) -> Path:
    """Write or update `README.md` of a checkpoint; see `updated_card`.

    Args:
        folder: a portable checkpoint.
        repo_id: its name on the Hub, if it has one.
    Returns:
        the path of the card.
    """
    path = ModelPaths(Path(folder)).card
    card = _read(path)
    updated = updated_card(card, render_model_card(card_facts(folder), repo_id))
    if updated != card:
        write_text(path, updated)
    return path


@dataclass(frozen=True)
class SharedCard:
    """A card for the Hub.

    Attributes:
        text: what to upload.
        is_from_hub: whether it contains text from the Hub that the local card lacks.
    """

    text: str
    is_from_hub: bool


def card_to_share(
    folder: str | Path,
    repo_id: str,
    remote: str | None = None,
    license: str | None = None,
    space: str | None = None,
) -> SharedCard:
    """The card to upload: the updated card of the Hub, or the local one if the Hub has none.

    Args:
        folder: the checkpoint; its README.md is optional.
        repo_id: its name on the Hub.
        remote: the card on the Hub.
        license: replaces the licence in the metadata.
        space: name of the Space to link.
    Raises:
        ValueError: for a `license` and a card with invalid metadata.
    """
    generated = render_model_card(card_facts(folder), repo_id)
    card = local = updated_card(_read(ModelPaths(Path(folder)).card), generated)
    if remote is not None:
        card = updated_card(remote, generated)
    shared = with_license(card, license) if license else card
    return SharedCard(with_space(shared, space) if space else shared, card != local)


def write_results(folder: str | Path, metrics: Iterable[MetricRecord]) -> Path:
    """Add metrics to `training.json` and the card of a checkpoint.

    A metric replaces one with the same name and dataset. The next export of the training run has
    other weights, and starts without metrics.

    Args:
        folder: a portable checkpoint.
        metrics: with finite values.
    Returns:
        the path of the card.
    Raises:
        ValueError: for a value that is not finite.
    """
    facts = read_json(ModelPaths(Path(folder)).facts)
    by_name = {_metric_key(metric): metric for metric in facts.get("metrics") or []}
    for metric in metrics:
        if not math.isfinite(metric.value):
            raise ValueError(f"{metric.name} must be finite, got {metric.value}")
        content = metric.to_dict()
        by_name[_metric_key(content)] = content
    facts["metrics"] = list(by_name.values())
    return _write_facts(Path(folder), facts)


def write_calibration(
    folder: str | Path, steps: Iterable[Record], how: str, sweep: Record | None = None
) -> Path:
    """Write a calibration into `training.json` and the card of a checkpoint.

    Args:
        folder: a portable checkpoint.
        steps: bits/dim of K steps, `evaluation.calibration_results.StepsRow`.
        how: description of the measurement, one line.
        sweep: replaces an earlier sweep, `evaluation.comparison_results.Sweep`.
    Returns:
        the path of the card.
    """
    facts = read_json(ModelPaths(Path(folder)).facts)
    calibration: JsonObject = {"rows": [row.to_dict() for row in steps], "how": how}
    if sweep is not None:
        hidden = ("options", "left_out")
        calibration["sweep"] = {k: v for k, v in sweep.to_dict().items() if k not in hidden}
    facts["calibration"] = {**(facts.get("calibration") or {}), **calibration}
    return _write_facts(Path(folder), facts)


def _write_facts(folder: Path, facts: JsonObject) -> Path:
    """Write `training.json`, and update the card."""
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    write_text(ModelPaths(folder).facts, text)
    return write_model_card(folder)


def _metric_key(metric: JsonObject) -> tuple[str, str]:
    return str(metric.get("name")), json.dumps(metric.get("dataset"), sort_keys=True)


def _read(path: Path) -> str | None:
    return path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else None
