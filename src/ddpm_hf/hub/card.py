"""The model card: rendered from what was recorded, renewed around what a person wrote.

`training.json` beside the weights holds the facts (every key is optional); the rest is read from
the checkpoint. What was not recorded is said to be so: nothing is guessed.
"""

import html
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ddpm_hf.diffusion.atomic_files import read_json, write_text
from ddpm_hf.diffusion.config_extension import beta_schedule_of, extension_of
from ddpm_hf.diffusion.schedules import usual_num_steps
from ddpm_hf.hub.card_few_steps import bits_of_few_steps, samplers_of_few_steps
from ddpm_hf.hub.card_merge import Merged, merged, renewed, sealed, with_metadata
from ddpm_hf.paths import ModelPaths
from ddpm_hf.text import counted

TASK = "unconditional-image-generation"
UNKNOWN = "not recorded"
_UNET_KEYS = ("sample_size", "in_channels", "num_class_embeds")
_SCHEDULER_KEYS = ("prediction_type", "variance_type", "timestep_spacing")
_MEASURED = ("calibrated_timesteps", "recommended")
_TEMPLATE = Path(__file__).with_name("card_template.md")


def card_facts(folder: str | Path) -> dict[str, Any]:
    """Everything that the card of a checkpoint is made from, as JSON values.

    Args:
        folder: a portable checkpoint; `training.json` in it is optional.
    Returns:
        the content of `training.json`, with "unet", "scheduler", "image" and "samples" read from
        the checkpoint itself.
    Raises:
        ValueError: if one of these files is not valid JSON.
    """
    folder = Path(folder)
    unet = read_json(folder / "unet" / "config.json")
    facts = read_json(ModelPaths(folder).facts)
    facts["unet"] = {key: unet[key] for key in _UNET_KEYS if unet.get(key) is not None}
    facts["unet"]["num_parameters"] = _count_parameters(folder / "unet")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    facts["scheduler"] = _scheduler_facts(scheduler) if scheduler else {}
    known = extension_of(unet)
    facts["image"], facts["class_names"] = known.get("image"), known.get("class_names")
    facts["samples"] = ModelPaths(folder).samples.is_file()
    return facts


def _scheduler_facts(config: dict[str, Any]) -> dict[str, Any]:
    name, params = beta_schedule_of(config)
    facts = {"class": config.get("_class_name"), "beta_schedule": name}
    facts |= {"num_train_timesteps": config.get("num_train_timesteps")}
    facts |= {**params, **{key: config.get(key) for key in _SCHEDULER_KEYS}}
    facts |= {key: extension_of(config).get(key) for key in _MEASURED}
    return {key: value for key, value in facts.items() if value is not None}


def _count_parameters(folder: Path) -> int:
    from safetensors import safe_open

    sizes: dict[str, int] = {}  # by name: variants lie side by side
    for path in folder.glob("diffusion_pytorch_model*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            names = weights.keys()
            sizes |= {name: math.prod(weights.get_slice(name).get_shape()) for name in names}
    return sum(sizes.values())


def render_model_card(facts: dict[str, Any], repo_id: str | None = None) -> str:
    """The card as Markdown with YAML metadata.

    Args:
        facts: as `card_facts` returns them.
        repo_id: name on the Hub that the code in the card loads; None for this very folder.
    """
    scheduler, unet, dataset = (facts.get(k) or {} for k in ("scheduler", "unet", "dataset"))
    num_classes, calibration = unet.get("num_class_embeds"), facts.get("calibration") or {}
    card = ModelCard.from_template(
        _metadata(facts, repo_id),
        template_path=str(_TEMPLATE),
        title=_inline(_title(facts, repo_id)),
        summary=_summary(facts),
        samples=bool(facts.get("samples")),
        repo=json.dumps(repo_id or "."),
        num_classes=num_classes,
        labels=_label_argument(facts.get("class_names"), num_classes),
        padded=_padded_size(facts),
        num_steps=usual_num_steps(
            scheduler.get("class", "DDPMScheduler"), scheduler.get("num_train_timesteps", 1000)
        ),
        data=f"Data: {_data_sentence(dataset)}.",
        base=_base_sentence(facts),
        training=_training_rows(facts),
        config=[
            (_name(key), _inline(value))
            for key, value in sorted((facts.get("config") or {}).items())
            if value is not None
        ],
        metrics=[_metric_row(metric) for metric in facts.get("metrics") or []],
        **bits_of_few_steps(calibration, _inline, UNKNOWN),
        **samplers_of_few_steps(
            calibration.get("sweep") or {}, scheduler.get("recommended"), _inline
        ),
        has_timesteps="DDIM" in (scheduler.get("calibrated_timesteps") or {}),
    )
    return sealed(str(card))


def _label_argument(names: list[str] | None, num_classes: int | None) -> str:
    """What a call needs besides the number of images; guided, where there is a null class."""
    if not num_classes:
        return ""
    if names and len(names) < num_classes:
        return f", class_labels={json.dumps(names[0])}, guidance_scale=2.0"
    return f", class_labels={[i % num_classes for i in range(4)]}"


def _title(facts: dict[str, Any], repo_id: str | None) -> str:
    named_after = repo_id.split("/")[-1] if repo_id else "Unconditional DDPM"
    return str(facts.get("model_name") or named_after)


def _metadata(facts: dict[str, Any], repo_id: str | None) -> ModelCardData:
    dataset = facts.get("dataset") or {}
    base_model, hub_id = facts.get("base_model"), dataset.get("hub_id")
    measured = [
        _eval_result(metric, metric.get("dataset") or dataset)
        for metric in facts.get("metrics") or []
        # The Hub's index wants the data set's name.
        if _is_number(metric) and (metric.get("dataset") or dataset).get("name")
    ]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["ddpm", "ddpm-hf", "diffusion", TASK],
        license=facts.get("license"),
        datasets=[str(hub_id)] if _is_hub_id(hub_id) else None,
        base_model=base_model if _is_hub_id(base_model) else None,
        model_name=_title(facts, repo_id) if measured else None,
        eval_results=measured or None,
    )


