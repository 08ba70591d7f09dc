"""The page of the application."""

import gradio as gr

from ddpm_hf.app.draw_tab import draw_tab
from ddpm_hf.app.edit_tab import EDIT_TAB, edit_tab
from ddpm_hf.app.endpoints import add_endpoints
from ddpm_hf.app.inside_tab import inside_tab
from ddpm_hf.app.page_texts import language_of
from ddpm_hf.app.picture_input import LIFETIME_S
from ddpm_hf.app.site import QUICK, Session, Site
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
        fill_width=True,  # the style sheet limits it
        delete_cache=(FILE_LIFETIME_S, FILE_LIFETIME_S),
    )
    with page:
        with gr.Row(elem_id="header"):
            gr.Markdown(t("headline"), elem_id="headline")
            model = _model_choice(list(site.models))
        language = gr.State()
        loaded = page.load(_language, None, language, **QUICK)
        session = Session(model, gr.State(time_to_live=LIFETIME_S), language, loaded)
        with gr.Tabs() as tabs:
            with gr.Tab(t("draw"), id="draw"):
                film = draw_tab(site, session)
            with gr.Tab(t("steps_tab"), id="steps"):
                steps_tab(site, session)
            with gr.Tab(t("edit"), id=EDIT_TAB):
                edit_tab(site, session, film, tabs)
            with gr.Tab(t("inside"), id="inside"):
                inside_tab(site, session)
        add_endpoints(site)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    return page


def _model_choice(names: list[str]) -> gr.Dropdown:
    return gr.Dropdown(
        names, value=names[0], label=t("model"), visible=len(names) > 1, elem_id="model"
    )


def _language(request: gr.Request) -> str:
    return language_of(request)
