"""Named configs, one file each: `<name>.py` has `config() -> Config`. A record is a file."""

from __future__ import annotations

import importlib
import pkgutil

from speedrun.config import Config, ConfigError


def names() -> list[str]:
    """All recipes, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Config:
    """The recipe's config; ConfigError with the names there are."""
    if name not in names():
        raise ConfigError(f"no recipe {name!r}; recipes: {', '.join(names())}")
    return importlib.import_module(f"speedrun.recipes.{name}").config()
