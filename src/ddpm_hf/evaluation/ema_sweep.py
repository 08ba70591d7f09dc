"""`sweep_ema`: quality of the model of a run over the length of its weight average.

The lengths are reconstructed from the snapshots of the run one after the other (post-hoc EMA,
2312.02696), and measured with the same noise. The run's own model, with traditional EMA, is
measured for comparison.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddpm_hf.evaluation.card_metrics import card_metrics
from ddpm_hf.evaluation.compare import compare_settings
from ddpm_hf.evaluation.comparison_results import ComparisonRow, Setting, SettingsResult
from ddpm_hf.evaluation.evaluate import Evaluator
from ddpm_hf.evaluation.metrics import LOWER_IS_BETTER, METRICS
from ddpm_hf.evaluation.result_files import read_evaluation, results_folder, write_result
from ddpm_hf.evaluation.result_pictures import save_ema_pictures
from ddpm_hf.evaluation.results import Report
from ddpm_hf.evaluation.subjects import Subject
from ddpm_hf.evaluation_options import BITS, EmaSweepOptions, EvaluationOptions, command_of
from ddpm_hf.hub.card import write_results
from ddpm_hf.options import takes_options
from ddpm_hf.post_hoc_ema.models import PostHocEMA
from ddpm_hf.run_record import EmaFacts
from ddpm_hf.utils.shared_work import distributed_state, on_main_process
from ddpm_hf.utils.text import public_name

EMA_FILE = "ema.json"
LENGTHS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.25)
OWN = "model"
"""Name of the run's own model in tables and folders."""


def label(sigma_rel: float) -> str:
    """Name of an average in tables and folders."""
    return f"std-{sigma_rel:g}"


def figure_name(metric: str) -> str:
    """The figure of a metric that decides, such as precision for precision-recall."""
    return metric if metric == BITS else METRICS[metric][1][0].name


@dataclass(frozen=True, kw_only=True, repr=False)
class EmaSweep(SettingsResult, Report):
    """Result of `sweep_ema`. See `Report` for the rest.

    Attributes:
        run: name of the run.
        averages: the reconstructed averages by the names of their settings.
        best: relative length of the best average by the first metric.
    """

    run: str
    averages: dict[str, EmaFacts]
    best: float
    metrics: tuple[str, ...]
    options: EvaluationOptions
    command: str

    def __str__(self) -> str:
        name = figure_name(self.metrics[0])
        ranks = {row.name: row.figures[name].rank for row in self.settings}
        best = f"best: {self.averages[label(self.best)]}"
        if OWN in ranks:
            is_worse, is_better = ranks[OWN] == "", ranks[label(self.best)] == ""
            verdict = "worse" if is_worse else "better" if is_better else "as good"
            best += f"; the model of the run, with traditional EMA, is {verdict}"
        return f"{super().__str__()}\n\n{best}"


class _EmaEvaluator(Evaluator):
    """An evaluator whose subjects may be relative lengths, which are reconstructed when loaded."""

    def __init__(self, ema: PostHocEMA, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ema, self.averages = ema, dict[str, EmaFacts]()

    def load(self, source: Any) -> Subject:
        if not isinstance(source, float):
            return super().load(source)
        pipeline, self.averages[label(source)] = self.ema.pipeline(source)
        return replace(super().load(pipeline), name=label(source))


@takes_options(EmaSweepOptions)
def sweep_ema(
    run: str | os.PathLike[str],
    dataset: Any,
    *,
    lengths: Sequence[float] = LENGTHS,
    metrics: Sequence[str] = ("fd",),
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> EmaSweep:
    """Measure the model of a run with weight averages of several lengths.

    Call it on all ranks of `accelerate launch`; an interrupted sweep resumes with the same
    `output`.

    Args:
        run: folder of a run that was trained with `post_hoc_ema`.
        dataset: the real images; see `evaluate`.
        lengths: values of sigma_rel, the standard deviation of the average relative to the length
            of the run.
        metrics: see `evaluate`; the first one decides which length is best.
        output: folder for ema.json, the curve, and the folders of the evaluations.
        progress: show progress bars.
        **options: see `evaluation_options.EmaSweepOptions`.
    Returns:
        the measured curve, on every rank.
    Raises:
        ValueError, OSError: if the run has no snapshots, something cannot be measured, or another
            process uses `output`.
        TypeError: for an unknown option.
    """
    chosen = EmaSweepOptions(**options)
    progress = progress and distributed_state().is_main_process
    ema = PostHocEMA(run, progress=progress)
    evaluator = _EmaEvaluator(
        ema, dataset, metrics, EvaluationOptions(**vars(chosen)), progress=progress
    )
    own, name = str(ema.run.model.root), public_name(os.fspath(run))
    sources = {label(sigma_rel): float(sigma_rel) for sigma_rel in lengths} | {OWN: own}
    scheduler, K = chosen.scheduler, chosen.num_inference_steps
    plan = [
        (source, [Setting(setting=name, name=name, scheduler=scheduler, num_inference_steps=K)])
        for name, source in sources.items()
    ]
    with results_folder(evaluator.state, output) as folder:
        evaluator.use_hold_out_of([own])
        rows, left_out = compare_settings(evaluator, plan, folder)
        measured = {row.name for row in rows}
        averages = {name: f for name, f in evaluator.averages.items() if name in measured}
        facts, recorded = evaluator.data.facts(), evaluator.options.recorded()
        asked = {"sweep": True, "std": [f"{s:g}" for s in lengths], "metrics": list(metrics)}
        result = EmaSweep(
            run=name,
            averages=averages,
            best=_best(rows, averages, figure_name(metrics[0])),
            dataset=facts,
            settings=rows,
            left_out=left_out,
            metrics=tuple(metrics),
            options=recorded,
            command=command_of([name], facts.name, asked | recorded.to_dict(), "ema"),
        )

        def write() -> EmaSweep:
            write_result(folder, result, EMA_FILE)
            lengths = {name: facts.sigma_rel for name, facts in averages.items()}
            save_ema_pictures(rows, lengths, folder)
            return result

        return on_main_process(evaluator.state, write)


def _best(rows: Sequence[ComparisonRow], averages: dict[str, EmaFacts], name: str) -> float:
    """Relative length of the average with the best value of a figure."""
    sign = 1 if LOWER_IS_BETTER[name] else -1
    values = {row.name: sign * row.figures[name].value for row in rows}
    if not averages:
        raise ValueError("no average could be measured, only the model of the run")
    return min(averages.values(), key=lambda facts: values[label(facts.sigma_rel)]).sigma_rel


def write_best(ema: PostHocEMA, result: EmaSweep, folder: Path, target: Path) -> EmaFacts:
    """Write the best model of a sweep, with its figures in the card.

    Args:
        ema: of the run.
        result: of `sweep_ema`.
        folder: `output` of the sweep.
        target: folder of the model, which is replaced.
    """
    facts = ema.write_model(result.best, target)
    row = next(row for row in result.settings if row.name == label(result.best))
    write_results(target, card_metrics(read_evaluation(folder / row.folder)))
    return facts
