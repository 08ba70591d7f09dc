"""Rendering of a model card, as Markdown with YAML metadata."""

import json
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ddpm_hf.diffusion.timestep_spacings import usual_num_steps
from ddpm_hf.hub.card_facts import CardFacts, DataFacts, MetricFacts
from ddpm_hf.hub.card_few_steps import parsed_sampler, sampler_tables, steps_table, stock_code
from ddpm_hf.hub.card_metrics_table import bound_differences, evaluate_commands, metric_row
from ddpm_hf.hub.markdown import NOT_RECORDED, inline, number, setting_name
from ddpm_hf.run_record import EmaFacts
from ddpm_hf.utils.text import counted

# Also the pipeline tag of class-conditional models, so that they are found: the Hub has no other.
TASK = "unconditional-image-generation"
CONDITIONAL_TAG = "class-conditional-image-generation"
_MAX_CALIBRATED = 1000  # steps; more are not searched
_MAX_CLASSES = 12  # a longer table of classes is folded
# By `kept_by` of a training.json.
_KEPT_BY = {
    "bits-per-dim": "the lowest bits/dim of held-out images in the run",
    "fd": "the lowest Frechet distance in the run, among models that draw no copies",
}
TEMPLATE = Path(__file__).with_name("card_template.md")


def render_model_card(facts: CardFacts, repo_id: str | None = None) -> str:
    """A new card.

    Args:
        facts: see `card_facts`.
        repo_id: name on the Hub, for the code in the card; None for the current folder.
    """
    scheduler, calibration = facts.scheduler, facts.calibration
    chosen, updates = parsed_sampler(scheduler.recommended), facts.base.steps
    for_stock = parsed_sampler(calibration.sweep.for_stock) if chosen else None
    card = ModelCard.from_template(  # the template applies `inline` to all text of the facts
        _metadata(facts, repo_id),
        template_path=str(TEMPLATE),
        title=inline(_title(facts, repo_id)),
        facts=facts,
        inline=inline,
        number=number,
        repo=json.dumps(repo_id or "."),
        labels=_label_argument(facts),
        padded=_padded_size(facts),
        num_steps=usual_num_steps(
            scheduler.class_name or "DDPMScheduler", scheduler.num_train_timesteps or 1000
        ),
        data=_dataset(facts.dataset),
        base_data=_dataset(facts.base.dataset),
        base_training=NOT_RECORDED if updates is None else counted(updates, "optimizer update"),
        training=_training_rows(facts),
        classes=_class_rows(facts),
        max_classes=_MAX_CLASSES,
        config=[(setting_name(key), inline(value)) for key, value in sorted(facts.config.items())],
        metrics=[metric_row(metric) for metric in facts.metrics],
        bound_differences=bound_differences(facts.metrics),
        has_bound=any(metric.type == "bits-per-dim" for metric in facts.metrics),
        commands=evaluate_commands(facts.metrics, repo_id or "."),
        few_steps=steps_table(calibration.rows),
        few_steps_how=inline(calibration.how or NOT_RECORDED),
        samplers=sampler_tables(calibration.sweep.settings, scheduler.recommended),
        remarks=[inline(f"{x[:1].upper()}{x[1:]}.") for x in calibration.sweep.remarks],
        recommended=f"`{chosen[0]}`, {chosen[1]:,} steps" if chosen else None,
        stock=stock_code(*for_stock) if for_stock else None,
        is_stock_different=for_stock != chosen,
        calibrated_numbers=_calibrated_numbers(scheduler.calibrated_timesteps.get("DDIM")),
    )
    return f"{card}\n"


def _calibrated_numbers(timesteps: object) -> list[int]:
    """Numbers of steps that have calibrated timesteps, ascending."""
    keys = timesteps if isinstance(timesteps, dict) else {}
    return [K for K in range(1, _MAX_CALIBRATED + 1) if str(K) in keys]


def _label_argument(facts: CardFacts) -> str:
    """Arguments of a call for class labels; guided if there is a trained null class."""
    names, num_classes = facts.class_names, facts.unet.num_class_embeds
    if not num_classes:
        return ""
    if names and len(names) < num_classes:
        counts = facts.class_counts if len(facts.class_counts) == len(names) else (1,) * len(names)
        trained = next((name for name, count in zip(names, counts, strict=True) if count), names[0])
        guidance = "" if facts.has_null_class is False else ", guidance_scale=2.0"
        return f", class_labels={json.dumps(trained)}{guidance}"
    return f", class_labels={[i % num_classes for i in range(4)]}"


def _class_rows(facts: CardFacts) -> list[tuple[str, str, str]]:
    """Number, name and number of training images of each class."""
    names, counts = facts.class_names, facts.class_counts
    if not facts.is_conditional:
        return []
    shown = [f"{count:,}" if count else "0 (not trained)" for count in counts]
    if len(shown) != len(names):
        shown = [NOT_RECORDED] * len(names)
    return [
        (str(i), inline(name), count)
        for i, (name, count) in enumerate(zip(names, shown, strict=True))
    ]


