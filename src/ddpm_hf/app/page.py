"""The page of the application."""

from collections.abc import Sequence

import gradio as gr

from ddpm_hf.app.draw_tab import draw_tab
from ddpm_hf.app.served_models import ServedModel
from ddpm_hf.app.translations import translated as t

# Files of uploads and results are deleted after this time, checked as often.
FILE_LIFETIME_S = 1800
MAX_WAITING = 32


def build_page(models: Sequence[ServedModel]) -> gr.Blocks:
    """The page for these models; at least one."""
    by_name = {model.name: model for model in models}
    page = gr.Blocks(
        title="ddpm_hf",
        analytics_enabled=False,
        delete_cache=(FILE_LIFETIME_S, FILE_LIFETIME_S),
    )
    with page:
        with gr.Row(elem_id="header"):
            gr.Markdown(t("headline"), elem_id="headline")
            names = list(by_name)
            model = gr.Dropdown(
                names, value=names[0], label=t("model"), visible=len(names) > 1, elem_id="model"
            )
        with gr.Tabs(), gr.Tab(t("draw")):
            draw_tab(by_name, model)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    return page
