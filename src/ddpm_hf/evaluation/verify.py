"""`verify`: the figures that a model card claims, measured again."""

import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from huggingface_hub import EvalResult, hf_hub_download

from ddpm_hf.diffusion.atomic_files import read_text
from ddpm_hf.diffusion.checks import error_in_file
from ddpm_hf.evaluation.card_metrics import card_metrics
from ddpm_hf.evaluation.evaluate import evaluate
from ddpm_hf.evaluation.features import OFFLINE_FEATURES
from ddpm_hf.evaluation.options import (
    BITS,
    METRIC_NAMES,
    EvaluationOptions,
    public_name_of,
)
from ddpm_hf.hub.card_update import metadata_of
from ddpm_hf.hub.download import check_repo_id
from ddpm_hf.hub.options import LoadOptions
from ddpm_hf.hub.retry import WAITS_S, retry
from ddpm_hf.scheduler_spec import SchedulerSpec
from ddpm_hf.text import escaped

# Options that a card may set: none that loads pickled weights or writes files.
CARD_OPTIONS = {field.name for field in fields(EvaluationOptions)} - {
    field.name for field in fields(LoadOptions)
}
# A card may not make this machine draw or keep any number of images.
_LIMITS = {"num_images": 50_000, "batch_size": 1024}
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
        is_checkable: False for a figure that was measured in training: a card does not hold what
            is needed to measure it again.
    """

    name: str
    claimed: float
    measured: float | None = None
    interval: tuple[float, float] | None = None
    remark: str = ""
    is_checkable: bool = True

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
        a claim for each figure, on every rank, with the reason if it was not measured.
    Raises:
        ValueError, OSError: if the card cannot be read, or has no figure.
    """
    groups: dict[str, list[_RecordedFigure]] = {}
    claims = []
    for result in metadata_of(_card(model, options.get("revision"))).get("eval_results") or []:
        try:
            figure = _RecordedFigure.of(result)
        except (TypeError, ValueError, OverflowError) as error:
            claims.append(_unchecked(result, f"{error}"))
            continue
        shared = [figure.options.to_dict(), figure.hub_id]
        groups.setdefault(json.dumps(shared, sort_keys=True), []).append(figure)
    for group in groups.values():
        try:
            claims += _measured(model, dataset, group, options)
        except (ValueError, OSError) as error:
            claims += [Claim(figure.name, figure.value, remark=f"{error}") for figure in group]
    if not claims:
        raise ValueError(f"the card of {os.fspath(model)!r} has no figure to verify")
    return claims


def _unchecked(result: EvalResult, reason: str) -> Claim:
    """The claim of an entry that records no measurement of `evaluate`."""
    value, args = _number(result.metric_value), result.metric_args
    keys = set(args) if isinstance(args, dict) else set()
    is_of_training = "evaluate" not in keys and not keys.isdisjoint({"bound", "samples"})
    if is_of_training:
        reason = "measured in training; `ddpm-hf evaluate --card` adds figures to verify"
    value = math.nan if value is None else value
    return Claim(_name(result), value, remark=reason, is_checkable=not is_of_training)


def _card(model: str | os.PathLike[str], revision: str | None) -> str:
    """The text of the model card."""
    path = Path(model).expanduser()
    if path.is_dir():
        return read_text(path / "README.md")
    check_repo_id(os.fspath(model), may_be_folder=True)
    name = os.fspath(model)
    return read_text(
        Path(retry(lambda: hf_hub_download(name, "README.md", revision=revision), name, WAITS_S))
    )