def _title(facts: CardFacts, repo_id: str | None) -> str:
    kind = "Class-conditional" if facts.is_conditional else "Unconditional"
    return facts.model_name or (repo_id.split("/")[-1] if repo_id else f"{kind} DDPM")


def _metadata(facts: CardFacts, repo_id: str | None) -> ModelCardData:
    results = [
        result for metric in facts.metrics for result in _eval_results(metric, facts.dataset)
    ]
    hub_id = facts.dataset.hub_id
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["ddpm", "ddpm-hf", "diffusion", CONDITIONAL_TAG if facts.is_conditional else TASK],
        license=facts.license,
        datasets=[hub_id] if hub_id and _is_hub_id(hub_id) else None,
        base_model=facts.base_model if _is_hub_id(facts.base_model) else None,
        model_name=_title(facts, repo_id) if results else None,
        eval_results=results or None,
    )


def _eval_results(metric: MetricFacts, training_data: DataFacts) -> list[EvalResult]:
    """The entry of the model index, which requires a value and the name of a dataset."""
    dataset = metric.dataset if metric.dataset.name else training_data
    if metric.value is None or not dataset.name:
        return []
    name = metric.name or NOT_RECORDED
    result = EvalResult(
        task_type=TASK,
        dataset_type=dataset.hub_id or _slug(dataset.name),
        dataset_name=dataset.name,
        dataset_split=dataset.split,
        metric_type=metric.type or _slug(name),
        metric_name=name,
        metric_value=metric.value,
        metric_args=metric.args or None,
    )
    return [result]


def _is_hub_id(name: str | None) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name is not None and "/" in name


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:64] or "unnamed"


def _padded_size(facts: CardFacts) -> str:
    """Size of the network's images if it differs from that of the training images."""
    image, size = facts.image, facts.unet.sample_size
    height, width = size * 2 if len(size) == 1 else size if len(size) == 2 else (None, None)
    is_known = None not in (height, image.height, image.width)
    is_padded = is_known and (height, width) != (image.height, image.width)
    return f"{height}x{width}" if is_padded else ""


def _dataset(dataset: DataFacts) -> str:
    if dataset == DataFacts.from_dict({}):
        return NOT_RECORDED
    name, hub_id = inline(dataset.name or NOT_RECORDED), dataset.hub_id
    link = f"[{name}](https://huggingface.co/datasets/{hub_id})" if _is_hub_id(hub_id) else name
    details = [f"split {inline(dataset.split)}"] if dataset.split else []
    count, image = dataset.num_images, dataset.image
    details.append(f"{NOT_RECORDED} images" if count is None else counted(count, "image"))
    if image.height and image.width:
        mode, depth = image.mode or f"mode {NOT_RECORDED}", image.bit_depth or 8
        details.append(inline(f"{image.height}x{image.width}, {mode}, {depth} bit"))
    if dataset.num_classes:
        details.append(f"{dataset.num_classes:,} classes")
    return f"{link} ({'; '.join([*details, *_left_out(dataset)])})"


def _left_out(dataset: DataFacts) -> list[str]:
    """Number of files that were not used, by reason if recorded."""
    if dataset.left_out:
        reasons = ", ".join(f"{inline(why)} {count:,}" for why, count in dataset.left_out.items())
        return [f"{sum(dataset.left_out.values()):,} left out: {reasons}"]
    skipped = dataset.num_skipped
    return [f"{skipped:,} unreadable images left out"] if skipped else []


def _training_rows(facts: CardFacts) -> list[tuple[str, str]]:
    seconds, computation = facts.duration_s, _listing(facts.computation)
    kept_by = _KEPT_BY.get(facts.kept_by or "")
    rows: list[tuple[str, object]] = [
        ("optimizer updates", facts.steps),
        *([("kept for", kept_by)] if kept_by else []),
        ("images seen", facts.num_images_seen),
        ("training time", None if seconds is None else f"{seconds:,.0f} s"),
        *([("weights", _average(facts.ema))] if facts.ema else []),
        ("hardware", facts.hardware),
        *([("computed with", computation)] if computation else []),
        *((setting_name(key), value) for key, value in facts.scheduler.settings.items()),
        ("versions", _listing(facts.versions) or None),
        ("finished", facts.created),
    ]
    return [(name, NOT_RECORDED if value is None else number(value)) for name, value in rows]


def _average(ema: EmaFacts) -> str:
    return (
        f"average over {ema.steps:,} updates with a power-function profile of relative length "
        f"{ema.sigma_rel:g}, reconstructed from {ema.num_snapshots:,} snapshots (arXiv 2312.02696)"
    )


def _listing(facts: dict[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items())
