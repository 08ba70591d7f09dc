"""The model card: rendered from what was recorded, guarded against leaks, and marked as ours.

`training.json` beside the weights holds the facts (every key is optional); the rest is read from
the checkpoint. What was not recorded is said to be so: nothing is guessed. A hidden last line holds
a hash of the card, so that an edit by a person can be told from a card that nobody touched.
"""

import hashlib
import html
import json
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ddpm_hf.diffusion.extension import beta_schedule_of
from ddpm_hf.diffusion.files import read_json

TASK = "unconditional-image-generation"
UNKNOWN = "not recorded"
_UNET_KEYS = ("sample_size", "in_channels", "num_class_embeds")
_SCHEDULER_KEYS = ("prediction_type", "variance_type", "timestep_spacing")
_TEMPLATE = Path(__file__).with_name("card_template.md")

_MARK = re.compile(r"\n<!-- ddpm-hf (generated|edited) ([0-9a-f]{64}) -->\n?\Z")


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
    facts = read_json(folder / "training.json")
    facts["unet"] = {key: unet[key] for key in _UNET_KEYS if unet.get(key) is not None}
    facts["unet"]["num_parameters"] = _count_parameters(folder / "unet")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    facts["scheduler"] = _scheduler_facts(scheduler) if scheduler else {}
    facts["image"] = (unet.get("_ddpm_hf") or {}).get("image")
    facts["samples"] = (folder / "samples.png").is_file()
    return facts


def _scheduler_facts(config: dict[str, Any]) -> dict[str, Any]:
    name, params = beta_schedule_of(config)
    facts = {"num_train_timesteps": config.get("num_train_timesteps"), "beta_schedule": name}
    facts |= {**params, **{key: config.get(key) for key in _SCHEDULER_KEYS}}
    return {key: value for key, value in facts.items() if value is not None}


def _count_parameters(folder: Path) -> int:
    from safetensors import safe_open

    total = 0
    for path in folder.glob("diffusion_pytorch_model*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            total += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    return total


def render_model_card(facts: dict[str, Any], repo_id: str | None = None) -> str:
    """The card as Markdown with YAML metadata.

    Args:
        facts: as `card_facts` returns them.
        repo_id: name on the Hub that the code in the card loads; None for this very folder.
    """
    scheduler, unet, dataset = (facts.get(k) or {} for k in ("scheduler", "unet", "dataset"))
    num_classes = unet.get("num_class_embeds")
    card = ModelCard.from_template(
        _metadata(facts, repo_id),
        template_path=str(_TEMPLATE),
        title=_inline(_title(facts, repo_id)),
        summary=_summary(facts),
        samples=bool(facts.get("samples")),
        repo=json.dumps(repo_id or "."),
        num_classes=num_classes,
        labels=f", class_labels={[i % num_classes for i in range(4)]}" if num_classes else "",
        padded=_padded_size(facts),
        num_steps=scheduler.get("num_train_timesteps", 1000),
        data=_data_sentence(dataset),
        training=_training_rows(facts),
        config=[(_name(k), _inline(v)) for k, v in sorted((facts.get("config") or {}).items())],
        metrics=[_metric_row(metric) for metric in facts.get("metrics") or []],
        licence=_inline(facts.get("license") or f"{UNKNOWN}; ask the owner before you reuse it"),
    )
    return str(card).rstrip() + "\n"


def _title(facts: dict[str, Any], repo_id: str | None) -> str:
    named_after = repo_id.split("/")[-1] if repo_id else "Unconditional DDPM"
    return str(facts.get("model_name") or named_after)


def _metadata(facts: dict[str, Any], repo_id: str | None) -> ModelCardData:
    dataset = facts.get("dataset") or {}
    base_model, hub_id = facts.get("base_model"), dataset.get("hub_id")
    results = [_eval_result(m, dataset) for m in facts.get("metrics") or [] if _is_number(m)]
    measured = bool(results and dataset.get("name"))  # the Hub's index wants the data set's name
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["ddpm", "ddpm-hf", "diffusion", TASK],
        license=facts.get("license"),
        datasets=[str(hub_id)] if _is_hub_id(hub_id) else None,
        base_model=base_model if _is_hub_id(base_model) else None,
        model_name=_title(facts, repo_id) if measured else None,
        eval_results=results if measured else None,
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
    )


