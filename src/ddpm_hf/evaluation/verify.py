"""The figures that a model's card claims, measured again."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ddpm_hf.evaluation.evaluate import evaluate
from ddpm_hf.evaluation.features import DEFAULT_FEATURES, OFFLINE_FEATURES
from ddpm_hf.evaluation.measurement import name_of
from ddpm_hf.evaluation.report import BITS, card_results

# What a card may say about how: nothing that opens pickled weights or writes files.
OPTIONS = {
    "metrics", "features", "num_images", "seed", "split", "reference_split", "dataset_config",
    "dataset_revision", "image_column", "class_column", "per_class", "on_bad_image",
    "scheduler", "num_inference_steps", "num_timesteps", "decoder", "batch_size",
}  # fmt: skip
# What a card keeps of the things that a figure is of.
_KNOWN_BY = {"weights": "weights", "features": "features", "held_out": "held-out images"}


@dataclass(frozen=True)
class Claim:
    """A figure in a card.

    Attributes:
        name: of the figure.
        claimed: what the card says.
        measured: what it is now; None where it was not measured.
        interval: of 95 %: the card's or the one measured now, whichever is narrower.
        remark: what else differs, or why it was not measured.
    """

    name: str
    claimed: float
    measured: float | None = None
    interval: tuple[float, float] | None = None
    remark: str = ""

    @property
    def is_reproduced(self) -> bool | None:
        """Whether both differ by no more than half the interval's width; None if not measured."""
        if self.measured is None or self.interval is None:
            return None
        # Where the interval is a point, such as a share of 1, all but rounding must agree.
        tolerance = max((self.interval[1] - self.interval[0]) / 2, 1e-6 * abs(self.measured))
        return abs(self.claimed - self.measured) <= tolerance


def verify(model: str | os.PathLike[str], dataset: Any = None, **options: Any) -> list[Claim]:
    """Measure again what the card of a model claims.

    Args:
        model: name or folder of a model with figures of `evaluate` in its card's model-index.
        dataset: the real images; by default the data set on the Hub that the card names.
        **options: of `evaluate`, in place of the card's; but `features` are for those figures whose
            features the card calls so, such as the last part of a folder.
    Returns:
        a claim for each figure; those of other programs are not measured. None are returned by
        other processes than the main one.
    Raises:
        ValueError, OSError: if there is no figure to verify, or it cannot be measured.
    """
    path = Path(model).expanduser()
    card = ModelCard.load(path / "README.md" if path.is_dir() else os.fspath(model))
    results = card.data.eval_results or []
    groups: dict[str, list[Any]] = {}
    claims = []
    for result in results:
        how = _how(result.metric_args)
        if how is None:
            remark = "the card does not say how it was measured, or not as `evaluate` does"
            claims.append(Claim(str(result.metric_name), result.metric_value, remark=remark))
            continue
        rest = {key: value for key, value in how.items() if key != "metrics"}
        hub_id = result.dataset_type if "/" in result.dataset_type else None
        groups.setdefault(json.dumps([rest, hub_id], sort_keys=True), []).append(result)
    if not groups:
        raise ValueError(
            f"the card of {os.fspath(model)!r} has no figure that says how to measure it"
        )
    for group in groups.values():
        claims += _measured(model, dataset, group, options)
    return claims


def _how(args: Any) -> dict[str, Any] | None:
    """The options by which a figure was measured; None where a card has none that can be used."""
    how, interval = (
        args.get(k) if isinstance(args, dict) else None for k in ("evaluate", "interval")
    )
    is_usable = (
        isinstance(how, dict)
        and set(how) <= OPTIONS
        and isinstance(how.get("metrics"), list)
        and isinstance(interval, list)
        and [isinstance(end, int | float) for end in interval] == [True, True]
    )
    return how if is_usable else None


def _features(how: dict[str, Any], metrics: list[str], given: Any) -> Any:
    """Those that the card names: `given`, where they are called that."""
    name = how.get("features", DEFAULT_FEATURES)
    if given is not None and name_of(given) == name:
        return given
    if metrics != [BITS] and name not in OFFLINE_FEATURES and "/" not in name:
        raise ValueError(
            f"the card's features {name!r} are those of a folder or a network, which a card cannot"
            f" name: pass features=PATH/{name}"
        )
    return name


def _measured(model: Any, dataset: Any, group: list[Any], options: dict[str, Any]) -> list[Claim]:
    """The claims of figures that one evaluation measures."""
    how = group[0].metric_args["evaluate"]
    metrics = list(
        dict.fromkeys(m for result in group for m in result.metric_args["evaluate"]["metrics"])
    )
    source = dataset
    if source is None:
        if "/" not in group[0].dataset_type:
            raise ValueError(
                f"the card names the data set {group[0].dataset_name!r}, which is not on the Hub:"
                " say where it is"
            )
        source = group[0].dataset_type
    options = options | {"features": _features(how, metrics, options.get("features"))}
    report = evaluate(model, source, **how | options | {"metrics": metrics})
    if report is None:
        return []
    rows = {row["name"]: row for row in card_results(report)}
    claims = []
    for result in group:
        args, name = result.metric_args, result.metric_name
        if name not in rows:
            claims.append(Claim(name, result.metric_value, remark="no such figure was measured"))
            continue
        now = rows[name]["args"]
        changed = [what for key, what in _KNOWN_BY.items() if args.get(key) != now.get(key)]
        remark = f"the {' and '.join(changed)} are others than the card's" if changed else ""
        # A card that claims a wide interval is held to the one that was measured.
        low, high = min(args["interval"], now["interval"], key=lambda ends: ends[1] - ends[0])
        value = rows[name]["value"]
        claims.append(Claim(name, result.metric_value, value, (low, high), remark))
    return claims
