"""Models, sets of images, samplers and numbers of steps: measured alike, side by side."""

import copy
import math
import os
import re
import statistics
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ddpm_hf.diffusion.scheduler_interface import set_timesteps
from ddpm_hf.diffusion.schedules import usual_num_steps
from ddpm_hf.evaluation.comparison_report import save_pictures
from ddpm_hf.evaluation.measurement import (
    EvaluationOptions,
    Evaluator,
    Subject,
    is_model,
    name_of,
)
from ddpm_hf.evaluation.metrics import METRICS, T_19
from ddpm_hf.evaluation.report import (
    BITS,
    NORMAL_95,
    command_of,
    made_by,
    results_folder,
    write_report,
)
from ddpm_hf.sampling.sampler_choice import sampled_by
from ddpm_hf.scheduler_spec import SchedulerSpec

FILE_NAME = "comparison.json"
_OF_FIGURE = ("name", "label", "value", "interval", "standard_error", "floor", "floor_num_images",
              "verdict", "note", "num_drawn", "num_real")  # fmt: skip
_LOWER_IS_BETTER = {BITS: True} | {
    figure.name: figure.lower_is_better for _, of in METRICS.values() for figure in of
}


@dataclass(frozen=True)
class Setting:
    """A row of the comparison, before it is measured.

    Attributes:
        source: a model or images.
        name: what the source is called here.
        scheduler: of a model, the name of a sampler; None for its own.
        num_inference_steps: of a model, K; None for the scheduler's usual number.
    """

    source: Any
    name: str
    scheduler: str | None = None
    num_inference_steps: int | None = None

    def __str__(self) -> str:
        steps = self.num_inference_steps
        named = [self.name, self.scheduler, steps and f"K = {steps:,}"]
        return ", ".join(part for part in named if part)

    @property
    def folder(self) -> str:
        """Where it is kept."""
        named = (self.name, self.scheduler, self.num_inference_steps)
        return re.sub(r"[^\w.+=-]+", "-", "-".join(str(part) for part in named if part))


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
) -> dict[str, Any] | None:
    """Measure every model with every scheduler in every number of steps, and sets of images.

    Each of these settings is an evaluation with a folder of its own in `output`, by the same seed:
    what is done is not done again, and what is interrupted goes on by the same call, alone or with
    all processes of `accelerate launch`. Features of the real images are computed once. A setting
    that cannot be, such as too many steps for a scheduler, is left out and named with the reason.

    Args:
        models_or_images: as `evaluate` takes one.
        dataset: the real images; see `evaluate`.
        schedulers: names as `ddpm-hf sample` takes them, such as "DDIM" or "DDPM:eta=0"; by default
            the model's own.
        num_inference_steps: numbers of steps K; by default what is usual for the scheduler.
        metrics: as for `evaluate`; by default bits/dim of models where no scheduler is given, else
            what compares images.
        output: folder for comparison.json, the pictures and the folders of the settings.
        progress: show progress bars.
        **options: more of `evaluate`.
    Returns:
        what comparison.json holds: "settings", each with its "figures" and, of a model, its seconds
        and network calls for an image; and those "left_out". Of each figure "rank" is "best", "tie"
        if it is too close to the best to tell, or "". None on all but the main process.
    Raises:
        ValueError, OSError: if the data cannot be used, no setting can be measured, or another
            process has `output`.
    """
    if isinstance(models_or_images, str | os.PathLike) or hasattr(models_or_images, "unet"):
        models_or_images = [models_or_images]
    if (schedulers or num_inference_steps) and not any(map(is_model, models_or_images)):
        raise ValueError("schedulers and num_inference_steps are of models; these are images")
    for name in schedulers:
        SchedulerSpec.parse(name)
    if metrics is None:
        is_bound = all(map(is_model, models_or_images)) and not schedulers
        metrics = (BITS,) if is_bound else tuple(METRICS)
    settings = list(_settings(models_or_images, schedulers, num_inference_steps))
    if not settings:
        raise ValueError("models_or_images is empty: there is nothing to compare")
    evaluator = Evaluator(dataset, metrics, EvaluationOptions(**options), progress=progress)
    with results_folder(evaluator.state, output) as folder:
        evaluator.use_held_out_of(models_or_images)
        found = compare_settings(evaluator, settings, folder)
        if found is None:
            return None
        swept = {"schedulers": list(schedulers), "num_inference_steps": list(num_inference_steps)}
        recorded = evaluator.options.recorded()
        del recorded["scheduler"], recorded["num_inference_steps"]
        recorded = {"metrics": list(metrics), **swept, **recorded}
        names = [name_of(source) for source in models_or_images]
        facts = evaluator.data.facts()
        result = {
            "format_version": 1,
            "dataset": facts,
            **found,
            "options": recorded,
            **made_by(command_of(names, facts["name"], {k: v for k, v in recorded.items() if v})),
        }
        if output is not None:
            write_report(folder, result, FILE_NAME)
            save_pictures(result, folder)
    return result


