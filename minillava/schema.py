"""Plain values of JSON and TOML into frozen dataclasses and back, checked as they are read."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from minillava.errors import UserError, nearest
from minillava.files import IN_WORDS, in_words, parse_json, read_text, shown

T = TypeVar("T")


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Build a (nested) frozen dataclass from plain JSON or TOML values.

    Raises UserError for an unknown key (naming the nearest known one) and for a value of the wrong type.
    `where` names the file for the message.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    kwargs: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"{where}: unknown key '{key}'{nearest(key, fields)}")
        kwargs[key] = _convert(hints[key], value, f"{where}: {key}")
    try:
        return cls(**kwargs)
    except UserError as error:  # of a class that checks its values
        raise UserError(f"{where}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """The plain values of a config, for JSON: tuples become lists."""
    return dataclasses.asdict(
        config, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items}
    )


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check `value` against a field's type; turn lists into tuples and dicts into dataclasses."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{where} is {value!r}{nearest(str(value), args)}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        inner = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(inner) != len(value):
            raise UserError(f"{where}: expected {len(inner)} values, got {len(value)}")
        names = (f" '{v['name']}'" if isinstance(v, dict) and "name" in v else "" for v in value)
        return tuple(_convert(h, v, where + name) for h, v, name in zip(inner, value, names))
    if origin is dict and isinstance(value, dict):
        return {k: _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    if hint is Any or (
        isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    ):
        return value
    expected = IN_WORDS.get(origin or hint, "a table" if dataclasses.is_dataclass(hint) else str(hint))
    raise UserError(f"{where}: expected {expected}, got {shown(value)}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if the file is absent or holds something else."""
    if not path.exists():
        raise UserError(f"{path}: not found; this is no checkpoint folder, or it is incomplete")
    values = parse_json(read_text(path), path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {in_words(values)}, expected an object; correct it, or fetch it again")
    return values


def optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no such file."""
    return read_json(path) if path.is_file() else {}


@dataclasses.dataclass
class Fields:
    """Values of a (nested) config with the defaults of its class, checked as they are read."""

    values: dict[str, Any]
    where: str

    def integer(self, key: str, default: int | None = None, most: int = 1 << 24) -> int:
        """An integer from 1 to `most`; UserError for anything else, as in what follows."""
        value = self.values.get(key, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise UserError(f"{self.where}: {key} is {shown(value)}, expected an integer from 1 to {most}")
        return value

    def table(self, key: str) -> Fields:
        """The object of that name; an empty one where there is none."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{self.where}: {key} is {shown(value)}, expected an object")
        return Fields(value or {}, f"{self.where}: {key}")

    def only(self, **values: Any) -> None:
        """Raises UserError for a key that is there with another value than this."""
        for key, value in values.items():
            self.one_of(key, value, [value])

    def number(self, key: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise UserError(f"{self.where}: {key} is {shown(value)}, expected a positive number")
        return float(value)

    def one_of(self, key: str, default: Any, allowed: Any) -> Any:
        """A value that is among those that are supported."""
        value = self.values.get(key, default)
        value = default if value is None else value
        if not isinstance(value, str | bool | int | float) or value not in allowed:
            raise UserError(
                f"{self.where}: {key} {shown(value)} is not supported (supported: {', '.join(map(str, allowed))})"
            )
        return value
