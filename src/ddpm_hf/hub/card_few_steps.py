"""What a model card says of few steps: what they lose, and which sampler takes them best.

Its facts may be anybody's: nothing of them stands in code but the names and numbers that
`SchedulerSpec.parse` knows.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ddpm_hf.scheduler_spec import SchedulerSpec, stock_scheduler

Inline = Callable[[Any], str]
Facts = Mapping[str, Any]


def bits_of_few_steps(calibration: Facts, inline: Inline, unknown: str) -> dict[str, Any]:
    """The table of bits/dim against the number of steps, for the template."""
    rows = calibration.get("rows") or []
    columns = {"bits_per_dim": "calibrated variances", "published": "as published"}
    columns = {key: title for key, title in columns.items() if rows and key in rows[0]}
    whole = rows[-1]["bits_per_dim"] if rows else 0.0
    return {
        "few_steps": [
            [
                f"{row['num_inference_steps']:,}",
                *(f"{row[key]:.3f} ({row[key] - whole:+.3f})" for key in columns),
            ]
            for row in rows
        ],
        "few_steps_titles": list(columns.values()),
        "few_steps_how": inline(calibration.get("how") or unknown),
    }


def samplers_of_few_steps(sweep: Facts, recommended: Any, inline: Inline) -> dict[str, Any]:
    """The table of samplers, and the code that takes the recommended one, for the template.

    Args:
        sweep: of `evaluation.sweep.sweep`, or nothing.
        recommended: what the scheduler's configuration says.
        inline: makes text a table cell.
    """
    try:
        rows = [[inline(cell) for cell in _cells(row)] for row in sweep.get("settings") or []]
        how = [f"{remark[0].upper()}{remark[1:]}." for remark in sweep.get("remarks") or []]
    except (LookupError, TypeError, ValueError):
        rows, how = [], []
    chosen = _setting(recommended)
    for_stock = _setting(sweep.get("for_stock")) if chosen else None
    return {
        "samplers": rows,
        "samplers_how": [inline(sentence) for sentence in how],
        "recommended": chosen and f"`{chosen[0]}`, {chosen[1]:,} steps",
        "stock": for_stock and _stock_code(*for_stock),
        "stock_steps": for_stock and for_stock[1],
        "stock_differs": for_stock is not None and for_stock != chosen,
    }


def _cells(row: Facts) -> list[str]:
    figure = row["figures"]["fd"]
    (low, high), seconds = figure["interval"], row.get("seconds_per_image")
    return [
        str(row["scheduler"]),
        f"{row['num_inference_steps']:,}",
        f"{row['num_network_calls']:,}",
        f"{seconds:.3g}" if seconds else "",
        f"{figure['value']:.4g} +- {(high - low) / 2:.2g}",
        figure["rank"],
    ]


def _setting(found: Any) -> tuple[SchedulerSpec, int] | None:
    """SchedulerSpec and steps; None where there is nothing that is known here."""
    try:
        return SchedulerSpec.parse(found["scheduler"]), int(found["num_inference_steps"])
    except (LookupError, TypeError, ValueError):
        return None


def _stock_code(sampler: SchedulerSpec, num_steps: int) -> dict[str, str] | None:
    """The class to import, and the call that makes the scheduler of another one's configuration."""
    found = stock_scheduler(str(sampler))
    if found is None or not all(option.isidentifier() for option in found[1]):
        return None
    quoted = {k: f'"{v}"' if isinstance(v, str) else repr(v) for k, v in found[1].items()}
    options = "".join(f",\n    {option}={value}" for option, value in quoted.items())
    return {
        "class": found[0],
        "call": f"{found[0]}.from_config(\n    pipe.scheduler.config{options},\n)",
    }