def _eval_result(metric: dict[str, Any], dataset: dict[str, Any]) -> EvalResult:
    name = str(metric.get("name"))
    return EvalResult(
        task_type=TASK,
        dataset_type=str(dataset.get("hub_id") or _slug(dataset.get("name"))),
        dataset_name=str(dataset.get("name")),
        dataset_split=dataset.get("split"),
        metric_type=str(metric.get("type") or _slug(name)),
        metric_name=name,
        metric_value=metric["value"],
        metric_args=metric.get("args"),
    )


def _is_number(metric: Mapping[str, Any]) -> bool:
    value = metric.get("value")
    return isinstance(value, int | float) and math.isfinite(value)


def _is_hub_id(name: Any) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return isinstance(name, str) and "/" in name


def _slug(text: Any) -> str:
    return re.sub(r"[^a-z0-9]+", "-", str(text).lower()).strip("-")[:64] or "unnamed"


def _inline(value: Any) -> str:
    """Text for one line of Markdown or one table cell, with nothing in it that renders."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_\[\]{}#|~!$])", r"\\\1", text)


def _name(key: Any) -> str:
    """A name of a setting."""
    return f"`{key}`" if str(key).isidentifier() else _inline(key)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) else _inline(value)


def _summary(facts: dict[str, Any]) -> str:
    unet, scheduler = facts.get("unet") or {}, facts.get("scheduler") or {}
    size = unet.get("num_parameters")
    weights = f" of {size:,} parameters" if size else ""
    steps = scheduler.get("num_train_timesteps")
    return (
        "A denoising diffusion probabilistic model ([DDPM](https://arxiv.org/abs/2006.11239)): a "
        f"`UNet2DModel`{weights} that turns noise into images"
        + (f" in {steps:,} steps." if isinstance(steps, int) else ".")
        + (f" Fine-tuned from {_inline(base)}." if (base := facts.get("base_model")) else "")
    )


def _padded_size(facts: dict[str, Any]) -> str:
    image, size = facts.get("image") or {}, (facts.get("unet") or {}).get("sample_size")
    sides = [size, size] if isinstance(size, int) else size
    native = [image.get("height"), image.get("width")]
    return f"{sides[0]}x{sides[1]}" if sides and None not in native and sides != native else ""


def _data_sentence(dataset: dict[str, Any]) -> str:
    if not dataset:
        return UNKNOWN
    name, hub_id = _inline(dataset.get("name") or UNKNOWN), dataset.get("hub_id")
    link = f"[{name}](https://huggingface.co/datasets/{hub_id})" if _is_hub_id(hub_id) else name
    image = dataset.get("image") or {}
    parts = [f"split {_inline(dataset['split'])}"] if dataset.get("split") else []
    count = dataset.get("num_images")
    parts.append(counted(count, "image") if isinstance(count, int) else f"{UNKNOWN} images")
    if image:
        sizes = (
            f"{image.get('height')}x{image.get('width')}, {image.get('mode', 'mode ' + UNKNOWN)}"
        )
        parts.append(_inline(f"{sizes}, {image.get('bit_depth', 8)} bit"))
    if dataset.get("num_classes"):
        parts.append(f"{_number(dataset['num_classes'])} classes")
    return f"{link} ({'; '.join([*parts, *_left_out(dataset)])})"


def _left_out(dataset: dict[str, Any]) -> list[str]:
    """How many images were not used, by kind or reason where that was recorded."""
    reasons = dataset.get("left_out")
    if isinstance(reasons, dict) and reasons:
        listing = ", ".join(f"{_inline(why)} {_number(number)}" for why, number in reasons.items())
        return [f"{sum(map(int, reasons.values())):,} left out: {listing}"]
    if number := reasons or dataset.get("num_skipped"):
        return [f"{_number(number)} unreadable images left out"]
    return []


def _base_sentence(facts: dict[str, Any]) -> str:
    """What a fine-tuned model began with."""
    name, base = facts.get("base_model"), facts.get("base") or {}
    if not name:
        return ""
    steps = base.get("steps")
    how_long = counted(steps, "optimizer update") if isinstance(steps, int) else UNKNOWN
    first = base.get("base_model")
    before = f", itself fine-tuned from {_inline(first)}" if first else ""
    trained_on = _data_sentence(base.get("dataset") or {})
    return f"Base: {_inline(name)}{before}. Its data: {trained_on}. Its training: {how_long}."


def _training_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    seconds, versions = facts.get("duration_s"), facts.get("versions") or {}
    hidden = ("class", *_MEASURED)
    scheduler = {k: v for k, v in (facts.get("scheduler") or {}).items() if k not in hidden}
    rows = [
        ("optimizer updates", facts.get("steps")),
        ("images seen", facts.get("num_images_seen")),
        ("training time", f"{seconds:,.0f} s" if isinstance(seconds, int | float) else None),
        ("hardware", facts.get("hardware")),
        *([("computed with", _listed(how))] if (how := facts.get("computation")) else []),
        *((_name(key), value) for key, value in scheduler.items()),
        ("versions", _listed(versions) or None),
        ("finished", facts.get("created")),
    ]
    return [(name, UNKNOWN if value is None else _number(value)) for name, value in rows]


def _listed(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items())


def _metric_row(metric: dict[str, Any]) -> tuple[str, str, str]:
    value = f"{metric['value']:.4g}" if _is_number(metric) else "no finite value"
    how, elsewhere = metric.get("how"), (metric.get("dataset") or {}).get("name")
    told = [str(how)] * bool(how) + [f"on {elsewhere}"] * bool(elsewhere)
    return _inline(metric.get("name", UNKNOWN)), value, _inline("; ".join(told) or UNKNOWN)


def write_model_card(folder: str | Path, repo_id: str | None = None) -> Path:
    """Write or renew `README.md` of a checkpoint; what a person wrote in it stays.

    Args:
        folder: a portable checkpoint.
        repo_id: its name on the Hub, if it has one.
    Returns:
        the path of the card.
    """
    path = ModelPaths(Path(folder)).card
    write_text(path, renewed(_read(path), render_model_card(card_facts(folder), repo_id)))
    return path


def card_to_share(
    folder: str | Path, repo_id: str, remote: str | None = None, license: str | None = None
) -> Merged:
    """The card to upload for a checkpoint.

    Args:
        folder: the checkpoint; its README.md is optional.
        repo_id: its name on the Hub.
        remote: the card that is there.
        license: for the metadata, whatever it says now.
    """
    local = _read(ModelPaths(Path(folder)).card)
    card = merged(local, remote, render_model_card(card_facts(folder), repo_id))
    text = with_metadata(card.text, "license", license) if license else card.text
    return Merged(text, card.is_theirs)


def write_results(folder: str | Path, results: Iterable[Mapping[str, Any]]) -> Path:
    """Add results of an evaluation to a checkpoint: to `training.json`, and with it to the card.

    One of the same name and data set is replaced. The next export of a run, whose weights are
    others, begins without any.

    Args:
        folder: a portable checkpoint.
        results: each with "name" and "value", a finite number; if known, "how" it was measured (one
            line), "type" (the Hub's name of the measure, such as "fid"), "args" (for programs: how
            to measure it again) and "dataset" (with "name", "hub_id", "split"; by default that of
            the training).
    Returns:
        the path of the card.
    Raises:
        ValueError: for a result without a name or a finite value.
    """
    path = ModelPaths(Path(folder)).facts
    facts = read_json(path)
    by_name = {_result_key(metric): metric for metric in facts.get("metrics") or []}
    for result in results:
        if not isinstance(result.get("name"), str) or not _is_number(result):
            raise ValueError(f"a result needs a name and a finite value, got {dict(result)!r}")
        by_name[_result_key(result)] = dict(result)
    facts["metrics"] = list(by_name.values())
    write_text(path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    return write_model_card(folder)


def write_calibration(folder: str | Path, calibration: Mapping[str, Any]) -> Path:
    """Keep what few steps lose in `training.json`, beside an earlier sweep; show it in the card.

    Args:
        folder: a portable checkpoint.
        calibration: "rows", of `evaluation.calibration.rows_of`, and "how" they came about; perhaps
            "sweep", of `evaluation.sweep.sweep`.
    Returns:
        the path of the card.
    """
    path = ModelPaths(Path(folder)).facts
    facts = read_json(path)
    facts["calibration"] = {**(facts.get("calibration") or {}), **calibration}
    write_text(path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    return write_model_card(folder)


def _result_key(metric: Mapping[str, Any]) -> tuple[str, str]:
    return str(metric.get("name")), json.dumps(metric.get("dataset"), sort_keys=True)


def _read(path: Path) -> str | None:
    return path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else None


def check_metadata(text: str) -> None:
    """Raise ValueError if the YAML at the top of a card does not parse."""
    try:
        ModelCard(text, ignore_metadata_errors=False)
    except Exception as error:  # the parsers behind it raise errors of many kinds
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"README.md has metadata that the Hub would refuse: {first}") from error
