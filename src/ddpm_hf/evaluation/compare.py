"""`compare`: models, image sets, samplers and numbers of steps side by side."""

import itertools
import math
import os
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ddpm_hf.evaluation.comparison_results import (
    Comparison,
    ComparisonRow,
    LeftOut,
    RankedFigure,
    Setting,
    setting_labels,
)
from ddpm_hf.evaluation.evaluate import Evaluator
from ddpm_hf.evaluation.expected_time import num_steps_and_calls
from ddpm_hf.evaluation.figures import NORMAL_95, BoundResult, MetricResult
from ddpm_hf.evaluation.metrics import LOWER_IS_BETTER, T_19
from ddpm_hf.evaluation.result_files import COMPARISON_FILE, results_folder, write_result
from ddpm_hf.evaluation.result_pictures import save_comparison_pictures
from ddpm_hf.evaluation.results import Evaluation
from ddpm_hf.evaluation.subjects import Subject, default_metrics, is_model
from ddpm_hf.evaluation_options import (
    ComparisonOptions,
    EvaluationOptions,
    command_of,
    public_name_of,
)
from ddpm_hf.options import takes_options
from ddpm_hf.scheduler_spec import SchedulerSpec
from ddpm_hf.utils.shared_work import on_main_process

Plan = Sequence[tuple[Any, Sequence[Setting]]]
"""Models or images, each with its settings."""


