"""Sections of a model card about few steps: bits/dim against K, and the recommended sampler.

The facts may come from anyone: code in the card contains only names and numbers that
`SchedulerSpec.parse` accepts.
"""

from typing import NamedTuple

from ddpm_hf.hub.card_facts import SamplerFacts, SettingFacts, StepsFacts
from ddpm_hf.hub.markdown import inline
from ddpm_hf.scheduler_spec import SchedulerSpec, stock_scheduler


def steps_table(facts: tuple[StepsFacts, ...]) -> list[list[str]]:
    """Titles and rows of the table of bits/dim against the number of steps; empty without rows."""
    rows = [row for row in facts if row.num_inference_steps and row.bits_per_dim is not None]
    if not rows:
        return []
    columns = {"calibrated variances": [row.bits_per_dim for row in rows]}
    if all(row.published is not None for row in rows):
        columns["as published"] = [row.published for row in rows]
    of_all_steps = rows[-1].bits_per_dim or 0.0
    cells = [
        [f"{x:.3f} ({x - of_all_steps:+.3f})" for x in values if x is not None]
        for values in columns.values()
    ]
    steps = [f"{row.num_inference_steps:,}" for row in rows]
    return [["K", *columns], *map(list, zip(steps, *cells, strict=True))]


class SamplerTables(NamedTuple):
    """Rows of the tables of samplers.

    Attributes:
        shown: the best and the recommended setting; all settings if none of them is known.
        folded: all settings, if there are more.
        num_ties: number of settings that tie with the best.
    """

    shown: list[list[str]]
    folded: list[list[str]]
    num_ties: int


def sampler_tables(settings: tuple[SettingFacts, ...], recommended: SamplerFacts) -> SamplerTables:
    """Tables of samplers; incomplete settings are left out."""
    chosen = recommended.scheduler, recommended.num_inference_steps
    rows = [(row, list(map(inline, cells))) for row in settings if (cells := _cells(row))]
    shown = [
        cells
        for row, cells in rows
        if cells[-1] == "best" or (row.scheduler, row.num_inference_steps) == chosen
    ]
    table = [cells for _, cells in rows]
    if not shown or len(shown) == len(table):
        return SamplerTables(table, [], 0)
    return SamplerTables(shown, table, sum(cells[-1] == "tie" for cells in table))


def _cells(row: SettingFacts) -> list[str]:
    figure, seconds = row.figures.get("fd"), row.seconds_per_image
    steps, calls = row.num_inference_steps, row.num_network_calls
    if figure is None or figure.value is None or len(figure.interval) != 2:
        return []
    if not (row.scheduler and steps and calls):
        return []
    low, high = figure.interval
    value = f"{figure.value:.4g} +- {(high - low) / 2:.2g}"
    timing = f"{seconds:.3g}" if seconds else ""
    return [row.scheduler, f"{steps:,}", f"{calls:,}", timing, value, figure.rank or ""]


def parsed_sampler(facts: SamplerFacts) -> tuple[SchedulerSpec, int] | None:
    """Scheduler and number of steps; None if missing or unknown."""
    if not facts.scheduler or not facts.num_inference_steps:
        return None
    try:
        return SchedulerSpec.parse(facts.scheduler), facts.num_inference_steps
    except ValueError:
        return None


class StockCode(NamedTuple):
    """Code that samples with stock diffusers."""

    scheduler_class: str
    scheduler_call: str
    num_inference_steps: int


def stock_code(sampler: SchedulerSpec, num_inference_steps: int) -> StockCode | None:
    """Code for a sampler; None if stock diffusers cannot run it."""
    stock = stock_scheduler(str(sampler))
    if stock is None or not all(option.isidentifier() for option in stock[1]):
        return None
    quoted = {k: f'"{v}"' if isinstance(v, str) else repr(v) for k, v in stock[1].items()}
    options = "".join(f",\n    {option}={value}" for option, value in quoted.items())
    call = f"{stock[0]}.from_config(\n    pipe.scheduler.config{options},\n)"
    return StockCode(stock[0], call, num_inference_steps)
