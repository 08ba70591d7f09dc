"""`verify`: the figures that a model card claims, measured again."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ddpm_hf.evaluation.card_metrics import card_metrics
from ddpm_hf.evaluation.evaluate import evaluate
from ddpm_hf.evaluation.features import OFFLINE_FEATURES
from ddpm_hf.evaluation.options import (
    BITS,
    DEFAULT_FEATURES,
    EvaluationOptions,
    public_name_of,
)
from ddpm_hf.hub.options import LoadOptions

# Options that a card may set: none that loads pickled weights or writes files.
CARD_OPTIONS = {field.name for field in fields(EvaluationOptions)} - {
    field.name for field in fields(LoadOptions)
}
# Digests in a card that identify what a figure was measured on.
_IDENTITY = {"weights": "weights", "features": "features", "held_out": "held-out images"}


@dataclass(frozen=True)
class Claim:
    """A figure of a card.

    Attributes:
        name: of the figure.
        claimed: value in the card.
        measured: value now; None if it was not measured.
        interval: of 95 %, the narrower one of the card and this measurement.
        remark: other differences, or why it was not measured.
    """

    name: str
    claimed: float
    measured: float | None = None
    interval: tuple[float, float] | None = None
    remark: str = ""

    @property
    def is_reproduced(self) -> bool | None:
        """Whether the values differ by at most half the interval's width; None if not measured."""
        if self.measured is None or self.interval is None:
            return None
        # If the interval is a point, such as a share of 1, the values must agree up to rounding.
        tolerance = max((self.interval[1] - self.interval[0]) / 2, 1e-6 * abs(self.measured))
        return abs(self.claimed - self.measured) <= tolerance


def verify(model: str | os.PathLike[str], dataset: Any = None, **options: Any) -> list[Claim]:
    """Measure the figures of a model card again.

    Args:
        model: name or folder of a model with figures of `evaluate` in its card's model-index.
        dataset: the real images; by default the Hub dataset that the card names.
        **options: of `evaluate`, in place of the card's; `features` applies to figures whose
            features have this name, such as the last part of a folder.
    Returns:
        a claim for each figure, on every rank; figures of other programs are not measured.
    Raises:
        ValueError, OSError: if there is no figure to verify, or it cannot be measured.
    """
    path = Path(model).expanduser()
    card = ModelCard.load(path / "README.md" if path.is_dir() else os.fspath(model))
    groups: dict[str, list[EvalResult]] = {}
    claims = []
    for result in card.data.eval_results or []:
        recorded = _recorded_options(result.metric_args)
        if recorded is None:
            remark = "the card records no options of `evaluate` for it"
            claims.append(Claim(str(result.metric_name), result.metric_value, remark=remark))
            continue
        shared = {key: value for key, value in recorded.items() if key != "metrics"}
        hub_id = result.dataset_type if "/" in result.dataset_type else None
        groups.setdefault(json.dumps([shared, hub_id], sort_keys=True), []).append(result)
    if not groups:
        raise ValueError(
            f"the card of {os.fspath(model)!r} has no figure with options of `evaluate`"
        )
    for group in groups.values():
        claims += _measured(model, dataset, group, options)
    return claims


def _recorded_options(args: Any) -> Mapping[str, Any] | None:
    """Options of a figure; None if the card has none, or options that a card may not set."""
    options, interval = (
        args.get(key) if isinstance(args, dict) else None for key in ("evaluate", "interval")
    )
    is_usable = (
        isinstance(options, dict)
        and set(options) <= {"metrics", *CARD_OPTIONS}
        and isinstance(options.get("metrics"), list)
        and isinstance(interval, list)
        and [isinstance(end, int | float) for end in interval] == [True, True]
    )
    return options if is_usable else None


def _features(recorded: Mapping[str, Any], metrics: list[str], features: Any) -> Any:
    """`features` if the card means these, else the name in the card."""
    name = recorded.get("features", DEFAULT_FEATURES)
    if features is not None and public_name_of(features) == name:
        return features
    if metrics != [BITS] and name not in OFFLINE_FEATURES and "/" not in name:
        raise ValueError(
            f"the card's features {name!r} are a local folder or a network in memory: pass it as"
            " `features`"
        )
    return name


def _measured(
    model: Any, dataset: Any, group: list[EvalResult], options: Mapping[str, Any]
) -> list[Claim]:
    """The claims of figures that one evaluation measures."""
    recorded = [(result.metric_args or {})["evaluate"] for result in group]
    metrics = list(dict.fromkeys(metric for args in recorded for metric in args["metrics"]))
    if dataset is None:
        if "/" not in group[0].dataset_type:
            raise ValueError(
                f"the card names the dataset {group[0].dataset_name!r}, which is not on the Hub:"
                " pass `dataset`"
            )
        dataset = group[0].dataset_type
    features = _features(recorded[0], metrics, options.get("features"))
    chosen = {**recorded[0], **options, "features": features, "metrics": metrics}
    evaluation = evaluate(model, dataset, **chosen)
    measured = {metric.name: metric for metric in card_metrics(evaluation)}
    claims = []
    for result in group:
        args, name = result.metric_args or {}, str(result.metric_name)
        claimed = result.metric_value
        if name not in measured:
            claims.append(Claim(name, claimed, remark="no such figure was measured"))
            continue
        now = measured[name].args
        changed = [what for key, what in _IDENTITY.items() if args.get(key) != now.get(key)]
        remark = f"the {' and '.join(changed)} differ from the card's" if changed else ""
        # A wide interval in the card does not help: the measured one counts then.
        low, high = min(args["interval"], now["interval"], key=lambda ends: ends[1] - ends[0])
        claims.append(Claim(name, claimed, measured[name].value, (low, high), remark))
    return claims