def compare_settings(
    evaluator: Evaluator, settings: Sequence[Setting], folder: Path
) -> dict[str, Any] | None:
    """Measure these settings, each in its folder.

    Args:
        evaluator: measures them.
        settings: what is compared.
        folder: gets their folders.
    Returns:
        "settings" and "left_out"; see `compare`. None on all but the main process.
    Raises:
        ValueError, OSError: as `compare`.
    """
    rows, left_out = _measure_all(evaluator, settings, folder)
    if not evaluator.state.is_main_process:
        return None
    if not rows:
        raise ValueError(f"none of the settings can be measured: {left_out[0]['reason']}")
    _rank(rows)
    rows = [{key: value for key, value in row.items() if key != "draws"} for row in rows]
    return {"settings": rows, "left_out": left_out}


def _settings(
    sources: Sequence[Any], schedulers: Sequence[str], steps: Sequence[int]
) -> Iterator[Setting]:
    """All combinations, each once; images have none."""
    names = _distinct_names(sources) if len(sources) > 1 else [""]
    for source, name in zip(sources, names, strict=True):
        if not is_model(source):
            yield Setting(source, name or name_of(source))
            continue
        for scheduler in dict.fromkeys(schedulers) or (None,):
            for K in dict.fromkeys(steps) or (None,):
                yield Setting(source, name, scheduler, K)


def _distinct_names(sources: Sequence[Any]) -> list[str]:
    """The last part of each path, or as many as tell them apart."""
    names = [name_of(source) for source in sources]
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


