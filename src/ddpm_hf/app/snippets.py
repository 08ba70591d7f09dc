"""Lines of Python and of the command line that make the images of a request."""

import shlex
from collections.abc import Sequence
from dataclasses import fields

from ddpm_hf.app.editing import PICTURE, EditRequest
from ddpm_hf.app.requests import DrawRequest
from ddpm_hf.app.served_models import ServedModel
from ddpm_hf.options import flag_of
from ddpm_hf.sampling.edit_options import EditOptions
from ddpm_hf.sampling.options import SamplingOptions

MAX_LINE = 70
DEFAULT_BATCH: int = SamplingOptions().batch_size


def python_lines(model: ServedModel, request: DrawRequest) -> str:
    """A program that draws the images of a request, bit by bit, on the same device."""
    device = model.pipeline.device.type
    options = ", ".join(f"{k}={v!r}" for k, v in request.sampler_options().items())
    arguments = [
        f"pipe, {request.num_images}, seed={request.seed}",
        *([f"batch_size={request.num_images}"] * (request.num_images > DEFAULT_BATCH)),
        *([f"class_labels={_labels(model, request)!r}"] * (request.class_labels is not None)),
        *(f"{name}={value!r}" for name, value in request.guidance_options().items()),
        "**setting.arguments()",
    ]
    call = f"draw_images({', '.join(arguments)})"
    if len(call) > MAX_LINE:
        call = "draw_images(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")"
    return "\n".join([
        "from ddpm_hf import image_grid, load",
        "from ddpm_hf.sampling import SamplerOptions, choose_setting, draw_images",
        "",
        f"pipe = load({model.source!r})" + (f'.to("{device}")' if device != "cpu" else ""),
        f"setting = choose_setting(pipe, SamplerOptions({options}))",
        "pipe.scheduler = setting.scheduler",
        f"images = {call}",
        'image_grid(images).save("samples.png")',
        "",
    ])  # fmt: skip


def command_line(model: ServedModel, request: DrawRequest) -> str:
    """The command that draws the images of a request."""
    values: dict[str, object] = {"num_images": request.num_images, "seed": request.seed}
    if request.class_labels != model.class_labels:
        values["class_labels"] = _labels(model, request)
    values |= request.guidance_options() | request.sampler_options()
    if request.num_images > DEFAULT_BATCH:
        values["batch_size"] = request.num_images
    return _command("sample", [model.source], SamplingOptions, values)


def edit_command(model: ServedModel, request: EditRequest) -> str:
    """The command that makes the same edit of files with the names in the request."""
    options = request.options
    given = ((field.name, getattr(options, field.name)) for field in fields(EditOptions))
    defaults = vars(EditOptions())
    values = {name: value for name, value in given if value not in (None, defaults[name])}
    if options.num_images > defaults["batch_size"]:
        values["batch_size"] = options.num_images
    return _command("edit", [model.source, str(PICTURE)], EditOptions, values)


def _command(
    command: str, arguments: Sequence[str], options: type, values: dict[str, object]
) -> str:
    """A line of the command line.

    Args:
        command: the command.
        arguments: its positional arguments.
        options: dataclass of its options.
        values: value of each given option by name.
    """
    flags = {field.name: flag_of(field) for field in fields(options)}
    words = ["ddpm-hf", command, *arguments]
    for name, value in values.items():
        items = value if isinstance(value, list | tuple) else [] if value is True else [value]
        words += [flags[name], *map(str, items)]
    return shlex.join(words)


def _labels(model: ServedModel, request: DrawRequest) -> list[str | int]:
    """Names of the classes where the model has them."""
    numbers = request.class_labels or []
    names = [model.class_name(number) for number in numbers]
    return [n if name == str(n) else name for n, name in zip(numbers, names, strict=True)]
