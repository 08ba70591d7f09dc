"""Texts of components, which the browser shows in its language."""

from functools import cache

import gradio as gr
from gradio.i18n import I18nData

from ddpm_hf.app.page_texts import LANGUAGES, texts

_PREFIX = "ddpm_hf_"  # keys of Gradio's own texts are short words


@cache
def translations() -> gr.I18n:
    """All texts."""
    return gr.I18n(
        **{
            language: {_PREFIX + key: text for key, text in texts(language).items()}
            for language in LANGUAGES
        }
    )


def translated(key: str) -> I18nData:
    """The text with a key of texts/en.json."""
    if key not in texts(LANGUAGES[0]):
        raise KeyError(key)
    return translations()(_PREFIX + key)
