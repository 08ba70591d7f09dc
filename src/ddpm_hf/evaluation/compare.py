"""`compare`: models, image sets, samplers and numbers of steps side by side."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ddpm_hf.evaluation.comparison_results import (
    Comparison,
    ComparisonRow,
    LeftOut,
    SettingFacts,
    setting_labels,
)
from ddpm_hf.evaluation.expected_time import announce_time, num_steps_and_calls
from ddpm_hf.evaluation.measurement import Evaluator
from ddpm_hf.evaluation.options import ComparisonOptions, EvaluationOptions, public_name_of
from ddpm_hf.evaluation.ranking import ranked
from ddpm_hf.evaluation.recorded_command import command_of
from ddpm_hf.evaluation.result_files import (
    COMPARISON_FILE,
    EVALUATION_FILE,
    results_folder,
    write_result,
)
from ddpm_hf.evaluation.result_pictures import save_comparison_pictures
from ddpm_hf.evaluation.results import Evaluation
from ddpm_hf.evaluation.subjects import Subject, default_metrics, is_model
from ddpm_hf.options import takes_options
from ddpm_hf.scheduler_spec import SchedulerSpec
from ddpm_hf.shared_work import on_main_process


@dataclass(frozen=True)
class Setting:
    """A row of the comparison before it is measured.

    Attributes:
        source: a model or images.
        name: label of the source.
        scheduler: for a model, None for its own.
        num_inference_steps: for a model, K; None for the scheduler's usual number.
    """

    source: Any
    name: str
    scheduler: str | None = None
    num_inference_steps: int | None = None

    def __str__(self) -> str:
        steps = self.num_inference_steps
        parts = [self.name, self.scheduler, steps and f"K = {steps:,}"]
        return ", ".join(part for part in parts if part) or "own scheduler"

    @property
    def folder(self) -> str:
        """Name of the folder of its evaluation."""
        parts = (self.name, self.scheduler, self.num_inference_steps)
        return re.sub(r"[^\w.+=-]+", "-", "-".join(str(part) for part in parts if part))


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
        **options: see `evaluation.options.ComparisonOptions`.
    Returns:
        the comparison, on every rank.
    Raises:
        ValueError, OSError: if the data cannot be used, no setting can be measured, or another
            process uses `output`.
        TypeError: for an unknown option.
    """
    shared = ComparisonOptions.from_keywords(**options)
    if isinstance(models_or_images, str | os.PathLike) or hasattr(models_or_images, "unet"):
        models_or_images = [models_or_images]
    if not models_or_images:
        raise ValueError("`models_or_images` is empty: give at least one model or set of images")
    if (schedulers or num_inference_steps) and not any(map(is_model, models_or_images)):
        raise ValueError("`schedulers` and `num_inference_steps` need a model; all are images")
    schedulers = [str(SchedulerSpec.parse(name)) for name in schedulers]
    if metrics is None:
        metrics = default_metrics(models_or_images, bool(schedulers))
    settings = list(_settings(models_or_images, schedulers, num_inference_steps))
    evaluator = Evaluator(dataset, metrics, EvaluationOptions(**vars(shared)), progress=progress)
    with results_folder(evaluator.state, output) as folder:
        evaluator.use_hold_out_of(models_or_images)
        rows, left_out = compare_settings(evaluator, settings, folder)
        facts, names = evaluator.data.facts(), list(map(public_name_of, models_or_images))
        comparison = Comparison(
            dataset=facts,
            settings=rows,
            left_out=left_out,
            metrics=tuple(metrics),
            schedulers=tuple(schedulers),
            num_inference_steps=tuple(num_inference_steps),
            options=shared.recorded(),
            command="",
        )
        recorded = {key: value for key, value in comparison.to_dict()["options"].items() if value}
        comparison = replace(comparison, command=command_of(names, facts.name, recorded))

        def write() -> Comparison:
            if output is not None:
                write_result(folder, comparison, COMPARISON_FILE)
                save_comparison_pictures(comparison, folder)
            return comparison

        return on_main_process(evaluator.state, write)


