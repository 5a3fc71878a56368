"""A tree of YAML -> dataclasses, every mistake noted instead of the first one raised.

The dataclasses' annotations say what each key takes; `trainer.config_checks` says which values fit
together.
"""

import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from trainer.errors import ConfigError, did_you_mean


class _Loader(yaml.SafeLoader):
    """As `yaml.safe_load` reads, but a key that is given twice is an error: the first would be lost in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if line := first.get((key.tag, key.value)):
                problem = f"'{key.value}' is given twice, first in line {line}"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            first[key.tag, key.value] = key.start_mark.line + 1
        return node


def read_yaml(file: Path) -> Any:
    """The tree of a YAML file. Raises ConfigError, naming file and line."""
    try:
        with file.open(encoding="utf-8-sig") as opened:
            return yaml.load(opened, _Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 ({error}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from error


def set_override(tree: dict, override: str, errors: list[str]) -> None:
    """Puts `section.key=value`, its value in YAML, into a tree."""
    key, equals, value = override.partition("=")
    *sections, name = key.strip().split(".")
    node: Any = tree
    for section in sections:
        if isinstance(node, dict) and node.get(section) is None:
            node[section] = {}  # absent, or written without keys
        node = node[section] if isinstance(node, dict) else None
    if not equals or not name or not isinstance(node, dict):
        errors.append(f"--set {override}: expected section.key=value")
        return
    try:
        node[name] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        errors.append(f"--set {override}: the value is not YAML ({error})")


def build(cls: type, tree: Any, where: str, errors: list[str]) -> Any:
    """A dataclass from a tree of YAML. What is wrong is noted in `errors` and left at its default."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(tree, dict):
        errors.append(f"{where or 'file'}: expected keys ({', '.join(fields)}), found {tree!r}")
        tree = {}
    values = {}
    for key, value in tree.items():
        name = f"{where}.{key}" if where else str(key)
        if key in fields:
            values[key] = _convert(hints[key], value, name, errors)
        else:
            hint = did_you_mean(str(key), fields) or f"known are {', '.join(fields)}"
            errors.append(f"{name}: unknown key; {hint}")
    for name, f in fields.items():
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            if name not in values:
                errors.append(f"{where}.{name}: missing")
            if values.get(name, _BAD) is _BAD:
                values[name] = ""
    return cls(**{name: value for name, value in values.items() if value is not _BAD})


_BAD = object()
"""A value of the wrong type: noted as a mistake, its default used for the checks that follow."""


def _convert(hint: Any, value: Any, where: str, errors: list[str]) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), {} if value is None else value, where, errors)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list and isinstance(value, list):
        items = [_convert(arguments[0], item, f"{where}[{i}]", errors) for i, item in enumerate(value)]
        return _BAD if any(item is _BAD for item in items) else items
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        for section in filter(dataclasses.is_dataclass, arguments):  # one that may be absent: its mistakes count
            return _convert(section, value, where, errors)
        attempts: list[str] = []
        for argument in arguments:
            attempts.clear()
            if argument is not type(None) and (found := _convert(argument, value, where, attempts)) is not _BAD:
                return found
        errors.append(f"{where}: expected {_describe(hint)}, found {value!r}")
        return _BAD
    if hint is float:
        # YAML reads 1e-4 as text.
        try:
            if not isinstance(value, bool) and math.isfinite(number := float(value)):
                return number
        except (TypeError, ValueError):
            pass
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin is None and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    way_out = f"; write [{value}]" if origin is list and isinstance(value, (str, int, float)) else ""
    errors.append(f"{where}: expected {_describe(hint)}, found {value!r}{way_out}")
    return _BAD


def _describe(hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return "keys (" + ", ".join(f.name for f in dataclasses.fields(hint)) + ")"
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is list:
        item = typing.get_args(hint)[0]
        return f"a list of {'numbers' if item is float else _describe(item)}"
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_describe(a) for a in typing.get_args(hint) if a is not type(None))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
