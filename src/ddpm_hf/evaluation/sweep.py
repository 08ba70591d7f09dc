"""`sweep`: samplers and numbers of steps, and the cheapest one that is as good as the best.

Quality is the Frechet distance of drawn images. Cost is the number of network calls per image,
which does not depend on the load of the machine. Each image has its own noise: more images narrow
the intervals, other seeds do not.
"""

from collections.abc import Iterable
from pathlib import Path

from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.evaluation.compare import compare_settings
from ddpm_hf.evaluation.comparison_results import ComparisonRow, Setting, Sweep, SweptSampler
from ddpm_hf.evaluation.evaluate import Evaluator
from ddpm_hf.evaluation.result_pictures import save_comparison_pictures
from ddpm_hf.scheduler_spec import stock_scheduler

NUM_STEPS = (5, 10, 25, 50, 100)
FIGURE = "fd"
# With trailing timesteps every sampler starts at the noisiest step.
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
# A half-width above this share of the best value makes different settings look equal.
_WIDE = 0.1


def sweep(pipeline: GaussianDDPMPipeline, evaluator: Evaluator, folder: Path) -> Sweep:
    """Measure all samplers with all numbers of steps, and choose one; the same on every rank.

    Args:
        pipeline: with the scheduler of a calibration.
        evaluator: with the metric `FIGURE`.
        folder: holds the settings; an interrupted sweep resumes there.
    Raises:
        ValueError, OSError: see `compare`.
    """
    T = pipeline.scheduler.config.num_train_timesteps
    settings = [Setting.named(None, *choice) for choice in planned(T)]
    rows, left_out = compare_settings(evaluator, [(pipeline, settings)], folder)
    is_conditional = pipeline.unet.config.num_class_embeds is not None  # stock cannot sample it
    for_stock = [] if is_conditional else [r for r in rows if stock_scheduler(f"{r.scheduler}")]
    all_steps = next((row for row in rows if _has_all_steps(row, T)), None)
    stock, options = cheapest(for_stock), evaluator.options.recorded()
    chosen = cheapest(rows) or rows[0]  # one of the rows is the best, and so a candidate
    result = Sweep(
        dataset=evaluator.data.facts(),
        options=options,
        settings=rows,
        left_out=left_out,
        recommended=SweptSampler.of(chosen),
        for_stock=SweptSampler.of(stock) if stock else None,
        all_steps=SweptSampler.of(all_steps) if all_steps else None,
        remarks=tuple(_remarks(chosen, all_steps, T, options.features)),
    )
    if evaluator.state.is_main_process:
        save_comparison_pictures(result, folder)
    return result


def planned(T: int) -> list[tuple[str, int]]:
    """Samplers and numbers of steps for a chain of T steps.

    DDPM with all T steps is included if it costs no more than all others together.
    """
    numbers = [K for K in NUM_STEPS if K < T]
    choices = [(sampler, K) for sampler in SAMPLERS for K in numbers]
    is_affordable = sum(K for _, K in choices) >= T or not choices
    return choices + [(PUBLISHED, T)] * is_affordable


def cheapest(rows: Iterable[ComparisonRow]) -> ComparisonRow | None:
    """The setting with the fewest network calls among the best and its ties; None without any.

    Of equal cost, the better one.
    """
    good = [row for row in rows if row.figures[FIGURE].rank]
    return min(
        good, key=lambda row: (row.num_network_calls or 0, row.figures[FIGURE].value), default=None
    )


def _has_all_steps(row: ComparisonRow, T: int) -> bool:
    return row.num_inference_steps == T and row.scheduler == PUBLISHED


def _remarks(
    chosen: ComparisonRow, all_steps: ComparisonRow | None, T: int, features: str
) -> list[str]:
    """Sentences about the choice, without capital and full stop."""
    figure = chosen.figures[FIGURE]
    remarks = [
        f"by {figure.num_drawn:,} drawn images against {figure.num_real:,} real ones and the"
        f" features of {features}",
        f"the recommended setting: {_value(chosen)}",
    ]
    if all_steps is None:
        remarks.append(
            f"all {T:,} steps cost more than all other settings together, and are not measured"
        )
    elif (chosen.num_network_calls or 0) >= T:
        remarks.append(f"nothing faster is as good as all {T:,} steps")
    else:
        remarks.append(f"all {T:,} steps of DDPM: {_value(all_steps)}")
        if chosen.seconds_per_image and all_steps.seconds_per_image:
            factor = all_steps.seconds_per_image / chosen.seconds_per_image
            remarks.append(f"these take {factor:.3g} times as long per image")
    width = figure.half_width / figure.value
    number, dims = figure.num_drawn or 0, figure.num_features or 0
    if number < dims or width > _WIDE:
        remarks.append(
            f"{number:,} images by {dims:,} features determine the distance to {width:.0%}, and"
            " much of it is the bias of few images: more images (--sweep-images) may separate"
            " settings that look equal, and recommend more steps"
        )
    return remarks


def _value(row: ComparisonRow) -> str:
    figure, seconds = row.figures[FIGURE], row.seconds_per_image
    timed = f", {seconds:.3g} s/image" if seconds else ""
    return f"{figure.label} {figure.value:.4g} +- {figure.half_width:.2g}{timed}"
