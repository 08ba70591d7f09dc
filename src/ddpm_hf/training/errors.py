"""Errors of training: invalid options, unusable checkpoints, and runs that cannot continue."""


class ConfigError(ValueError):
    """An invalid option or combination of options; the message names it, its value and the fix."""


class CheckpointError(ValueError):
    """A run folder or checkpoint that cannot be used."""


class TrainingError(RuntimeError):
    """A run that cannot continue; its last checkpoint is intact."""
