"""`verify`: the figures that a model card claims, measured again."""

import json
import math
import os
import re
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
from ddpm_hf.evaluation.figures import Interval
from ddpm_hf.evaluation_options import BITS, METRIC_NAMES, EvaluationOptions, public_name_of
from ddpm_hf.hub.card_update import metadata_of
from ddpm_hf.hub.download import check_repo_id
from ddpm_hf.hub.retry import WAITS_S, retry
from ddpm_hf.json_records import from_json
from ddpm_hf.model_options import LoadOptions
from ddpm_hf.run_record import MetricRecord
from ddpm_hf.scheduler_spec import SchedulerSpec
from ddpm_hf.utils.text import escaped

# Options that a card may set: none that loads pickled weights or writes files.
CARD_OPTIONS = {field.name for field in fields(EvaluationOptions)} - {
    field.name for field in fields(LoadOptions)
}
# Limits of the work that a card can request.
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
    groups: dict[str, list[_CardFigure]] = {}
    claims = []
    for result in metadata_of(_card(model, options.get("revision"))).get("eval_results") or []:
        try:
            figure = _CardFigure.of(result)
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
    try:
        value = from_json(float, result.metric_value)
    except ValueError:
        value = math.nan
    keys = set(result.metric_args) if isinstance(result.metric_args, dict) else set()
    is_of_training = "evaluate" not in keys and not keys.isdisjoint({"bound", "samples"})
    if is_of_training:
        reason = "measured in training; `ddpm-hf evaluate --card` adds figures to verify"
    return Claim(_name(result), value, remark=reason, is_checkable=not is_of_training)


def _card(model: str | os.PathLike[str], revision: str | None) -> str:
    """The text of the model card."""
    folder, name = Path(model).expanduser(), os.fspath(model)
    if folder.is_dir():
        return read_text(folder / "README.md")
    check_repo_id(name, may_be_folder=True)
    path = retry(lambda: hf_hub_download(name, "README.md", revision=revision), name, WAITS_S)
    return read_text(Path(path))


@dataclass(frozen=True)
class _CardFigure:
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
        try:
            value = from_json(float, result.metric_value)
            low, high = from_json(Interval, args.get("interval"))
        except ValueError:
            raise ValueError("its value and interval must be finite numbers") from None
        if low > high:
            raise ValueError("its interval must not end before it starts")
        metrics = recorded.get("metrics")
        is_list = isinstance(metrics, list) and all(isinstance(name, str) for name in metrics)
        if not is_list or not metrics or not {*metrics} <= {*METRIC_NAMES}:
            raise ValueError("it records no valid metric of `evaluate`")
        return cls(
            name=_name(result),
            value=value,
            interval=(low, high),
            metrics=tuple(metrics),
            options=_options({key: recorded[key] for key in recorded if key != "metrics"}),
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
        options = EvaluationOptions(**recorded)
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
    model: Any, dataset: Any, group: Sequence[_CardFigure], options: Mapping[str, Any]
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
    chosen = {**first.options.to_dict(), **options, "features": features, "metrics": metrics}
    evaluation = evaluate(model, first.hub_id if dataset is None else dataset, **chosen)
    measured = {metric.name: metric for metric in card_metrics(evaluation)}
    return [_claim(figure, measured.get(figure.name)) for figure in group]


def _claim(figure: _CardFigure, measured: MetricRecord | None) -> Claim:
    """The claim of a figure, next to what was measured."""
    if measured is None:
        return Claim(figure.name, figure.value, remark="no such figure was measured")
    args = measured.args
    changed = [what for key, what in _IDENTITY.items() if figure.args.get(key) != args.get(key)]
    remark = f"the {' and '.join(changed)} differ from the card's" if changed else ""
    # The narrower interval decides: a wide one in the card cannot hide a difference.
    intervals = (figure.interval, tuple(args["interval"]))
    low, high = min(intervals, key=lambda ends: ends[1] - ends[0])
    return Claim(figure.name, figure.value, measured.value, (low, high), remark)