def compare_settings(
    evaluator: Evaluator, settings: Sequence[Setting], folder: Path
) -> tuple[tuple[ComparisonRow, ...], tuple[LeftOut, ...]]:
    """Measure and rank settings, each in its own subfolder.

    Args:
        evaluator: measures them.
        settings: what is compared.
        folder: of the comparison.
    Returns:
        the measured settings, and those left out.
    Raises:
        ValueError, OSError: see `compare`.
    """
    rows: list[ComparisonRow] = []
    evaluations: list[Evaluation] = []
    left_out: list[LeftOut] = []
    for setting, subject in _loaded(evaluator, settings, folder):
        subfolder = folder / setting.folder
        try:
            row, evaluation = _measure(evaluator, subject, setting, subfolder)
        except ValueError as error:
            names = {"setting": str(setting), "name": setting.name or None}
            left_out.append(LeftOut.of(setting, **names, reason=str(error)))
            with suppress(OSError):
                subfolder.rmdir()  # if it is empty
            continue
        rows.append(row)
        evaluations.append(evaluation)
    if not rows:
        raise ValueError(f"none of the settings can be measured: {left_out[0].reason}")
    return tuple(ranked(rows, evaluations)), tuple(left_out)


def _settings(
    sources: Sequence[Any], schedulers: Sequence[str], steps: Sequence[int]
) -> Iterator[Setting]:
    """All combinations without duplicates; images have neither scheduler nor steps."""
    names = _distinct_names(sources) if len(sources) > 1 else [""]
    for source, name in zip(sources, names, strict=True):
        if not is_model(source):
            yield Setting(source, name or public_name_of(source))
            continue
        for scheduler in dict.fromkeys(schedulers) or (None,):
            for K in dict.fromkeys(steps) or (None,):
                yield Setting(source, name, scheduler, K)


def _distinct_names(sources: Sequence[Any]) -> list[str]:
    """The last part of each path, or as many parts as distinguish them."""
    names = [public_name_of(source) for source in sources]
    paths = [
        Path(source).expanduser().absolute().parts if isinstance(source, str | os.PathLike) else ()
        for source in sources
    ]
    for length in range(2, max(map(len, paths), default=0) + 1):
        if len(set(names)) == len(names):
            break
        shared = [names.count(name) > 1 for name in names]
        names = [
            "/".join(path[-length:]) if is_shared and path else name
            for name, path, is_shared in zip(names, paths, shared, strict=True)
        ]
    return [
        name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, start=1)
    ]


def _loaded(
    evaluator: Evaluator, settings: Sequence[Setting], folder: Path
) -> Iterator[tuple[Setting, Subject]]:
    """The settings with their subjects; consecutive settings of one source load it once."""
    source, subject = None, None
    facts = [SettingFacts.of(s, setting=f"{s}", name=s.name or None) for s in settings]
    labels = setting_labels(facts)
    for number, setting in enumerate(settings, start=1):
        if subject is None or setting.source is not source:
            source, subject = setting.source, evaluator.load(setting.source)
            if evaluator.image_metrics:
                evaluator.real_images(subject)  # an error here concerns all settings
            mine = [setting for setting in settings if setting.source is source]
            announce_time(evaluator, subject, _calls(subject, mine, folder))
        if evaluator.progress:
            tqdm.write(f"{number} of {len(settings)}: {labels[str(setting)]}", file=sys.stderr)
        yield setting, subject


def _calls(subject: Subject, settings: Sequence[Setting], folder: Path) -> list[int]:
    """Network calls per image of the settings of a model that are not measured yet."""
    calls = []
    for setting in settings if subject.is_model else ():
        if not (folder / setting.folder / EVALUATION_FILE).exists():
            with suppress(ValueError):  # the setting is left out
                calls.append(_num_steps_and_calls(subject, setting)[1])
    return calls


def _num_steps_and_calls(subject: Subject, setting: Setting) -> tuple[int, int]:
    return num_steps_and_calls(subject.source, setting.scheduler, setting.num_inference_steps)


def _measure(
    evaluator: Evaluator, subject: Subject, setting: Setting, folder: Path
) -> tuple[ComparisonRow, Evaluation]:
    options, num_calls = evaluator.options, None
    if subject.is_model:
        K, num_calls = _num_steps_and_calls(subject, setting)
        options = replace(options, scheduler=setting.scheduler, num_inference_steps=K)
    evaluation = evaluator.evaluate(subject, folder, options)
    seconds = [figure.measured_with.seconds_per_image for figure in evaluation.image_metrics]
    if evaluation.bound is not None and not evaluation.image_metrics:
        num_calls, seconds = evaluation.bound.num_timesteps, [evaluation.bound.seconds_per_image]
    row = ComparisonRow(
        setting=str(setting),
        name=setting.name or None,
        scheduler=setting.scheduler,
        num_inference_steps=options.num_inference_steps,
        model=evaluation.model,
        num_network_calls=num_calls,
        seconds_per_image=next((value for value in seconds if value is not None), None),
        folder=folder.name,
        figures={},
    )
    return row, evaluation
