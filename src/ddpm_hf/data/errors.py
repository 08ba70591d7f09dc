"""Errors about data."""

from ddpm_hf.utils.text import without_secrets


class DataError(ValueError):
    """Unusable data: one line, followed by one line per bad image where there are any.

    Passwords and tokens are removed from the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class SeveralShapes(DataError):
    """Images of several shapes where all must have one."""


class BadImage(ValueError):
    """Unusable image; the message gives the reason."""
