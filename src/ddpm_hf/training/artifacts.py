"""What a run leaves on the way: checkpoints, sample grids, the portable model, and its push."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError

from ddpm_hf.diffusion.atomic_files import read_json
from ddpm_hf.hub.background_push import BackgroundPusher
from ddpm_hf.paths import ModelPaths
from ddpm_hf.pictures import Pixels, grid_by_row, image_grid
from ddpm_hf.training.ema_sampling import draw_share
from ddpm_hf.training.export import export_model, training_facts
from ddpm_hf.training.final_calibration import calibrate_model, is_calibrated
from ddpm_hf.training.periodic_evaluation import Evaluation
from ddpm_hf.training.run import Run
from ddpm_hf.training.run_log import MetricsLog
from ddpm_hf.training.state import save_checkpoint
from ddpm_hf.training.validation import Validation

logger = logging.getLogger(__name__)

_MAX_CLASSES_DRAWN = 64  # rows that a person can look through


class Outputs:
    """Writes what is due. What can be done again later is a warning when it fails.

    Args:
        run: every process has one; only the main process writes.
        log: shows the sample grids, too.
        pusher: takes each exported model to the Hub, if that was asked for.
        validation: measures held-out images, likewise.
        evaluation: measures drawn ones, likewise.
    """

    def __init__(
        self,
        run: Run,
        log: MetricsLog,
        pusher: BackgroundPusher | None = None,
        validation: Validation | None = None,
        evaluation: Evaluation | None = None,
    ) -> None:
        self.run, self.log, self.pusher = run, log, pusher
        self.validation, self.evaluation = validation, evaluation
        self.measured: dict[str, float] = {}
        self.evaluated: dict[str, float] = {}

    def save_checkpoint(self, must_succeed: bool) -> None:
        """What the run resumes from; a full disk does not end a run that can still go on."""
        run = self.run
        if run.accelerator.is_main_process:
            with self.warn_on_disk_error("save", unless=must_succeed):
                keep = run.config.checkpoints_total_limit
                save_checkpoint(run.paths.checkpoints, run.state, run.facts(), keep)

    def export_model(self, must_succeed: bool) -> None:
        """The portable model, which is also what is pushed."""
        run = self.run
        if not run.accelerator.is_main_process:
            return
        with self.warn_on_disk_error("export the model", unless=must_succeed):
            self._export_to(run.paths.model)
            self._push()

    def _export_to(self, target: ModelPaths) -> None:
        run = self.run
        measured = self.measured and self.validation
        metrics = measured.results(self.measured) if measured else []
        export_model(target, run, training_facts(run, metrics))

    def due_measurements(self, ending: bool) -> list[Callable[[], dict[str, float]]]:
        """What is measured after this update, each a call that all processes make."""
        config, is_due = self.run.config, self.run.is_due
        kinds = [
            (self.measure, self.validation, config.validation_steps),
            (self.evaluate, self.evaluation, config.evaluate_steps),
        ]
        return [
            call for call, asked, every in kinds if asked and every and (ending or is_due(every))
        ]

    def evaluate(self) -> dict[str, float]:
        """The distance of drawn images to real ones; a failure must not end the run."""
        if self.evaluation is None:
            return {}
        with self._warn_on_any_error("evaluate the model"):
            self.evaluated = self.evaluation.measure()
            return self.evaluated
        return {}

    def measure(self) -> dict[str, float]:
        """Bits/dim of the held-out images, whose best model is kept if that was asked for."""
        if self.validation is None:
            return {}
        self.measured = self.validation.measure()
        run = self.run
        if run.config.keep_best and run.accelerator.is_main_process:
            before = read_json(run.paths.best.facts).get("metrics") or [{"value": math.inf}]
            if self.measured["validation_bits_per_dim"] < before[0]["value"]:
                with self.warn_on_disk_error("keep the best model"):
                    self._export_to(run.paths.best)
        return self.measured

    def complete(self) -> None:
        """Export and push what a run that was cut after its last checkpoint has not."""
        run = self.run
        is_exported = read_json(run.paths.model.facts).get("steps") == run.state.step
        if broadcast_object_list([is_exported])[0]:
            self._push()
        else:
            self.draw_samples()
            self.measure()
            self.export_model(must_succeed=True)
        self.calibrate()

    def calibrate(self) -> None:
        """Measure the exported model, if that was asked for; a failure must not cost it."""
        run = self.run
        due = [run.config.calibrate and not is_calibrated(run)]
        if broadcast_object_list(due)[0]:
            with self._warn_on_any_error("calibrate the model"):
                calibrate_model(run)
                self._push()

    def _push(self) -> None:
        if self.pusher is not None:
            self.pusher.submit(self.run.paths.model.root, self.run.state.step)

    def draw_samples(self) -> None:
        """A grid from the averaged weights; every process draws its share.

        A grid that cannot be drawn is a warning: it must not cost the model.
        """
        run, labels = self.run, self._classes_to_draw()
        count = len(labels) if labels else run.config.num_samples
        if run.config.num_samples == 0:
            return
        drawn: list[Pixels] = []
        with self._warn_on_any_error("draw samples"):
            drawn = draw_share(run, count, labels)
        images = gather_object([] if run.stop.received else drawn)
        if run.accelerator.is_main_process and len(images) >= count:
            with self._warn_on_any_error("save the samples"):
                self._save_grid(images[:count], labels)

    def _classes_to_draw(self) -> list[int] | None:
        """The class of each image of the grid: as many of each, every class up to a limit."""
        names = self.run.components.facts.class_names
        if not names:
            return None
        each = max(1, self.run.config.num_samples // len(names))
        return [label for label in range(min(len(names), _MAX_CLASSES_DRAWN)) for _ in range(each)]

    def _save_grid(self, images: list[Pixels], labels: list[int] | None) -> None:
        run = self.run
        path = run.paths.sample_grid(run.state.step)
        names = run.components.facts.class_names
        grid = (
            grid_by_row(images, [names[i] for i in labels])
            if labels and names
            else image_grid(images)
        )
        path.parent.mkdir(exist_ok=True)
        grid.save(path)
        self.log.show(self.run.state.step, grid)

    @contextmanager
    def warn_on_disk_error(self, what: str, unless: bool = False) -> Iterator[None]:
        """Turn what the disk refuses into a warning, unless it must succeed."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            failure = f"could not {what} at update {self.run.state.step}: {error}"
            if unless:
                raise OSError(failure) from error
            logger.warning("%s; training goes on", failure)

    @contextmanager
    def _warn_on_any_error(self, what: str) -> Iterator[None]:
        """For what is only looked at: out of memory, an image mode that no file holds, ..."""
        try:
            yield
        except Exception as error:
            logger.warning("could not %s at update %d: %s", what, self.run.state.step, error)