def _measure_all(
    evaluator: Evaluator, settings: Sequence[Setting], folder: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows, on the main process, and what is left out with its reason."""
    rows, left_out = [], []
    loaded: tuple[Any, Subject | None] = (None, None)
    for number, setting in enumerate(settings, start=1):
        source, subject = loaded
        if subject is None or source is not setting.source:
            subject = evaluator.load(setting.source)
            loaded = (setting.source, subject)
            if evaluator.metrics != (BITS,):
                evaluator.real(evaluator.facts(subject))  # fails for all settings, if at all
        if evaluator.progress:
            tqdm.write(f"{number} of {len(settings)}: {setting or subject.name}", file=sys.stderr)
        place = folder / setting.folder
        try:
            row = _measured(evaluator, subject, setting, place)
        except ValueError as error:
            left_out.append({**_described(setting), "reason": str(error)})
            with suppress(OSError):
                place.rmdir()  # which is empty
            continue
        if row is not None:
            rows.append(row)
    return rows, left_out


def _measured(
    evaluator: Evaluator, subject: Subject, setting: Setting, folder: Path
) -> dict[str, Any] | None:
    """A row; None on all but the main process."""
    changes: dict[str, Any] = {}
    num_calls = None
    if subject.weights is not None:
        K, num_calls = _num_steps_and_calls(subject.source, setting)
        changes = {"scheduler": setting.scheduler, "num_inference_steps": K}
    report = evaluator.evaluate(subject, folder, **changes)
    if report is None:
        return None
    seconds = [result.get("seconds_per_image") for result in report["results"]]
    return {
        **_described(setting),
        **({} if not changes else {"num_inference_steps": changes["num_inference_steps"]}),
        "model": report["model"],
        "num_network_calls": num_calls,
        "seconds_per_image": next((value for value in seconds if value is not None), None),
        "folder": folder.name,
        "figures": {result["name"]: _figure(result) for result in report["results"]},
        "draws": {result["name"]: _draws(result) for result in report["results"]},
    }


def _described(setting: Setting) -> dict[str, Any]:
    """What a setting is, as JSON values."""
    return {
        "setting": str(setting) or "own scheduler",
        "name": setting.name or None,
        "scheduler": setting.scheduler,
        "num_inference_steps": setting.num_inference_steps,
    }


def _num_steps_and_calls(pipeline: Any, setting: Setting) -> tuple[int, int]:
    """K, and how often the network is called for an image.

    Raises:
        ValueError: if the scheduler cannot make so many steps.
    """
    sampler = SchedulerSpec.parse(setting.scheduler) if setting.scheduler else SchedulerSpec()
    with sampled_by(pipeline, sampler):
        scheduler = copy.deepcopy(pipeline.scheduler)
    kind, T = type(scheduler).__name__, scheduler.config.num_train_timesteps
    K = setting.num_inference_steps or usual_num_steps(kind, T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is said when it is done
        set_timesteps(scheduler, K, None)
    return K, len(scheduler.timesteps)


def _figure(result: dict[str, Any]) -> dict[str, Any]:
    """What a row says of a figure."""
    if result["name"] != BITS:
        figure = {key: result[key] for key in _OF_FIGURE if key in result}
        return figure | {"num_features": result["features"]["dims"]}
    error, value = result["standard_error"], result["value"]
    half = NORMAL_95 * (error or 0.0)
    return {
        "name": BITS,
        "label": "bits/dim",
        "value": value,
        "interval": [value - half, value + half],
        "standard_error": error,
        "num_images": result["num_images"],
    }


def _draws(result: dict[str, Any]) -> tuple[list[float], float]:
    """Values whose scatter tells how far two differ by chance, and the factor to 95 %.

    Of bits/dim those of the images; else of halves, the same of each setting.
    """
    if result["name"] == BITS:
        return result["total"], NORMAL_95 / math.sqrt(len(result["total"]))
    return result["halves"], T_19


def _rank(rows: list[dict[str, Any]]) -> None:
    """Say of each figure whether it is the best, or too close to it to tell."""
    for name in {name: None for row in rows for name in row["figures"]}:
        having = [row for row in rows if name in row["figures"]]
        sign = 1 if _LOWER_IS_BETTER[name] else -1
        best = min(having, key=lambda row: sign * row["figures"][name]["value"])
        for row in having:
            gap = row["figures"][name]["value"] - best["figures"][name]["value"]
            of_chance = _gap_of_chance(row["draws"][name], best["draws"][name])
            is_tie = of_chance is None or abs(gap) <= of_chance
            rank = "best" if row is best else "tie" if is_tie else ""
            row["figures"][name] |= {"rank": rank, "gap": gap, "gap_of_chance": of_chance}


def _gap_of_chance(a: tuple[list[float], float], b: tuple[list[float], float]) -> float | None:
    """Half the width of the 95 % interval of the difference; None where it is not known.

    Paired: the settings share the real images, the halves of them and the noise of each drawn one.
    """
    (first, factor), (second, _) = a, b
    if len(first) < 2:
        return None
    if len(first) == len(second):
        return factor * statistics.stdev(x - y for x, y in zip(first, second, strict=True))
    return factor * math.hypot(statistics.stdev(first), statistics.stdev(second))
