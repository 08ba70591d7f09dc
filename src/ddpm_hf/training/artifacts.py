"""What a run produces: checkpoints, measurements, sample grids, the exported model and its push."""

import logging
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError

from ddpm_hf.diffusion.atomic_files import read_json, replacing_file
from ddpm_hf.hub.background_push import BackgroundPusher
from ddpm_hf.paths import ModelPaths
from ddpm_hf.pictures import Pixels, grid_by_row, image_grid
from ddpm_hf.training.ema_sampling import draw_share, grid_of
from ddpm_hf.training.export import export_model
from ddpm_hf.training.final_calibration import calibrate_model, is_calibrated
from ddpm_hf.training.periodic_evaluation import PeriodicEvaluation
from ddpm_hf.training.post_hoc_averages import is_snapshot_due, save_snapshots
from ddpm_hf.training.progress_pictures import draw_denoising, save_loss_picture
from ddpm_hf.training.run import Run
from ddpm_hf.training.run_log import MetricsLog
from ddpm_hf.training.sample_figures import SampleFigures
from ddpm_hf.training.state import save_checkpoint
from ddpm_hf.training.validation import Validation, ValidationResult

logger = logging.getLogger(__name__)


class Artifacts:
    """Writes and measures what is due. A failure that can be repaired later is a warning.

    Created on every rank, because ranks share the measurements and the drawing; only the main
    process writes.

    Args:
        run: the run.
        log: also gets the sample grids.
        pusher: uploads each exported model, or None.
        validation: measures held-out images, or None.
        evaluation: compares samples with real images, or None.

    Attributes:
        evaluated: the last result of `evaluation`, or None.
    """

    def __init__(
        self,
        run: Run,
        log: MetricsLog,
        pusher: BackgroundPusher | None = None,
        validation: Validation | None = None,
        evaluation: PeriodicEvaluation | None = None,
    ) -> None:
        self.run, self.log, self.pusher = run, log, pusher
        self.validation, self.evaluation = validation, evaluation
        self.evaluated: SampleFigures | None = None
        self._measured: tuple[int, list[ValidationResult | SampleFigures]] = (-1, [])
        self._has_warned_of_copies = False
        # best/ of a run that ended before its first checkpoint is replaced: its options may differ.
        self._has_best = run.checkpoint is not None

    def save_checkpoint(self, must_succeed: bool) -> None:
        """Save the state of the run; a full disk is a warning, or an error if `must_succeed`."""
        run = self.run
        if run.accelerator.is_main_process:
            with self.warn_on_disk_error("save", must_succeed):
                keep = run.config.checkpoints_total_limit
                save_checkpoint(run.paths.checkpoints, run.state, run.checkpoint_record(), keep)

    def save_snapshots(self) -> None:
        """Write snapshots of the averages if they are due; a failure is a warning."""
        if self.run.accelerator.is_main_process and is_snapshot_due(self.run):
            with self._warn_on_any_error("write a snapshot of the averages"):
                save_snapshots(self.run)

    def due_measurements(self, done: Collection[str] = ()) -> list[Callable[[], dict[str, float]]]:
        """The measurements that are due after this update; all ranks call them, for the log.

        Args:
            done: keys of the log entry of this update.
        """
        measurements = (
            ("validation_bits_per_dim", self.validation, self.validate),
            ("evaluation_fd", self.evaluation, self.evaluate),
        )
        return [
            call
            for key, measurement, call in measurements
            if measurement and key not in done and self.run.is_due(measurement.every)
        ]

    def is_grid_due(self) -> bool:
        """Whether a grid of samples is due after this update."""
        config = self.run.config
        return config.num_samples > 0 and self.run.is_due(config.sample_steps)

    def validate(self) -> dict[str, float]:
        """Measure bits/dim of the held-out images; export the model to best/ if it is the best."""
        if self.validation is None:
            return {}
        result = self.validation.measure()
        self._add_result(result)
        self._keep_if_best("bits-per-dim", result.bits_per_dim)
        return result.log_values()

    def evaluate(self) -> dict[str, float]:
        """Compare samples with the training images; export the model to best/ if it is the best.

        Warns once when samples are copies; such a model is not kept by its Frechet distance, which
        is low for copies. A failure is a warning, too.
        """
        figures = None
        if self.evaluation is not None:
            with self._warn_on_any_error("evaluate the model"):
                figures = self.evaluation.measure()
        if self.evaluation is None or figures is None:
            return {}
        self.evaluated = figures
        self._add_result(figures)
        if not figures.are_copies:
            self._keep_if_best("fd", figures.fd.value)
        elif not self._has_warned_of_copies:
            self._has_warned_of_copies = True
            best = self._best_facts().get("steps")
            logger.warning("%s", self.evaluation.describe_copies(figures, best))
        return figures.log_values()

    def _add_result(self, result: ValidationResult | SampleFigures) -> None:
        """Keep a result for the models that are exported after this update."""
        step, results = self._measured
        is_same = step == self.run.state.step
        self._measured = self.run.state.step, [*(results if is_same else []), result]

    def _keep_if_best(self, metric: str, value: float) -> None:
        """Export the model to best/ if it has the lowest `metric` so far, and that one counts."""
        run = self.run
        if run.config.kept_by != metric or not run.accelerator.is_main_process:
            return
        kept = self._best_facts().get("metrics") or []
        if value < next((m["value"] for m in kept if m["type"] == metric), math.inf):
            with self.warn_on_disk_error("keep the best model"):
                self._export_to(run.paths.best, kept_by=metric)
                self._has_best = True

    def _best_facts(self) -> dict[str, Any]:
        """The record of the best model of this run; {} without one."""
        return read_json(self.run.paths.best.facts) if self._has_best else {}

    def draw_samples(self) -> None:
        """Draw a grid of samples from the EMA weights on all ranks; a failure is a warning."""
        run = self.run
        count, labels = grid_of(run)
        drawn: list[Pixels] = []
        with self._warn_on_any_error("draw samples"):
            drawn = draw_share(run, count, labels)
        images = gather_object([] if run.stop.received else drawn)
        if run.accelerator.is_main_process and len(images) >= count:
            with self._warn_on_any_error("save the samples"):
                self._save_grid(images[:count], labels)
            with self._warn_on_any_error("draw the progress of the run"):
                save_loss_picture(run.paths.metrics, run.paths.loss_picture)
                if run.num_updates_left == 0:
                    draw_denoising(run).save(run.paths.denoising_picture)

    def export_model(self, must_succeed: bool) -> None:
        """Export and push the model; a full disk is a warning, or an error if `must_succeed`."""
        if self.run.accelerator.is_main_process:
            with self.warn_on_disk_error("export the model", must_succeed):
                self._export_to(self.run.paths.model)
                self._push()

    def calibrate(self) -> None:
        """Calibrate the exported model and push it, if requested; a failure is a warning."""
        run = self.run
        is_due = [run.config.calibrate and not is_calibrated(run)]
        if broadcast_object_list(is_due)[0]:
            with self._warn_on_any_error("calibrate the model"):
                calibrate_model(run)
                self._push()
            run.stop.synchronize()  # a signal ends it on all ranks

    def catch_up(self) -> bool:
        """Make what is due at the checkpoint that the run resumed from, and is missing.

        Returns:
            False, on all ranks, if a stop signal left some of it for the next time.
        """
        run, step = self.run, self.run.state.step
        ending = run.num_updates_left == 0
        done, has_grid, is_exported = broadcast_object_list(
            [
                self.log.entry_at(step),
                run.paths.sample_grid(step).exists(),
                read_json(run.paths.model.facts).get("steps") == step,
            ]
        )
        for measurement in (self.validation, self.evaluation):
            if measurement and (result := measurement.logged(done)):
                self._add_result(result)
        measurements = self.due_measurements(done)
        measured: dict[str, float] = {}
        for measure in measurements:
            measured |= measure()
        if measured:
            with self.warn_on_disk_error("log"):
                self.log.amend(step, measured)
        draws = self.is_grid_due() and not has_grid and not run.stop.synchronize()
        if draws:
            self.draw_samples()
        if not is_exported or measurements or draws:
            self.export_model(must_succeed=ending)
        elif ending:
            self._push()
        return not run.stop.synchronize()

    def _export_to(self, target: ModelPaths, kept_by: str | None = None) -> None:
        step, results = self._measured
        current = results if step == self.run.state.step else []
        records = [record for result in current for record in result.records()]
        export_model(self.run, target, records, kept_by)

    def _push(self) -> None:
        if self.pusher is not None:
            self.pusher.submit(self.run.paths.model.root, self.run.state.step)

    def _save_grid(self, images: list[Pixels], labels: list[int] | None) -> None:
        path = self.run.paths.sample_grid(self.run.state.step)
        names = self.run.components.facts.class_names
        grid = grid_by_row(images, labels, names) if labels and names else image_grid(images)
        path.parent.mkdir(exist_ok=True)
        with replacing_file(path) as temporary:
            grid.save(temporary)
        self.log.show(self.run.state.step, grid)

    @contextmanager
    def warn_on_disk_error(self, action: str, must_succeed: bool = False) -> Iterator[None]:
        """Turn a failure to write files into a warning, or into an OSError if `must_succeed`."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            failure = f"could not {action} at update {self.run.state.step}: {error}"
            if must_succeed:
                raise OSError(failure) from error
            logger.warning("%s; training continues", failure)

    @contextmanager
    def _warn_on_any_error(self, action: str) -> Iterator[None]:
        """Turn any failure into a warning: out of memory, an image mode without a file format."""
        try:
            yield
        except Exception as error:
            logger.warning("could not %s at update %d: %s", action, self.run.state.step, error)