def _is_number(metric: dict[str, Any]) -> bool:
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
        return f"Data: {UNKNOWN}."
    name, hub_id = _inline(dataset.get("name") or UNKNOWN), dataset.get("hub_id")
    link = f"[{name}](https://huggingface.co/datasets/{hub_id})" if _is_hub_id(hub_id) else name
    image = dataset.get("image") or {}
    parts = [f"split {_inline(dataset['split'])}"] if dataset.get("split") else []
    parts.append(f"{_number(dataset.get('num_images', UNKNOWN))} images")
    if image:
        sizes = (
            f"{image.get('height')}x{image.get('width')}, {image.get('mode', 'mode ' + UNKNOWN)}"
        )
        parts.append(_inline(f"{sizes}, {image.get('bit_depth', 8)} bit"))
    if dataset.get("num_classes"):
        parts.append(f"{_number(dataset['num_classes'])} classes")
    if dataset.get("num_skipped"):
        parts.append(f"{_number(dataset['num_skipped'])} unreadable images left out")
    return f"Data: {link} ({'; '.join(parts)})."


def _training_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    seconds, versions = facts.get("duration_s"), facts.get("versions") or {}
    scheduler = facts.get("scheduler") or {}
    rows = [
        ("optimizer updates", facts.get("steps")),
        ("images seen", facts.get("num_images_seen")),
        ("training time", f"{seconds:,.0f} s" if isinstance(seconds, int | float) else None),
        ("hardware", facts.get("hardware")),
        *((_name(key), value) for key, value in scheduler.items()),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items()) or None),
        ("finished", facts.get("created")),
    ]
    return [(name, UNKNOWN if value is None else _number(value)) for name, value in rows]


def _metric_row(metric: dict[str, Any]) -> tuple[str, str, str]:
    value = f"{metric['value']:.4g}" if _is_number(metric) else "no finite value"
    return _inline(metric.get("name", UNKNOWN)), value, _inline(metric.get("how") or UNKNOWN)


def write_model_card(folder: str | Path, repo_id: str | None = None) -> Path:
    """Write `README.md` into a checkpoint, unless a person has written or edited the one there.

    Args:
        folder: a portable checkpoint.
        repo_id: its name on the Hub, if it has one.
    Returns:
        the path of the card.
    """
    path = Path(folder) / "README.md"
    if origin_of(_read(path)) in (None, "generated"):
        text = mark(render_model_card(card_facts(folder), repo_id), "generated")
        path.write_text(text, encoding="utf-8", newline="\n")
    return path


def card_to_share(folder: Path, repo_id: str) -> str:
    """The card to upload for a checkpoint: the person's own if there is one, else a fresh one."""
    local = _read(folder / "README.md")
    if local is not None and origin_of(local) != "generated":
        return mark(_MARK.sub("\n", local), "edited")
    return mark(render_model_card(card_facts(folder), repo_id), "generated")


def _read(path: Path) -> str | None:
    return path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else None


def mark(text: str, origin: str) -> str:
    """Append the hidden line that tells later whether the card was touched."""
    text = text.rstrip() + "\n"
    return f"{text}\n<!-- ddpm-hf {origin} {_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.replace("\r\n", "\n").encode()).hexdigest()


def origin_of(text: str | None) -> str | None:
    """Who wrote a card.

    Returns:
        "generated": rendered here and untouched since; "edited": a person's, uploaded by us and
        untouched since; "person": written or changed by a person since; None: there is no card.
    """
    if text is None:
        return None
    text = text.replace("\r\n", "\n")
    found = _MARK.search(text)
    if not found or _digest(text[: found.start()]) != found[2]:
        return "person"
    return found[1]


def may_replace(remote: str | None, ours: str) -> bool:
    """Whether `ours` may take the place of the card on the Hub: never that of a person's edit.

    A card that a person wrote here may follow an earlier one like it; a generated one may not.
    """
    origin = origin_of(remote)
    return origin in (None, "generated") or (origin == "edited" and origin_of(ours) == "edited")


def check_metadata(text: str) -> None:
    """Raise ValueError if the YAML at the top of a card does not parse."""
    try:
        ModelCard(text, ignore_metadata_errors=False)
    except Exception as error:  # the parsers behind it raise errors of many kinds
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"README.md has metadata that the Hub would refuse: {first}") from error
