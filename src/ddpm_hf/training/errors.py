"""Errors of training: an option that cannot work, and a run that cannot continue."""


class ConfigError(ValueError):
    """An invalid option or combination of options; the message names it, its value and the fix."""


class TrainingError(RuntimeError):
    """A run that cannot continue; its last checkpoint is intact."""
