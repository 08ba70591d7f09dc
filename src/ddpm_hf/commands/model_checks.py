"""Checks of models, and of options against their configuration, before torch is loaded."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddpm_hf.diffusion.atomic_files import read_json
from ddpm_hf.diffusion.class_choice import check_null_class, class_numbers
from ddpm_hf.diffusion.config_extension import extension_of
from ddpm_hf.hub.download import downloading_once, fetch
from ddpm_hf.model_options import LoadOptions
from ddpm_hf.paths import ModelPaths, model_of_run, not_a_model, run_of_checkpoint
from ddpm_hf.sampling.options import NOT_CONDITIONAL
from ddpm_hf.utils.text import check_local_path


def check_model(name: str) -> None:
    """Check a local path of a model; a model on the Hub is skipped.

    Raises:
        ValueError: if it does not exist, is not the folder of a model, or has links to files
            outside.
    """
    check_local_path(name)
    given = Path(name).expanduser()
    if not given.exists():
        return
    folder = fetch(name)
    if not ModelPaths(folder).index.is_file() and not run_of_checkpoint(given):
        raise ValueError(not_a_model(folder, name))


@contextmanager
def downloaded_models(names: Iterable[str], options: LoadOptions) -> Iterator[None]:
    """Context manager: downloads the models on the Hub, which the block loads without a request.

    Local paths are skipped.

    Raises:
        ValueError: for a `revision` of local models only.
        ValueError, HubError: see `fetch`.
    """
    names = list(names)
    on_hub = [name for name in names if not Path(name).expanduser().exists()]
    if options.revision is not None and names and not on_hub:
        raise ValueError(
            f"`revision` {options.revision} applies to models on the Hub, but {names[0]} is a local"
            " path: leave it out"
        )
    with downloading_once():
        for name in on_hub:
            fetch(name, revision=options.revision, use_safetensors=options.use_safetensors)
        yield


def check_model_options(
    model: str,
    *,
    class_labels: Sequence[int | str] = (),
    needs_class: bool = False,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
) -> None:
    """Check options against the configuration of a model; a model on the Hub is skipped.

    Args:
        model: folder of a model, of a run, or of a training checkpoint.
        class_labels: names or numbers of classes.
        needs_class: whether a class-conditional model needs a class.
        guidance_scale: scale of classifier-free guidance; None without it.
        num_inference_steps: number of steps; None for the default.
    Raises:
        ValueError: for classes, guidance or steps that the model does not have.
    """
    given = Path(model).expanduser()
    run = run_of_checkpoint(given)
    folder = run.model.root if run else model_of_run(given)
    T = read_json(folder / "scheduler" / "scheduler_config.json").get("num_train_timesteps")
    if num_inference_steps is not None and isinstance(T, int) and num_inference_steps > T:
        raise ValueError(f"`num_inference_steps` must be in [1, {T}], got {num_inference_steps}")
    config = read_json(folder / "unet" / "config.json")
    if not config:  # old repositories have another layout
        return
    names = extension_of(config).get("class_names")
    names = names if isinstance(names, list) else None
    if class_labels:
        _check_classes(list(class_labels), config, names)
    elif needs_class and isinstance(num_classes := config.get("num_class_embeds"), int):
        class_numbers([None], num_classes, names)  # the error lists the classes
    if guidance_scale not in (None, 1):
        check_null_class(config, names)


def _check_classes(
    class_labels: list[int | str], config: Mapping[str, Any], names: list[str] | None
) -> None:
    num_classes = config.get("num_class_embeds")
    if num_classes is None and config.get("class_embed_type") is None:
        raise ValueError(NOT_CONDITIONAL)
    if isinstance(num_classes, int):
        class_numbers(class_labels, num_classes, names)
