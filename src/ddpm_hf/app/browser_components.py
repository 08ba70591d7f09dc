"""Components with their own script: a player of films, and a painter of masks."""

from typing import Any

import gradio as gr

from ddpm_hf.app.page_texts import LANGUAGES, static_file, texts


def film_player(**options: Any) -> gr.HTML:
    """A player; its value is that of `films.film_value`, `options` are those of `gradio.HTML`."""
    return _component("film", **options)


def painter(**options: Any) -> gr.HTML:
    """A picture to paint a mask on; its value is that of `picture_input.painter_value`."""
    return _component("painter", **options)


def _component(name: str, **options: Any) -> gr.HTML:
    return gr.HTML(
        html_template=static_file(f"{name}.html"),
        js_on_load=static_file(f"{name}.js"),
        apply_default_css=False,
        texts={language: texts(language) for language in LANGUAGES},
        **options,
    )
