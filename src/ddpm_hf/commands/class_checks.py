"""Checks of classes against the configuration of a local model, before torch is loaded."""

from collections.abc import Sequence
from pathlib import Path

from ddpm_hf.diffusion.atomic_files import read_json
from ddpm_hf.diffusion.class_choice import class_numbers
from ddpm_hf.diffusion.config_extension import extension_of
from ddpm_hf.paths import model_of_run
from ddpm_hf.sampling.options import NOT_CONDITIONAL


def check_classes(model: str, class_labels: Sequence[int | str] | None) -> None:
    """Raise ValueError for classes that the model does not have; a model on the Hub is skipped.

    Args:
        model: folder of a model or of a run.
        class_labels: names or numbers of classes.
    """
    config = read_json(model_of_run(Path(model).expanduser()) / "unet" / "config.json")
    if not class_labels or not config:
        return
    num_classes = config.get("num_class_embeds")
    if num_classes is None and config.get("class_embed_type") is None:
        raise ValueError(NOT_CONDITIONAL)
    if isinstance(num_classes, int):
        names = extension_of(config).get("class_names")
        class_numbers(list(class_labels), num_classes, names if isinstance(names, list) else None)
