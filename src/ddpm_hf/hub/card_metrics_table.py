"""Evaluation section of a model card: rows of metrics, their commands, and why bounds differ."""

from ddpm_hf.evaluation.recorded_command import RecordedFigure, commands_of
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
    """Commands that measure the metrics of `evaluate` again, for a code block."""
    figures = []
    for metric in metrics:
        options, bound = metric.args.get("evaluate"), metric.args.get("bound")
        dataset = metric.dataset.hub_id or metric.dataset.name
        if isinstance(options, dict) and dataset and not dataset.startswith("-"):
            count = bound.get("num_images") if isinstance(bound, dict) else None
            number = count if isinstance(count, int) else None
            figures.append(RecordedFigure(dataset, options, number))
    return [command for command in commands_of(figures, model) if _is_safe(command)]


def _is_safe(command: str) -> bool:
    """Whether the line stays inside a code block, and contains no marker of a section."""
    return command.isprintable() and not set(command) & set("`<")
