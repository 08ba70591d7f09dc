"""Tab that shows what a model is, and measures pictures by it."""

from collections.abc import Generator, Mapping
from typing import Any

import gradio as gr

from ddpm_hf.app.controls import class_choices
from ddpm_hf.app.inspection import (
    MAX_TERMS,
    PictureBound,
    card_text,
    error_curve,
    model_facts,
    picture_bound,
    snr_curve,
)
from ddpm_hf.app.nearest_images import TrainingSet
from ddpm_hf.app.page_texts import texts
from ddpm_hf.app.picture_input import PictureInput, chosen_picture
from ddpm_hf.app.result_html import figure, progress_html, section, table
from ddpm_hf.app.served_models import ServedModel
from ddpm_hf.app.site import PRIVATE, QUICK, Session, Site
from ddpm_hf.app.translations import translated as t
from ddpm_hf.app.working import with_progress
from ddpm_hf.pictures import to_rgb

NUM_NEAREST, SIDE_PIXELS = 6, 96
PLOT_PIXELS = 220


def inside_tab(site: Site, session: Session) -> None:
    """Build the tab."""
    first = site.first
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            facts = gr.HTML(elem_id="facts", apply_default_css=False)
            snr = gr.LinePlot(
                snr_curve(first), x="t", y="log SNR", title=None, label=t("snr_plot"),
                height=PLOT_PIXELS,
            )  # fmt: skip
            error = gr.LinePlot(
                error_curve(first), x="t", y="RMSE", label=t("error_plot"), height=PLOT_PIXELS,
                visible=error_curve(first) is not None,
            )  # fmt: skip
        with gr.Column(scale=1, min_width=300):
            gr.Markdown(t("measure_help"))
            picture = PictureInput.build("measured")
            label = gr.Dropdown(label=t("class"), **class_choices(first, all_classes=False))
            terms = gr.Slider(
                2, MAX_TERMS, 32, step=1, label=t("num_terms"), info=t("num_terms_info")
            )
            with gr.Row():
                measure = gr.Button(
                    t("measure"), variant="primary", min_width=100, elem_id="measure"
                )
                stop = gr.Button(t("stop"), min_width=100)
            result = gr.HTML(elem_id="bound", elem_classes="result", apply_default_css=False)
    with gr.Accordion(t("card"), open=False):
        card = gr.Markdown(card_text(first), elem_id="card")
    picture.connect(site, session, label=label)

    def shown(language: str, name: str) -> list[Any]:
        served, curve = site.models[name], error_curve(site.models[name])
        return [
            table(model_facts(served, texts(language))),
            snr_curve(served),
            gr.update(value=curve, visible=curve is not None),
            card_text(served),
            gr.update(**class_choices(served, all_classes=False)),
        ]

    inputs, outputs = [session.language, session.model], [facts, snr, error, card, label]
    session.model.change(shown, inputs, outputs, **QUICK)
    session.loaded.then(shown, inputs, outputs, **QUICK)

    def run(language: str, name: str, chosen: Any, label: Any, terms: Any) -> Generator[str]:
        served, words = site.models[name], texts(language)
        image = chosen_picture(served, chosen)
        html = _nearest_html(served, site.training.get(name), image, words)
        bound = yield from with_progress(
            picture_bound(served, image, label, terms),
            lambda calls: progress_html(calls, words) + html,
        )
        yield _bound_html(bound, words) + html

    inputs = [session.language, session.model, picture.chosen, label, terms]
    event = site.on_click(measure, run, inputs, [result], **PRIVATE)
    stop.click(None, cancels=[event], **PRIVATE)


def _bound_html(bound: PictureBound, words: Mapping[str, str]) -> str:
    text = words["bound_of_picture"].format(
        bits=f"{bound.value:.2f}", error=f"{bound.standard_error:.2f}"
    )
    return f"<p><b>{text}</b></p>"


def _nearest_html(
    model: ServedModel, training: TrainingSet | None, picture: Any, words: Mapping[str, str]
) -> str:
    """The nearest training images with their distances; empty without training images."""
    if training is None:
        return ""
    found = training.nearest(model, picture, NUM_NEAREST)
    figures = [figure(to_rgb(near.image), f"{near.distance:.3f}", SIDE_PIXELS) for near in found]
    share = training.share_closer(found[0].distance)
    note = words["nearest_note"].format(distance=f"{found[0].distance:.3f}", share=f"{share:.0%}")
    return section(words["nearest"], figures) + f"<p>{note}</p>"
