"""Which sampler, in how many steps: a sweep over both, and the cheapest as good as the best.

Quality is the Frechet distance of the drawn images. The cost of a setting is how often it calls the
network for an image: other work on the machine does not change that. Every image has noise of its
own, so that a narrower interval takes more images, not more seeds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.evaluation.compare import Setting, compare_settings
from ddpm_hf.evaluation.comparison_report import save_pictures
from ddpm_hf.evaluation.measurement import Evaluator
from ddpm_hf.scheduler_spec import stock_scheduler

NUM_STEPS = (5, 10, 25, 50, 100)
FIGURE = "fd"
# All of them start at the noisiest step, however few their steps are.
PUBLISHED = "DDPM:x_0_mse=null,timestep_spacing=trailing"
SAMPLERS = (
    "DDPM:timestep_spacing=trailing",
    PUBLISHED,
    "DDPM:timestep_spacing=trailing,eta=0",
    "DPMSolverMultistep:timestep_spacing=trailing",
    "DPMSolverMultistep:algorithm_type=sde-dpmsolver++,timestep_spacing=trailing",
    "UniPCMultistep:timestep_spacing=trailing",
    "DEISMultistep:timestep_spacing=trailing",
)
# An interval wider than this share of the best value calls much equal that is not.
_WIDE = 0.1


def sweep(
    pipeline: GaussianDDPMPipeline, evaluator: Evaluator, folder: Path
) -> dict[str, Any] | None:
    """Measure all samplers in all numbers of steps, and choose.

    Args:
        pipeline: with the scheduler of a calibration.
        evaluator: of the metric `FIGURE`.
        folder: where the settings are kept: what is interrupted goes on there.
    Returns:
        "settings" and "left_out" of `compare`; "recommended", the cheapest setting that is the best
        or a tie with it; "for_stock", the cheapest of these that diffusers' own `DDPMPipeline` can
        run, or None; "all_steps", that of the whole chain, or None; "remarks" for people. None on
        all but the main process.
    Raises:
        ValueError, OSError: as `compare`.
    """
    T = pipeline.scheduler.config.num_train_timesteps
    settings = [Setting(pipeline, "", *choice) for choice in planned(T)]
    found = compare_settings(evaluator, settings, folder)
    if found is None:
        return None
    rows = found["settings"]
    chosen, whole = cheapest(rows), next((row for row in rows if _is_whole(row, T)), None)
    is_conditional = pipeline.unet.config.num_class_embeds is not None  # stock cannot sample it
    stock = [] if is_conditional else [r for r in rows if stock_scheduler(r["scheduler"])]
    options = evaluator.options.recorded()
    result: dict[str, Any] = {
        "name": "sweep",
        "dataset": evaluator.data.facts(),
        "options": options,
        **found,
        "recommended": _named(chosen),
        "for_stock": _named(cheapest(stock)),
        "all_steps": _named(whole),
        "remarks": _remarks(chosen, whole, T, options["features"]),
    }
    save_pictures(result, folder)
    return result


def planned(T: int) -> list[tuple[str, int]]:
    """Samplers and numbers of steps, for a chain of T.

    All T steps of DDPM are among them where they cost no more than all the others together.
    """
    numbers = [K for K in NUM_STEPS if K < T]
    choices = [(sampler, K) for sampler in SAMPLERS for K in numbers]
    is_affordable = sum(K for _, K in choices) >= T or not choices
    return choices + [(PUBLISHED, T)] * is_affordable


def cheapest(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The setting of the fewest network calls that is the best or a tie with it; None without.

    Of equally many calls the better.
    """
    good = [row for row in rows if row["figures"][FIGURE]["rank"]]
    key = lambda row: (row["num_network_calls"], row["figures"][FIGURE]["value"])  # noqa: E731
    return min(good, key=key, default=None)


def _is_whole(row: dict[str, Any], T: int) -> bool:
    return bool(row["num_inference_steps"] == T and row["scheduler"] == PUBLISHED)


def _named(row: dict[str, Any] | None) -> dict[str, Any] | None:
    """A setting as the scheduler keeps it."""
    keys = ("scheduler", "num_inference_steps")
    return None if row is None else {key: row[key] for key in keys}


def _remarks(chosen: Any, whole: Any, T: int, features: str) -> list[str]:
    """What follows for people."""
    figure = chosen["figures"][FIGURE]
    said = [
        f"by {figure['num_drawn']:,} drawn images against {figure['num_real']:,} real ones and the"
        f" features of {features}",
        f"the recommended setting: {_value(chosen)}",
    ]
    if whole is None:
        said.append(f"all {T:,} steps cost more than all the others together, and are not measured")
    elif chosen["num_network_calls"] >= T:
        said.append(f"nothing faster is as good as all {T:,} steps")
    else:
        said.append(f"all {T:,} steps of DDPM: {_value(whole)}")
        if chosen["seconds_per_image"] and whole["seconds_per_image"]:
            times = whole["seconds_per_image"] / chosen["seconds_per_image"]
            said.append(f"these take {times:.3g} times as long for an image")
    low, high = figure["interval"]
    width, number = (high - low) / 2 / figure["value"], figure["num_drawn"]
    if number < figure["num_features"] or width > _WIDE:
        said.append(
            f"{number:,} images by {figure['num_features']:,} features tell the distance to"
            f" {width:.0%}, and much of it is the bias of few images: more of them (--sweep-images)"
            " may tell apart what looks equal, and recommend more steps"
        )
    return said


def _value(row: dict[str, Any]) -> str:
    figure, seconds = row["figures"][FIGURE], row["seconds_per_image"]
    low, high = figure["interval"]
    timed = f", {seconds:.3g} s/image" if seconds else ""
    return f"{figure['label']} {figure['value']:.4g} +- {(high - low) / 2:.2g}{timed}"
