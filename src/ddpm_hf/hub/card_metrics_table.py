"""Evaluation section of a model card: rows of metrics, their commands, and why bounds differ."""

import json
from collections.abc import Mapping
from dataclasses import fields

from ddpm_hf.evaluation_options import (
    BITS,
    DEFAULTS,
    METRIC_NAMES,
    BatchOptions,
    FeatureOptions,
    LikelihoodOptions,
    PerClassOptions,
    command_of,
)
from ddpm_hf.hub.card_facts import MetricFacts
from ddpm_hf.hub.markdown import NOT_RECORDED, inline

# Keys of `run_record.BoundSetup`, and how a bound depends on them.
_DIFFERENCES = {
    "images": "on different images",
    "num_inference_steps": "in different numbers of steps K (more steps lower the bound)",
    "num_timesteps": "by different numbers of terms per image (fewer terms have the same mean and a"
    " larger standard error)",
    "is_calibrated": "with different variances (calibrated ones lower the bound)",
    "eta": "with different noise of the sampler (eta)",
}


def metric_row(metric: MetricFacts) -> tuple[str, str, str]:
    """Name, value and measurement of a metric."""
    value = "no finite value" if metric.value is None else f"{metric.value:.4g}"
    dataset = f"on {metric.dataset.name}" if metric.dataset.name else None
    how = "; ".join(filter(None, [metric.how, dataset]))
    return inline(metric.name or NOT_RECORDED), value, inline(how or NOT_RECORDED)


def bound_differences(metrics: tuple[MetricFacts, ...]) -> str:
    """A sentence about why several bits/dim differ; empty for fewer than two."""
    bounds = [metric.args.get("bound") for metric in metrics if metric.type == "bits-per-dim"]
    if len(bounds) < 2:
        return ""
    setups = [bound for bound in bounds if isinstance(bound, dict)]
    if len(setups) < len(bounds):
        return "The bits/dim differ because they were measured differently: see the last column."
    reasons = [
        text for key, text in _DIFFERENCES.items() if len({repr(x.get(key)) for x in setups}) > 1
    ]
    listing = ", ".join(reasons or ["with different noise"])
    return f"The bits/dim differ because they were measured {listing}."


def evaluate_commands(metrics: tuple[MetricFacts, ...], model: str) -> list[str]:
    """Commands that measure the metrics of `evaluate` again, as few as possible, for a code block.

    Args:
        metrics: "evaluate" in their `args` are the options.
        model: name of the model in the commands.
    """
    by_setup: dict[tuple[str, str], list[str]] = {}  # dataset and options
    for metric in metrics:
        options, dataset = metric.args.get("evaluate"), metric.dataset.hub_id or metric.dataset.name
        if not isinstance(options, dict) or not dataset or dataset.startswith("-"):
            continue
        setup = dataset, json.dumps(_relevant_options(options, metric.args.get("bound")))
        names, measured = by_setup.setdefault(setup, []), options.get("metrics")
        if isinstance(measured, list):
            names += [name for name in METRIC_NAMES if name in measured and name not in names]
    commands = (
        command_of([model], dataset, {"metrics": names, **json.loads(options)})
        for (dataset, options), names in by_setup.items()
        if names
    )
    return [command for command in commands if _is_safe(command)]


def _relevant_options(options: Mapping[str, object], bound: object) -> dict[str, object]:
    """The known options that affect a figure, except "metrics" and values like flags.

    Args:
        options: of `evaluate`.
        bound: setup of a bound, which may have measured fewer images than requested.
    """
    others = FeatureOptions if options.get("metrics") == [BITS] else LikelihoodOptions
    groups = (BatchOptions, PerClassOptions, others)
    known = DEFAULTS.keys() - {field.name for group in groups for field in fields(group)}
    relevant: dict[str, object] = {
        name: value
        for name, value in options.items()
        if name in known and isinstance(value, str | int | float) and str(value)[:2] != "--"
    }
    count = bound.get("num_images") if isinstance(bound, dict) else None
    if isinstance(count, int) and relevant.get("num_images") is not None:
        relevant["num_images"] = count
    return relevant


def _is_safe(command: str) -> bool:
    """Whether the line stays inside a code block, and contains no marker of a section."""
    return command.isprintable() and not set(command) & set("`<")
