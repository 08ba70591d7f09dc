"""The page of the application."""

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from ddpm_hf.app.controls import PRIVATE
from ddpm_hf.app.draw_tab import draw_tab
from ddpm_hf.app.edit_tab import edit_tab
from ddpm_hf.app.inside_tab import inside_tab
from ddpm_hf.app.nearest_images import TrainingSet
from ddpm_hf.app.picture_input import LIFETIME_S, PictureInput, choose_drawn
from ddpm_hf.app.reported_errors import reported
from ddpm_hf.app.requests import whole
from ddpm_hf.app.served_models import ServedModel
from ddpm_hf.app.steps_tab import steps_tab
from ddpm_hf.app.translations import translated as t

# Files of uploads and results are deleted after this time, checked as often.
FILE_LIFETIME_S = 1800
MAX_WAITING = 32


def build_page(
    models: Sequence[ServedModel], training: Mapping[str, TrainingSet] | None = None
) -> gr.Blocks:
    """The page.

    Args:
        models: at least one.
        training: training images by the name of the model, where they are at hand.
    """
    by_name = {model.name: model for model in models}
    page = gr.Blocks(
        title="ddpm_hf",
        analytics_enabled=False,
        delete_cache=(FILE_LIFETIME_S, FILE_LIFETIME_S),
    )
    with page:
        with gr.Row(elem_id="header"):
            gr.Markdown(t("headline"), elem_id="headline")
            model = _model_choice(list(by_name))
        drawn = gr.State(time_to_live=LIFETIME_S)
        with gr.Tabs() as tabs:
            with gr.Tab(t("draw"), id="draw"):
                film = draw_tab(by_name, model, drawn)
            with gr.Tab(t("steps_tab"), id="steps"):
                steps_tab(by_name, model)
            with gr.Tab(t("edit"), id="edit"):
                picture = edit_tab(by_name, model, drawn)
            with gr.Tab(t("inside"), id="inside"):
                inside_tab(by_name, model, drawn, training or {})
        _edit_on_click(by_name, model, drawn, film, picture, tabs)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    return page


def _model_choice(names: list[str]) -> gr.Dropdown:
    return gr.Dropdown(
        names, value=names[0], label=t("model"), visible=len(names) > 1, elem_id="model"
    )


def _edit_on_click(
    models: Mapping[str, ServedModel],
    model: gr.Dropdown,
    drawn: gr.State,
    film: gr.HTML,
    picture: PictureInput,
    tabs: gr.Tabs,
) -> None:
    """A click on a drawn image opens it for editing."""

    @reported
    def open_image(event: gr.EventData, name: str, drawn: Any) -> Any:
        index = event._data.get("index") if isinstance(event._data, dict) else None
        chosen = choose_drawn(models[name], drawn, whole("index", index))
        return *picture.shown(chosen, "inpaint"), gr.update(selected="edit")

    film.select(open_image, [model, drawn], [picture.chosen, picture.board, tabs], **PRIVATE)
