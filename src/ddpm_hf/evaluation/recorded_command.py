"""`ddpm-hf evaluate` commands for result files and model cards; imports no torch."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from ddpm_hf.evaluation.options import (
    BITS,
    METRIC_NAMES,
    BatchOptions,
    EvaluationOptions,
    FeatureOptions,
    LikelihoodOptions,
    PerClassOptions,
)

_DEFAULTS = {field.name: field.default for field in fields(EvaluationOptions)}


def command_of(
    subjects: Sequence[str], dataset: str, options: Mapping[str, object], command: str = "evaluate"
) -> str:
    """Command line that measures the same, without options at their default."""
    defaults: dict[str, object] = dict(_DEFAULTS)
    if command == "evaluate" and not options.get("scheduler") and not options.get("schedulers"):
        defaults["metrics"] = [BITS]
    words = ["ddpm-hf", command, *subjects, dataset]
    for name, value in options.items():
        if value not in (None, [], defaults.get(name)):
            values = value if isinstance(value, list) else [value] if value is not True else []
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


@dataclass(frozen=True)
class RecordedFigure:
    """A figure of a model card and the options that it was measured with.

    Attributes:
        dataset: name of the real images.
        options: of `evaluate`, with "metrics".
        num_images: number of images of a bound, which may be less than the option.
    """

    dataset: str
    options: Mapping[str, object]
    num_images: int | None = None

    def relevant_options(self) -> dict[str, object]:
        """The known options that affect the figure, except "metrics" and values like flags."""
        is_bound = self.options.get("metrics") == [BITS]
        groups = (BatchOptions, PerClassOptions, FeatureOptions if is_bound else LikelihoodOptions)
        known = _DEFAULTS.keys() - {field.name for group in groups for field in fields(group)}
        options: dict[str, object] = {
            name: value
            for name, value in self.options.items()
            if name in known and isinstance(value, str | int | float) and str(value)[:2] != "--"
        }
        if self.num_images is not None and options.get("num_images") is not None:
            options["num_images"] = self.num_images
        return options


def commands_of(figures: Iterable[RecordedFigure], model: str) -> list[str]:
    """Commands that measure the figures of a model again, as few as possible."""
    metrics: dict[tuple[str, str], list[str]] = {}
    for figure in figures:
        names = figure.options.get("metrics")
        key = figure.dataset, json.dumps(figure.relevant_options())
        known = metrics.setdefault(key, [])
        if isinstance(names, list):
            known += [name for name in METRIC_NAMES if name in names and name not in known]
    return [
        command_of([model], dataset, {"metrics": names, **json.loads(options)})
        for (dataset, options), names in metrics.items()
        if names
    ]
