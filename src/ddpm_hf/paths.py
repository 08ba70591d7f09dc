"""Where things lie in the folder of a run and of a model: the one place of each name."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelPaths:
    """The files of a portable checkpoint that readers and writers must agree on.

    Args:
        root: the folder that `save_pretrained` or the trainer wrote.
    """

    root: Path

    @property
    def index(self) -> Path:
        """What diffusers loads by."""
        return self.root / "model_index.json"

    @property
    def facts(self) -> Path:
        """What the trainer knows of the model, for its card."""
        return self.root / "training.json"

    @property
    def recipe(self) -> Path:
        """The options of the training, as `--config` reads them."""
        return self.root / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        """The losses of the training, a JSON object a line."""
        return self.root / "metrics.jsonl"

    @property
    def card(self) -> Path:
        """The model card."""
        return self.root / "README.md"

    @property
    def samples(self) -> Path:
        """The picture in the card."""
        return self.root / "samples.png"


@dataclass(frozen=True)
class RunPaths:
    """What a run of training writes.

    Args:
        root: its `output_dir`.
    """

    root: Path

    @property
    def lock(self) -> Path:
        """Held by the process that trains here."""
        return self.root / ".lock"

    @property
    def config(self) -> Path:
        """The complete options of the run."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """The losses, a JSON object a line."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """What the run resumes from."""
        return self.root / "checkpoints"

    @property
    def model(self) -> ModelPaths:
        """The portable checkpoint."""
        return ModelPaths(self.root / "model")

    @property
    def best(self) -> ModelPaths:
        """The portable checkpoint that measured best so far."""
        return ModelPaths(self.root / "best")

    @property
    def samples(self) -> Path:
        """The sample grids."""
        return self.root / "samples"

    def sample_grid(self, step: int) -> Path:
        """The grid that was drawn after update `step`."""
        return self.samples / f"step-{step:08d}.png"

    def newest_sample_grid(self) -> Path | None:
        """The last grid that was drawn, if any."""
        return max(self.samples.glob("step-*.png"), default=None)

    def is_run(self) -> bool:
        """Whether a run of training has been here."""
        return self.lock.exists() or any(self.checkpoints.glob("step-*"))
