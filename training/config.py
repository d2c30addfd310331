"""Settings of a training: YAML files and `key=value` from the command line, read into frozen dataclasses.

Later arguments win, so a recipe says what is taught, a file of `config/train/` on what machine, and a word on the
command line what is tried today:

    python -m depthlm_training.sft recipe.yaml config/train/cpu.yaml train.lr=2e-5

A setting that is a dataclass itself is a section of the file and a dot on the command line.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from depthlm_ros.cards import models_dir
from depthlm_ros.errors import ConfigError, unknown_choice

T = TypeVar("T")

_KEY = re.compile(r"\w+(\.\w+)*")
_IN_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-5 for text; here it is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("+-0123456789")
)


def load(kind: type[T], arguments: Sequence[str]) -> T:
    """Reads settings.

    Args:
        kind: a dataclass; its fields may be bool, int, float, str, Path, Literal, dataclasses, tuples and
            dictionaries of these, and `None` where the type says so.
        arguments: paths of YAML files (a bare name that isn't here is one of the shipped `config/train/`) and
            `key=value`, value in YAML.

    Raises:
        ConfigError: no such file, not YAML, an unknown or a missing key, a value of the wrong type.
    """
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if equals and _KEY.fullmatch(key):
            _merge(values, _nested(key.split("."), _parse(text, argument)))
        else:
            _merge(values, _read(Path(argument)))
    return build(kind, values)


def build(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Makes a dataclass of plain values, as `load`; `where` is the dotted key that holds them."""
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for key in values:
        if key not in fields:
            raise ConfigError(unknown_choice(f"key{f' in {where}' if where else ''}", key, fields))
    read = {key: _convert(hints[key], value, _dotted(where, key)) for key, value in values.items()}
    for name, field in fields.items():
        if name not in read and field.default is field.default_factory is dataclasses.MISSING:
            key = _dotted(where, name)
            raise ConfigError(f"{key} is missing; give it in a file or on the command line: {key}=...")
    return kind(**read)


def as_yaml(settings: Any) -> str:
    """The settings in full, defaults included, as a file that `load` reads back."""
    return yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=True)


def plain(value: Any) -> Any:
    """Dataclasses as dictionaries, tuples as lists, paths as texts."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def shipped_folder() -> Path:
    """The folder of the shipped settings, one file for each size of machine."""
    return models_dir().parent / "config" / "train"


def _read(path: Path) -> dict[str, Any]:
    shipped = sorted(shipped_folder().glob("*.yaml"))
    if not path.is_file() and path.name == str(path):
        path = next((file for file in shipped if file.name == path.name), path)
    if not path.is_file():
        names = ", ".join(file.name for file in shipped)
        raise ConfigError(f"no file {path}; give a YAML file, one of the shipped ones ({names}), or key=value")
    values = _parse(path.read_text(encoding="utf-8"), str(path))
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; a file of settings has lines such as `key: value`")
    return values or {}


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    return {keys[0]: _nested(keys[1:], value) if keys[1:] else value}


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _one_of(inner, value, where)
    if origin is Literal:
        if value not in inner or isinstance(value, bool):
            raise ConfigError(f"{where}: {unknown_choice('value', value, inner)}")
        return value
    if origin is tuple:
        return _sequence(inner, value, where)
    if kind is dict or origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {value!r}; give keys with values")
        of = inner[1] if inner else Any
        return {str(key): _convert(of, each, _dotted(where, str(key))) for key, each in value.items()}
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {value!r}; it is a section, with keys of its own")
        return build(kind, value, where)
    return _scalar(kind, value, where)


def _one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    for kind in kinds[:-1]:
        try:
            return _convert(kind, value, where)
        except ConfigError:
            continue
    return _convert(kinds[-1], value, where)


def _sequence(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ConfigError(f"{where} is {value!r}; give a list, such as [a, b]")
    if kinds[-1] is not Ellipsis and len(kinds) != len(value):
        raise ConfigError(f"{where} is {value!r}; give {len(kinds)} values")
    each = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
    return tuple(_convert(kind, v, f"{where}[{i}]") for i, (kind, v) in enumerate(zip(each, value, strict=True)))


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not kind:
        raise ConfigError(f"{where} is {value!r}, of type {type(value).__name__}; give {_IN_WORDS[kind]}")
    return value