@dataclass(frozen=True)
class _RecordedFigure:
    """A figure of a card with valid options of `evaluate`.

    Attributes:
        name, value, interval: of the figure.
        metrics: metrics of `evaluate`.
        options: what the card may choose of the other options.
        hub_id: dataset on the Hub; None if the card names none.
        dataset_name: name of the dataset.
        args: digests of what was measured.
    """

    name: str
    value: float
    interval: tuple[float, float]
    metrics: tuple[str, ...]
    options: EvaluationOptions
    hub_id: str | None
    dataset_name: str
    args: Mapping[str, Any]

    @classmethod
    def of(cls, result: EvalResult) -> Self:
        """The figure of an entry of the model index.

        Raises:
            ValueError, TypeError: if the entry is no figure of `evaluate`, or has options that a
                card may not set.
        """
        args: Any = result.metric_args
        recorded = args.get("evaluate") if isinstance(args, dict) else None
        if not isinstance(recorded, dict):
            raise ValueError("the card records no options of `evaluate` for it")
        value = _number(result.metric_value)
        ends = args.get("interval") if isinstance(args.get("interval"), list) else []
        interval = tuple(end for end in map(_number, ends) if end is not None)
        if value is None or len(interval) != 2 or interval[0] > interval[1] or len(ends) != 2:
            raise ValueError("its value and interval must be finite numbers")
        metrics = recorded.get("metrics")
        if (
            not isinstance(metrics, list)
            or not metrics
            or not all(isinstance(metric, str) and metric in METRIC_NAMES for metric in metrics)
        ):
            raise ValueError("it records no valid metric of `evaluate`")
        options = {name: value for name, value in recorded.items() if name != "metrics"}
        return cls(
            name=_name(result),
            value=value,
            interval=(interval[0], interval[1]),
            metrics=tuple(metrics),
            options=_options(options),
            hub_id=result.dataset_type if is_hub_id(result.dataset_type) else None,
            dataset_name=str(result.dataset_name),
            args=args,
        )


def _options(recorded: Mapping[Any, Any]) -> EvaluationOptions:
    """Options of a card.

    Raises:
        ValueError, TypeError: for one that a card may not set, or a value out of bounds.
    """
    if foreign := [name for name in recorded if name not in CARD_OPTIONS]:
        raise ValueError(f"a card may not set the option {foreign[0]!r:.100}")
    try:
        options = EvaluationOptions.from_keywords(**recorded)
    except (TypeError, ValueError) as error:
        raise error_in_file("the card", error) from None
    for name, limit in _LIMITS.items():
        if (getattr(options, name) or 0) > limit:
            raise ValueError(f'the card: "{name}" must be at most {limit:,}')
    if options.scheduler is not None:
        SchedulerSpec.parse_foreign(options.scheduler)
    if not isinstance(options.features, str):
        raise ValueError(f'the card: "features" must be a name, got {options.features!r:.100}')
    return options


def is_hub_id(name: Any) -> bool:
    """Whether `name` is USER/NAME of a repository, and no path of this machine."""
    is_id = isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII)
    return bool(is_id) and not os.path.lexists(name)


def _name(result: EvalResult) -> str:
    return escaped(result.metric_name)


def _number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None


def _features(options: EvaluationOptions, metrics: Sequence[str], features: Any) -> Any:
    """`features` if the card means these, else the name in the card."""
    name = options.features
    if features is not None and public_name_of(features) == name:
        return features
    if set(metrics) != {BITS} and name not in OFFLINE_FEATURES and not is_hub_id(name):
        raise ValueError(
            f"the card's features {name!r:.100} are a local folder or a network in memory: pass it"
            " as `features`"
        )
    return name


def _measured(
    model: Any, dataset: Any, group: Sequence[_RecordedFigure], options: Mapping[str, Any]
) -> list[Claim]:
    """The claims of figures that one evaluation measures."""
    first = group[0]
    metrics = list(dict.fromkeys(metric for figure in group for metric in figure.metrics))
    if dataset is None and first.hub_id is None:
        raise ValueError(
            f"the card names the dataset {first.dataset_name!r:.100}, which is not on the Hub: pass"
            " `dataset`"
        )
    features = _features(first.options, metrics, options.get("features"))
    chosen = {
        **first.options.to_dict(),
        **{name: value for name, value in options.items() if name != "features"},
        "features": features,
        "metrics": metrics,
    }
    evaluation = evaluate(model, first.hub_id if dataset is None else dataset, **chosen)
    measured = {metric.name: metric for metric in card_metrics(evaluation)}
    claims = []
    for figure in group:
        if figure.name not in measured:
            claims.append(Claim(figure.name, figure.value, remark="no such figure was measured"))
            continue
        now = measured[figure.name]
        changed = [
            what for key, what in _IDENTITY.items() if figure.args.get(key) != now.args.get(key)
        ]
        remark = f"the {' and '.join(changed)} differ from the card's" if changed else ""
        # A wide interval in the card does not help: the measured one counts then.
        intervals = (figure.interval, tuple(now.args["interval"]))
        low, high = min(intervals, key=lambda ends: ends[1] - ends[0])
        claims.append(Claim(figure.name, figure.value, now.value, (low, high), remark))
    return claims
