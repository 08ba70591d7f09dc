"""Component that shows a film of sampling, with a slider over its frames."""

from typing import Any

import gradio as gr

from ddpm_hf.app.page_texts import LANGUAGES, static_file, texts


def film_player(**options: Any) -> gr.HTML:
    """A player; its value is that of `films.film_value`.

    Args:
        **options: of `gradio.HTML`.
    """
    return gr.HTML(
        html_template=static_file("film.html"),
        js_on_load=static_file("film.js"),
        apply_default_css=False,
        texts={language: texts(language) for language in LANGUAGES},
        **options,
    )
