"""Errors of invalid requests, in the languages of the page."""

from collections.abc import Mapping
from typing import Any

from ddpm_hf.app.page_texts import LANGUAGES, texts
from ddpm_hf.utils.text import without_secrets


class RequestError(ValueError):
    """A request that cannot be served; `str` is the English message.

    Args:
        key: key of the text, without "error_".
        **values: values of its placeholders.
    """

    def __init__(self, key: str, **values: Any) -> None:
        self._key, self._values = f"error_{key}", values
        super().__init__(self.in_words(texts(LANGUAGES[0])))

    def in_words(self, words: Mapping[str, str]) -> str:
        """The message in the texts of a language."""
        return words[self._key].format(**self._values)


def message_of(error: ValueError, words: Mapping[str, str]) -> str:
    """The message of an error in the texts of a language.

    Errors of the rest of the package are in English, after an introduction in that language.
    """
    if isinstance(error, RequestError):
        return error.in_words(words)
    return words["error_other"].format(message=without_secrets(str(error)))
