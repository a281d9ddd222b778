"""Keys of a config.json in a table: each row names a key and our field, and the same row reads and writes it."""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from minillava.config import ModelConfig
from minillava.schema import Fields


class Kind(NamedTuple):
    """How a value is read (values, key, default) and written (our value, the config that it is from)."""

    read: Callable[[Fields, str, Any], Any] | None  # None: written for others, never read
    write: Callable[[Any, ModelConfig], Any] = lambda value, config: value


def choice(names: dict[str, Any]) -> Kind:
    """One of a few values, by their names for them."""
    theirs = {ours: name for name, ours in names.items()}
    return Kind(lambda f, key, default: names[f.one_of(key, default, names)], lambda value, config: theirs[value])


def integer(most: int, least: int = 1) -> Kind:
    """An integer from `least` (1 or 0) to `most`."""
    zero = lambda f, key: least == 0 and f.values.get(key) == 0  # noqa: E731
    return Kind(lambda f, key, default: 0 if zero(f, key) else f.integer(key, default, most))


INTEGER = integer(1 << 24)
LAYERS = integer(1024)
NUMBER = Kind(lambda f, key, default: f.number(key, default))
FLAG = Kind(lambda f, key, default: f.one_of(key, bool(default), [False, True]))
ANY = Kind(lambda f, key, default: f.values.get(key, default))
ACTIVATION = choice({"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"})


@dataclass(frozen=True)
class Key:
    """A key of a config.json and the field of ours that it is; or, without one, the only value that is supported."""

    theirs: str
    ours: str = ""  # a path in ModelConfig: "decoder.hidden_size"
    kind: Kind = INTEGER
    only: Any = None
    default: Callable[[dict[str, Any]], Any] | None = None  # where the file is silent: from what the rows before read
    optional: bool = False  # another row reads the same field where the file does not have this key


def read_keys(keys: Iterable[Key], f: Fields) -> dict[str, Any]:
    """Our fields by path. Raises UserError for a value that is not supported."""
    found: dict[str, Any] = {}
    for key in keys:
        if not key.ours:
            f.one_of(key.theirs, key.only, [key.only])
        elif key.kind.read and not (key.optional and f.values.get(key.theirs) is None):
            default = key.default(found) if key.default else None
            found.setdefault(key.ours, key.kind.read(f, key.theirs, default))
    return found


def write_keys(keys: Iterable[Key], config: ModelConfig) -> dict[str, Any]:
    """The values of a config by their names."""
    return {
        key.theirs: key.kind.write(operator.attrgetter(key.ours)(config), config) if key.ours else key.only
        for key in keys
    }


def fields_of(part: str, found: dict[str, Any]) -> dict[str, Any]:
    """Those of one part, by name: decoder.hidden_size is hidden_size of the decoder."""
    return {path.partition(".")[2]: value for path, value in found.items() if path.startswith(f"{part}.")}
