"""Results of an evaluation as metrics of a model card."""

from dataclasses import asdict

from ddpm_hf.evaluation.figures import BoundResult, DatasetFacts, MetricResult
from ddpm_hf.evaluation.results import VERDICTS, Evaluation, bound_setup
from ddpm_hf.evaluation_options import BITS
from ddpm_hf.json_records import JsonObject
from ddpm_hf.run_record import BoundSetup, MetricRecord
from ddpm_hf.utils.text import counted


def card_metrics(evaluation: Evaluation) -> list[MetricRecord]:
    """The results of an evaluation, each with the options that measure it again."""
    return [_card_metric(evaluation, result) for result in evaluation.results]


def _card_metric(evaluation: Evaluation, result: BoundResult | MetricResult) -> MetricRecord:
    facts = evaluation.dataset
    metric = BITS if isinstance(result, BoundResult) else result.metric
    options = {"metrics": [metric], **evaluation.options.to_dict()}
    options = {
        name: value
        for name, value in options.items()
        if value is not None and name != "per_class"  # the card shows no classes
    }
    args: JsonObject = {
        "evaluate": options,
        "interval": list(result.interval),
        "weights": evaluation.model.weights,
    }
    if isinstance(result, MetricResult):
        args["features"] = result.measured_with.features.digest
    else:
        args["bound"] = asdict(_setup_of(result, facts))
    if facts.held_out:
        args["held_out"] = facts.to_dict()["held_out"]
    name, how = _name_and_setup(result, facts)
    known = {"name": facts.name, "hub_id": facts.hub_id, "split": facts.split}
    return MetricRecord(
        type=result.name,
        name=name,
        value=result.value,
        how=how,
        dataset={key: value for key, value in known.items() if value is not None},
        args=args,
    )


def _setup_of(bound: BoundResult, facts: DatasetFacts) -> BoundSetup:
    source = facts.held_out_suffix or f" of {facts.split}"
    return BoundSetup(
        images=f"{counted(bound.num_images, 'image')}{source}",
        num_images=bound.num_images,
        num_inference_steps=bound.num_inference_steps,
        num_timesteps=bound.num_timesteps,
        is_calibrated=bound.is_calibrated,
        eta=bound.eta,
    )


def _name_and_setup(result: BoundResult | MetricResult, facts: DatasetFacts) -> tuple[str, str]:
    if isinstance(result, BoundResult):
        error = result.standard_error
        precision = "" if error is None else f", standard error {error:.2g}"
        name = f"bits/dim (bound, K = {result.num_inference_steps:,})"
        return name, f"{_setup_of(result, facts).images}{precision}; {bound_setup(result)}"
    setup, floor, (low, high) = result.measured_with, result.floor, result.interval
    K = setup.num_inference_steps
    sampler = f"; K = {K:,}, {setup.scheduler}" if K else ""
    return (
        f"{result.label} ({setup.features.name})",
        f"{counted(result.num_drawn, 'drawn image')} against {result.num_real:,} of"
        f" {setup.reference_split}{facts.trained_on_suffix}{sampler}; 95 % interval {low:.4g} to"
        f" {high:.4g}; at {result.floor_num_images[1]:,} images {floor.drawn:.4g}, real ones"
        f" {floor.real:.4g}: {VERDICTS[result.verdict]}",
    )
