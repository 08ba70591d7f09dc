"""Data that cannot be used."""

from ddpm_hf.text import without_secrets


class DataError(ValueError):
    """Data that cannot be used: one clear line, then one line per bad image where there are any.

    Passwords and tokens are taken out of the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))