@takes_options(ComparisonOptions)
def compare(
    models_or_images: Sequence[Any],
    dataset: Any,
    *,
    schedulers: Sequence[str] = (),
    num_inference_steps: Sequence[int] = (),
    metrics: Sequence[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> Comparison:
    """Measure all combinations of models, schedulers and numbers of steps, and sets of images.

    Each combination is an evaluation in its own subfolder of `output`, with the same seed.
    Finished evaluations are reused and interrupted ones resume, on one rank or on all ranks of
    `accelerate launch`. Features of the real images are computed once. A setting that cannot be
    measured, such as too many steps for a scheduler, is left out and listed with the reason.

    Args:
        models_or_images: see `evaluate`.
        dataset: the real images; see `evaluate`.
        schedulers: names such as "DDIM" or "DDPM:eta=0"; by default the model's own.
        num_inference_steps: numbers of steps K; by default the usual number of the scheduler.
        metrics: see `evaluate`; default: "bits-per-dim" if all subjects are models and no scheduler
            is given, else the other ones.
        output: folder for comparison.json, the pictures and the folders of the settings.
        progress: show progress bars.
        **options: see `evaluation_options.ComparisonOptions`.
    Returns:
        the comparison, on every rank.
    Raises:
        ValueError, OSError: if the data cannot be used, no setting can be measured, or another
            process uses `output`.
        TypeError: for an unknown option.
    """
    shared = ComparisonOptions(**options)
    sources = _checked_sources(models_or_images, bool(schedulers or num_inference_steps))
    schedulers = [str(SchedulerSpec.parse(name)) for name in schedulers]
    if metrics is None:
        metrics = default_metrics(sources, bool(schedulers))
    plan = list(_combinations(sources, schedulers, num_inference_steps))
    evaluator = Evaluator(dataset, metrics, EvaluationOptions(**vars(shared)), progress=progress)
    with results_folder(evaluator.state, output) as folder:
        evaluator.use_hold_out_of(sources)
        rows, left_out = compare_settings(evaluator, plan, folder)
        facts, recorded = evaluator.data.facts(), shared.recorded()
        asked = {
            "metrics": list(metrics),
            "schedulers": schedulers,
            "num_inference_steps": list(num_inference_steps),
            **recorded.to_dict(),
        }
        comparison = Comparison(
            dataset=facts,
            settings=rows,
            left_out=left_out,
            metrics=tuple(metrics),
            schedulers=tuple(schedulers),
            num_inference_steps=tuple(num_inference_steps),
            options=recorded,
            command=command_of(list(map(public_name_of, sources)), facts.name, asked),
        )

        def write() -> Comparison:
            if output is not None:
                write_result(folder, comparison, COMPARISON_FILE)
                save_comparison_pictures(comparison, folder)
            return comparison

        return on_main_process(evaluator.state, write)


def _checked_sources(models_or_images: Any, has_samplers: bool) -> Sequence[Any]:
    """Validated list of models and images."""
    is_single = isinstance(models_or_images, str | os.PathLike) or hasattr(models_or_images, "unet")
    sources: Sequence[Any] = [models_or_images] if is_single else models_or_images
    if not sources:
        raise ValueError("`models_or_images` is empty: give at least one model or set of images")
    if has_samplers and not any(map(is_model, sources)):
        raise ValueError("`schedulers` and `num_inference_steps` need a model; all are images")
    return sources


def _combinations(
    sources: Sequence[Any], schedulers: Sequence[str], steps: Sequence[int]
) -> Iterator[tuple[Any, list[Setting]]]:
    """The settings of each source without duplicates; images have neither scheduler nor steps."""
    names = _distinct_names(sources) if len(sources) > 1 else [None]
    for source, name in zip(sources, names, strict=True):
        if is_model(source):
            samplers = dict.fromkeys(schedulers) or (None,)
            numbers = dict.fromkeys(steps) or (None,)
            yield source, [Setting.named(name, s, K) for s in samplers for K in numbers]
        else:
            yield source, [Setting.named(name or public_name_of(source))]


def _distinct_names(sources: Sequence[Any]) -> list[str]:
    """The last part of each path, or more parts where those of several paths are equal."""
    names = [public_name_of(source) for source in sources]
    paths = [
        Path(source).expanduser().absolute().parts[1:]
        if isinstance(source, str | os.PathLike)
        else ()
        for source in sources
    ]
    for length in range(2, max(map(len, paths), default=0) + 1):
        named = list(zip(names, paths, strict=True))
        shared = [len({path for other, path in named if other == name}) > 1 for name in names]
        if not any(shared):
            break
        names = [
            "/".join(path[-length:]) if is_shared and path else name
            for name, path, is_shared in zip(names, paths, shared, strict=True)
        ]
    return [
        name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, start=1)
    ]


def compare_settings(
    evaluator: Evaluator, plan: Plan, folder: Path
) -> tuple[tuple[ComparisonRow, ...], tuple[LeftOut, ...]]:
    """Measure and rank settings, each in its own subfolder.

    Args:
        evaluator: measures them.
        plan: what is compared; each source is loaded once.
        folder: of the comparison.
    Returns:
        the measured settings, and those left out.
    Raises:
        ValueError, OSError: see `compare`.
    """
    settings = [setting for _, of_source in plan for setting in of_source]
    labels, numbers = setting_labels(settings), itertools.count(1)
    folder_names = _folder_names(settings)
    measured: list[tuple[ComparisonRow, Evaluation]] = []
    left_out: list[LeftOut] = []
    for source, of_source in plan:
        subject = evaluator.load(source)
        if evaluator.image_metrics:
            evaluator.real_images(subject)  # an error here concerns all settings
        samplers = [(s.scheduler, s.num_inference_steps) for s in of_source]
        folders = [folder / folder_names[setting] for setting in of_source]
        evaluator.announce_time(subject, dict(zip(folders, samplers, strict=True)))
        for setting, subfolder in zip(of_source, folders, strict=True):
            if evaluator.progress:
                text = f"{next(numbers)} of {len(settings)}: {labels[setting.setting]}"
                tqdm.write(text, file=sys.stderr)
            try:
                measured.append(_measure(evaluator, subject, setting, subfolder))
            except ValueError as error:
                left_out.append(LeftOut.of(setting, reason=str(error)))
                with suppress(OSError):
                    subfolder.rmdir()  # if it is empty
    if not measured:
        raise ValueError(f"none of the settings can be measured: {left_out[0].reason}")
    return tuple(_ranked(measured)), tuple(left_out)


def _folder_names(settings: Sequence[Setting]) -> dict[Setting, str]:
    """Folder of each setting; they differ on every file system, by a number if necessary."""
    names, taken = dict[Setting, str](), set()
    for setting in settings:
        parts = (setting.name, setting.scheduler, setting.num_inference_steps)
        base = re.sub(r"[^\w.+=-]+", "-", "-".join(str(part) for part in parts if part))
        choices = itertools.chain([base], (f"{base}-{i}" for i in itertools.count(2)))
        names[setting] = next(name for name in choices if name.casefold() not in taken)
        taken.add(names[setting].casefold())
    return names


def _measure(
    evaluator: Evaluator, subject: Subject, setting: Setting, folder: Path
) -> tuple[ComparisonRow, Evaluation]:
    """The evaluation of a setting, and its row without figures."""
    options, num_calls = evaluator.options, None
    if subject.is_model:
        scheduler = setting.scheduler
        K, num_calls = num_steps_and_calls(subject.source, scheduler, setting.num_inference_steps)
        options = replace(options, scheduler=scheduler, num_inference_steps=K)
    evaluation = evaluator.evaluate(subject, folder, options)
    seconds = [figure.measured_with.seconds_per_image for figure in evaluation.image_metrics]
    if evaluation.bound is not None and not evaluation.image_metrics:
        num_calls, seconds = evaluation.bound.num_timesteps, [evaluation.bound.seconds_per_image]
    row = ComparisonRow.of(
        setting,
        num_inference_steps=options.num_inference_steps,
        model=evaluation.model,
        num_network_calls=num_calls,
        seconds_per_image=next((value for value in seconds if value is not None), None),
        folder=folder.name,
        figures={},
    )
    return row, evaluation


def _ranked(measured: Sequence[tuple[ComparisonRow, Evaluation]]) -> Iterator[ComparisonRow]:
    """The rows with their figures, each ranked among all rows."""
    by_name: dict[str, list[BoundResult | MetricResult]] = {}
    for _, evaluation in measured:
        for name, figure in evaluation.figures.items():
            by_name.setdefault(name, []).append(figure)
    best = {
        name: min(figures, key=lambda f: f.value if LOWER_IS_BETTER[f.name] else -f.value)
        for name, figures in by_name.items()
    }
    for row, evaluation in measured:
        figures = {name: ranked_figure(f, best[name]) for name, f in evaluation.figures.items()}
        yield replace(row, figures=figures)


def ranked_figure(
    figure: BoundResult | MetricResult, best: BoundResult | MetricResult
) -> RankedFigure:
    """A figure of one setting, ranked against that of the best setting."""
    gap, of_chance = figure.value - best.value, gap_of_chance(figure, best)
    is_tie = of_chance is None or abs(gap) <= of_chance
    dims = figure.measured_with.features.dims if isinstance(figure, MetricResult) else None
    return RankedFigure.of(
        figure,
        num_features=dims,
        rank="best" if figure is best else "tie" if is_tie else "",
        gap=gap,
        gap_of_chance=of_chance,
    )


def gap_of_chance(a: BoundResult | MetricResult, b: BoundResult | MetricResult) -> float | None:
    """Half-width of the 95 % interval of the difference of two figures; None for one image.

    Paired if possible: the settings share the real images, their halves, and the noise of each
    drawn image.
    """
    # Bounds of the images, or values of the halves.
    first, second = (f.total if isinstance(f, BoundResult) else f.halves for f in (a, b))
    if len(first) < 2:
        return None
    factor = NORMAL_95 / math.sqrt(len(first)) if isinstance(a, BoundResult) else T_19
    if len(first) == len(second):
        return factor * statistics.stdev(x - y for x, y in zip(first, second, strict=True))
    return factor * math.hypot(statistics.stdev(first), statistics.stdev(second))
