"""The page of the application."""

from typing import Any

import gradio as gr

from ddpm_hf.app.draw_tab import draw_tab
from ddpm_hf.app.edit_tab import edit_tab
from ddpm_hf.app.endpoints import add_endpoints
from ddpm_hf.app.inside_tab import inside_tab
from ddpm_hf.app.page_texts import language_of
from ddpm_hf.app.picture_input import LIFETIME_S, PictureInput, choose_drawn
from ddpm_hf.app.reported_errors import reported
from ddpm_hf.app.requests import whole
from ddpm_hf.app.site import PRIVATE, QUICK, Session, Site
from ddpm_hf.app.steps_tab import steps_tab
from ddpm_hf.app.translations import translated as t

# Files of uploads and results are deleted after this time, checked as often.
FILE_LIFETIME_S = 1800
MAX_WAITING = 32


def build_page(site: Site) -> gr.Blocks:
    """The page; the site has at least one model."""
    page = gr.Blocks(
        title="ddpm_hf",
        analytics_enabled=False,
        delete_cache=(FILE_LIFETIME_S, FILE_LIFETIME_S),
    )
    with page:
        with gr.Row(elem_id="header"):
            gr.Markdown(t("headline"), elem_id="headline")
            model = _model_choice(list(site.models))
        session = Session(model, gr.State(time_to_live=LIFETIME_S), gr.State())
        with gr.Tabs() as tabs:
            with gr.Tab(t("draw"), id="draw"):
                film = draw_tab(site, session)
            with gr.Tab(t("steps_tab"), id="steps"):
                steps_tab(site, session)
            with gr.Tab(t("edit"), id="edit"):
                picture = edit_tab(site, session)
            with gr.Tab(t("inside"), id="inside"):
                inside_tab(site, session)
        add_endpoints(site)
        _edit_on_click(site, session, film, picture, tabs)
        page.load(_language, None, session.language, **QUICK)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    return page


def _model_choice(names: list[str]) -> gr.Dropdown:
    return gr.Dropdown(
        names, value=names[0], label=t("model"), visible=len(names) > 1, elem_id="model"
    )


def _language(request: gr.Request) -> str:
    return language_of(request)


def _edit_on_click(
    site: Site, session: Session, film: gr.HTML, picture: PictureInput, tabs: gr.Tabs
) -> None:
    """A click on a drawn image opens it for editing."""

    @reported
    def open_image(event: gr.EventData, name: str, drawn: Any) -> Any:
        index = event._data.get("index") if isinstance(event._data, dict) else None
        chosen = choose_drawn(site.models[name], drawn, whole("index", index))
        return *picture.shown(chosen, "inpaint"), gr.update(selected="edit")

    film.select(
        open_image,
        [session.model, session.drawn],
        [picture.chosen, picture.board, tabs],
        **PRIVATE,
    )
