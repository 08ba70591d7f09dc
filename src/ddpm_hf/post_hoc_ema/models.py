"""`PostHocEMA`: models of a run with averages of any length."""

import json
import os
import shutil
from pathlib import Path

from tqdm.auto import tqdm

from ddpm_hf.diffusion.atomic_files import read_json, replacing_folder, write_text
from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.hub.card import write_model_card
from ddpm_hf.hub.load import open_pipeline, with_weights
from ddpm_hf.json_records import JsonObject
from ddpm_hf.paths import ModelPaths, RunPaths
from ddpm_hf.post_hoc_ema.profiles import gamma_of, solve_weights
from ddpm_hf.post_hoc_ema.snapshots import usable_snapshots, weighted_sum
from ddpm_hf.run_record import EmaFacts


class PostHocEMA:
    """Averages of a run that was trained with `post_hoc_ema`, reconstructed from its snapshots.

        pipe, facts = PostHocEMA("runs/photos").pipeline(0.03)

    Args:
        run: folder of the run; it may still be training.
        progress: show progress bars.
    Raises:
        ValueError: if it has no model or no usable snapshots.
    """

    def __init__(self, run: str | os.PathLike[str], *, progress: bool = True) -> None:
        self.run, self.progress = RunPaths(Path(run)), progress
        model = self.run.model
        if not model.index.is_file():
            raise ValueError(f"{model.root} has no model: let the run write its first checkpoint")
        self._model = open_pipeline(model.root, str(model.root))
        shapes = {name: weight.shape for name, weight in self._model.unet.named_parameters()}
        self.snapshots = usable_snapshots(self.run.ema_snapshots, shapes)

    @property
    def step(self) -> int:
        """Update of the newest snapshot, at which averages are reconstructed."""
        return self.snapshots[-1].step

    def pipeline(self, sigma_rel: float) -> tuple[GaussianDDPMPipeline, EmaFacts]:
        """The model of the run with another average; the pipeline is reused by the next call.

        Args:
            sigma_rel: relative length, in (0, 1/sqrt(12)].
        Raises:
            ValueError, OSError, SafetensorError: if a snapshot cannot be read.
        """
        weights, error = solve_weights(
            [snapshot.step for snapshot in self.snapshots],
            [gamma_of(snapshot.sigma_rel) for snapshot in self.snapshots],
            self.step,
            gamma_of(sigma_rel),
        )
        bar = tqdm(self.snapshots, f"std {sigma_rel:g}", unit="snapshot", disable=not self.progress)
        pipeline = with_weights(self._model, weighted_sum(bar, weights.tolist()))
        return pipeline, EmaFacts(sigma_rel, self.step, len(self.snapshots), error)

    def write_model(self, sigma_rel: float, target: Path) -> EmaFacts:
        """Write the model of the run with another average to the folder `target`.

        Card, recipe and log are those of the run, without metrics, samples and calibration, which
        belong to other weights.

        Args:
            sigma_rel: relative length.
            target: folder that is replaced; see `check_target`.
        Raises:
            ValueError, OSError, SafetensorError: if a snapshot cannot be read, or the model cannot
                be written.
        """
        pipeline, facts = self.pipeline(sigma_rel)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(target) as folder:
            shutil.copytree(self.run.model.root, folder, dirs_exist_ok=True)
            model = ModelPaths(folder)
            model.samples.unlink(missing_ok=True)
            pipeline.save_pretrained(folder)
            record = _record_with(read_json(model.facts), facts)
            write_text(model.facts, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
            write_model_card(folder)
        return facts


def _record_with(record: JsonObject, facts: EmaFacts) -> JsonObject:
    """The record of a run, changed to that of an average of its weights."""
    kept = {key: v for key, v in record.items() if key not in ("metrics", "calibration", "ema")}
    if kept.get("steps") != facts.steps:
        kept.pop("num_images_seen", None)
    return {**kept, "steps": facts.steps, "ema": facts.to_dict()}
