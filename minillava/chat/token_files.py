"""The files of a tokenizer, of any age of transformers, and whole or damaged: what is none is refused in a line.

`chat.tokenizer` turns text to ids with what is read here.
"""

import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from minillava.errors import UserError
from minillava.files import refuse_pointer
from minillava.schema import optional_json, read_json

FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)
# The order in which transformers appends the special tokens that a vocabulary lacks.
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ADDED = "added_tokens_decoder"
PREFIXING = ("normalizer", "pre_tokenizer")  # parts of a tokenizer.json
MAX_ID = 1 << 24  # a hundred times the largest vocabulary


class TokenizerFiles:
    """What tokenizer_config.json, special_tokens_map.json and added_tokens.json say, of any age of transformers."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = optional_json(folder / "tokenizer_config.json")
        special = {**optional_json(folder / "special_tokens_map.json"), **self.config}
        self.named: dict[str, str] = {}  # bos_token -> <s>
        for name in [*SPECIAL_NAMES, *(key for key in special if key.endswith("_token"))]:
            if (token := token_text(special.get(name))) is not None:
                self.named[name] = token
        extra: list[str] = []
        for key in ("additional_special_tokens", "extra_special_tokens"):
            values = special.get(key) or []
            if isinstance(values, dict):  # extra_special_tokens of transformers 5: {"image_token": "<image>"}
                self.named.update({name: token for name, v in values.items() if (token := token_text(v)) is not None})
                values = list(values.values())
            if not isinstance(values, list):
                raise UserError(f"{folder}: {key} is {values!r:.40}, expected a list; correct tokenizer_config.json")
            extra += [token for v in values if (token := token_text(v)) is not None]
        # Without an id of their own in any file, these go to the end of the vocabulary, in this order.
        self.special = list(dict.fromkeys([*self.named.values(), *extra]))
        self.ids: dict[str, int] = {}  # ids that the files fix
        self.flags: dict[str, dict[str, bool]] = {}  # special, lstrip, rstrip, normalized, single_word
        for token, id in optional_json(folder / "added_tokens.json").items():
            self.ids[token] = checked_id(id, f"{folder / 'added_tokens.json'}: '{token}'")
        where, decoder = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder", self.config.get(ADDED) or {}
        if not isinstance(decoder, dict):
            raise UserError(f"{where} is {decoder!r:.40}, expected an object of tokens by id; correct it")
        for id, entry in decoder.items():
            token = token_text(entry)
            if token is None:
                raise UserError(f"{where}['{id}'] has no 'content'")
            self.ids[token] = checked_id(id, f"{where}: '{token}'")
            if isinstance(entry, dict):
                self.flags[token] = {k: v for k, v in entry.items() if isinstance(v, bool)}

    @cached_property
    def _written(self) -> dict[Any, Any]:
        """Ids of the added tokens of tokenizer.json, which may have 20 MB: read where the small files do not tell."""
        added = optional_json(self.folder / "tokenizer.json").get("added_tokens") or []
        return {str(token.get("content")): token.get("id") for token in added if isinstance(token, dict)}

    def added_id(self, token: str | None) -> int | None:
        """The id of a token that the files list as an added one."""
        if token is None:
            return None
        return self.ids[token] if token in self.ids else self._written.get(token)

    def is_special(self, token: str) -> bool:
        """An added token of which nothing is said counts as special: <image>, <im_start> of the first LLaVAs."""
        return token in self.special or self.flags.get(token, {}).get("special", True)


def open_json(path: Path) -> tuple[Any, dict[str, Any], bool]:
    """The library's tokenizer of a tokenizer.json, without truncation and padding; the steps of its decoder; whether
    it may put a space in front of a text."""
    import tokenizers

    spec = read_json(path)
    for token, id in _ids_in(spec):
        checked_id(id, f"{path}: '{token}'")
    tokenizer = guarded(path, tokenizers.Tokenizer.from_file, str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    decoder = spec.get("decoder")
    steps = {} if decoder is None else {step["type"]: step for step in decoder.get("decoders", [decoder])}
    unknown = set(steps) - {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
    if unknown or not steps:
        raise UserError(
            f"{path}: decoder {', '.join(sorted(unknown)) or 'null'} is not supported; "
            "byte-level and SentencePiece-like vocabularies are"
        )
    return tokenizer, steps, any(_unprefixed(spec.get(part)) != spec.get(part) for part in PREFIXING)


def without_prefix(tokenizer: Any) -> Any:
    """The same tokenizer without a prefix space, for text that goes on; the very same where there is none."""
    import tokenizers

    spec = json.loads(tokenizer.to_str())
    bare = spec | {part: _unprefixed(spec[part]) for part in PREFIXING}
    return tokenizer if bare == spec else tokenizers.Tokenizer.from_str(json.dumps(bare))


def _unprefixed(step: Any) -> Any:
    """A normalizer or pre-tokenizer of tokenizer.json without what puts a space in front of the text."""
    if step is None or step["type"] == "Prepend":
        return None
    for inner in ("normalizers", "pretokenizers"):
        if inner in step:
            return {**step, inner: [kept for s in step[inner] if (kept := _unprefixed(s)) is not None]}
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    return {**step, "add_prefix_space": False} if step["type"] == "ByteLevel" else step


def open_sentencepiece(path: Path) -> tuple[Any, Any]:
    """The model of a tokenizer.model as it is, and without a prefix space, which is put where it belongs by hand."""
    import sentencepiece

    refuse_pointer(path)
    model = path.read_bytes()
    # Concatenated protobufs merge: normalizer_spec (3) {add_dummy_prefix (3): 0, remove_extra_whitespaces (4): 0}.
    # LLaMA's models keep every blank anyhow.
    plain = model + b"\x1a\x04\x18\x00\x20\x00"
    try:
        original = sentencepiece.SentencePieceProcessor(model_proto=model)
        return original, sentencepiece.SentencePieceProcessor(model_proto=plain)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: not a SentencePiece model ({error}); fetch the file again") from error


def user_defined(path: Path) -> set[int]:
    """Ids of the pieces of a tokenizer.model that are found in a text before all others (Yi's <|im_start|>), which
    SentencePiece's Python class does not tell: in its protobuf field 1 is a piece, and field 3 of that its kind."""
    pieces = [value for number, value in _fields(path.read_bytes()) if number == 1]
    return {id for id, piece in enumerate(pieces) if isinstance(piece, bytes) and (3, 4) in _fields(piece)}


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protobuf message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        else:
            size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            yield number, message[at : at + size]
            at += size


def token_text(value: Any) -> str | None:
    """A token is written as a string or as {"content": ..., flags}."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def checked_id(value: Any, where: str) -> int:
    """An id of the files. Raises UserError for what is none, and for one that no vocabulary reaches."""
    try:
        id = int(value)
    except (TypeError, ValueError, OverflowError):
        id = -1
    if not 0 <= id < MAX_ID:
        raise UserError(f"{where} has the id {value!r:.40}, expected an integer from 0 to {MAX_ID - 1:,}; correct it")
    return id


def _ids_in(spec: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Tokens and their ids in a tokenizer.json, which the library makes a list of, up to the largest."""
    vocab = model.get("vocab") if isinstance(model := spec.get("model"), dict) else None
    if isinstance(vocab, dict):
        yield from vocab.items()
    for token in spec.get("added_tokens") or ():
        if isinstance(token, dict):
            yield token.get("content"), token.get("id")


def guarded(path: Path, call: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """What a function of tokenizers returns. Raises UserError for its errors, that have no class of their own, and for
    its panics, that are no Exceptions: a pattern that runs away is one, after ten million steps."""
    try:
        return call(*given, **options)
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a tokenizer.json that works ({reason}); fetch the file again") from error
