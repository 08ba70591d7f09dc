"""Public names that are imported on first use, so that commands start without torch."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def imported_on_first_use(package: str, names_by_module: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    Args:
        package: its `__name__`.
        names_by_module: public names, separated by spaces, by their module below `ddpm_hf`.
    """
    modules = {name: module for module, names in names_by_module.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"ddpm_hf.{modules[name]}"), name)

    return get
