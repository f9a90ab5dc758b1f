"""`--set a.b=value`: a config with some of its values replaced by what a text says."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

from speedrun.config import Config, ConfigError, LayerSpec


def apply_overrides(config: Config, overrides: list[str]) -> Config:
    """Return `config` with each "a.b=value" applied. Raises ConfigError with the allowed keys."""
    for override in overrides:
        key, eq, text = override.partition("=")
        if not eq:
            raise ConfigError(f"--set {override!r}: expected KEY=VALUE, as in model.num_heads=4")
        config = _replace(config, key.strip().split("."), text.strip(), key)
    return config


def _replace(node: Any, path: list[str], text: str, key: str) -> Any:
    name, rest = path[0], path[1:]
    if isinstance(node, tuple):
        return _replace_item(node, name, rest, text, key)
    hints = typing.get_type_hints(type(node))
    names = [f.name for f in dataclasses.fields(node)]
    if name not in names:
        raise ConfigError(f"--set {key}: no setting {name!r}; allowed here: {', '.join(names)}")
    value = getattr(node, name)
    if rest:
        if not (dataclasses.is_dataclass(value) or isinstance(value, tuple)):
            raise ConfigError(f"--set {key}: {name!r} is a value and has no settings inside")
        return dataclasses.replace(node, **{name: _replace(value, rest, text, key)})
    return dataclasses.replace(node, **{name: _parse(text, hints[name], key)})


def _replace_item(node: tuple, name: str, rest: list[str], text: str, key: str) -> tuple:
    """Tuples are addressed by index (stages) or by the `name` of their rows (optimizer tables)."""
    keys = [getattr(item, "name", str(i)) for i, item in enumerate(node)]
    if name not in keys or not rest:
        wanted = "one of " + ", ".join(f"{k}.…" for k in keys)
        raise ConfigError(f"--set {key}: expected {wanted} after the table's name")
    i = keys.index(name)
    return (*node[:i], _replace(node[i], rest, text, key), *node[i + 1 :])


def _parse(text: str, hint: Any, key: str) -> Any:
    """Read `text` as the annotated type. Unions try their members in order, None first."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        allowed = []
        for member in sorted(args, key=lambda m: m is not type(None)):
            try:
                return _parse(text, member, key)
            except ConfigError as error:
                allowed.append(str(error).partition("expected ")[2])
        if any(allowed):
            raise ConfigError(
                f"--set {key}={text!r}: expected {' or '.join(filter(None, allowed))}"
            )
    if origin is Literal:
        if text not in args:
            raise ConfigError(f"--set {key}={text!r}: expected one of {', '.join(map(str, args))}")
        return text
    if hint is type(None):
        if text.lower() != "none":
            raise ConfigError(f"--set {key}={text!r}: expected none")
        return None
    if hint is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ConfigError(f"--set {key}={text!r}: expected true or false")
        return text.lower() in ("true", "1")
    if hint in (int, float):
        try:
            return hint(text.replace("_", ""))
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise ConfigError(f"--set {key}={text!r}: expected {kind}") from None
    if hint is str:
        return text
    if origin is tuple and args[0] is LayerSpec:
        try:
            return LayerSpec.parse_many(text)
        except ConfigError as error:
            raise ConfigError(f"--set {key}={text!r}: {error}") from None
    if origin is tuple and args[0] in (int, float):
        values = tuple(_parse(item, args[0], key) for item in text.split(",") if item)
        if args[-1] is not Ellipsis and len(values) != len(args):
            raise ConfigError(f"--set {key}={text!r}: expected {len(args)} numbers, as in 1,2")
        return values
    raise ConfigError(f"--set {key}: can't be set as a whole; set the values inside it")
