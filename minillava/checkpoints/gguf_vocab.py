"""A vocabulary as llama.cpp's files hold it: SentencePiece pieces with scores, or byte-level BPE with merges."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minillava.chat.prompt import stop_ids
from minillava.chat.token_files import user_defined
from minillava.chat.tokenizer import SentencePieceTokenizer, Tokenizer
from minillava.config import ChatConfig
from minillava.errors import UserError
from minillava.schema import read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens, gguf.TokenType
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
# How a text is cut before BPE -> what llama.cpp calls it. It knows no others.
CUTS = {
    "": "gpt-2",  # ByteLevel's own pattern
    rf"{_WORDS}|\p{{N}}{_TAIL}": "qwen2",
    rf"{_WORDS}|\p{{N}}{{1,3}}{_TAIL}": "llama-bpe",
    # That of the tokenizers which minillava trains. BLOOM's cuts fewer words apart, but a merge across such a cut was
    # never learned; two blanks in a row are cut otherwise.
    r" ?\p{L}[\p{L}-]*:?| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+": "bloom",
}


@dataclass
class Vocabulary:
    """Tokens by id."""

    model: str  # "llama" (SentencePiece) or "gpt2"
    tokens: list[str]
    kinds: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    cut: str = "default"  # what llama.cpp calls the pattern that cuts a text before BPE


def read_vocabulary(tokenizer: Tokenizer, rows: int) -> Vocabulary:
    """The vocabulary for an embedding of so many rows; those behind it are unused tokens.

    Raises UserError for a kind, or a cut before BPE, that llama.cpp does not know.
    """
    vocabulary = _of_pieces(tokenizer) if isinstance(tokenizer, SentencePieceTokenizer) else _of_json(tokenizer)
    for id in range(len(vocabulary.tokens), max([rows - 1, *tokenizer.added_ids]) + 1):
        _add(vocabulary, f"[UNUSED{id}]", UNUSED)
    for id in tokenizer.added_ids:
        vocabulary.tokens[id] = tokenizer.token_bytes(id).decode()
        if vocabulary.kinds[id] not in (UNKNOWN, BYTE):
            vocabulary.kinds[id] = CONTROL if id in tokenizer.special_ids else USER_DEFINED
    for part in (vocabulary.tokens, vocabulary.kinds, vocabulary.scores):
        del part[rows:]
    return vocabulary


def _add(vocabulary: Vocabulary, token: str, kind: int, score: float = -1000.0) -> None:
    vocabulary.tokens.append(token)
    vocabulary.kinds.append(kind)
    if vocabulary.model == "llama":
        vocabulary.scores.append(score)


def _of_pieces(tokenizer: SentencePieceTokenizer) -> Vocabulary:
    sp, vocabulary = tokenizer.sp, Vocabulary("llama", [], [])
    defined = user_defined(tokenizer.files.folder / "tokenizer.model")
    kinds = {UNKNOWN: sp.is_unknown, CONTROL: sp.is_control, BYTE: sp.is_byte, UNUSED: sp.is_unused}
    kinds[USER_DEFINED] = defined.__contains__
    for i in range(sp.get_piece_size()):
        kind = next((kind for kind, test in kinds.items() if test(i)), NORMAL)
        _add(vocabulary, sp.id_to_piece(i), kind, sp.get_score(i))
    return vocabulary


def _of_json(tokenizer: Tokenizer) -> Vocabulary:
    """tokenizer.json: byte-level BPE, or SentencePiece's BPE as merges, where the best-ranked merge is the score."""
    path = tokenizer.files.folder / "tokenizer.json"
    spec = read_json(path)
    model = spec["model"]
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"{path}: a {model['type']} vocabulary; llama.cpp's files hold BPE alone")
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    byte_level = not model.get("byte_fallback")
    vocabulary = Vocabulary("gpt2" if byte_level else "llama", [], [])
    if byte_level:
        vocabulary.merges = [" ".join(pair) for pair in pairs]
        pattern = _pattern(spec.get("pre_tokenizer"))
        if pattern not in CUTS:
            raise UserError(f"{path}: cuts texts by {pattern!r} before BPE, which llama.cpp does not know")
        vocabulary.cut = CUTS[pattern]
    rank = {a + b: i for i, (a, b) in reversed(list(enumerate(pairs)))}
    by_id = {i: piece for piece, i in model["vocab"].items()}
    for i in range(max(by_id, default=-1) + 1):
        piece = by_id.get(i)
        if piece is None:
            _add(vocabulary, f"[UNUSED{i}]", UNUSED)
        elif not byte_level and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            _add(vocabulary, piece, BYTE, 0.0)
        else:
            unknown = piece == model.get("unk_token")
            _add(vocabulary, piece, UNKNOWN if unknown else NORMAL, -float(rank.get(piece, len(pairs))))
    return vocabulary


def _pattern(step: dict[str, Any] | None) -> str:
    """The regular expression of a pre-tokenizer, "" for that of ByteLevel itself."""
    steps = [] if step is None else step.get("pretokenizers", [step])
    return "|".join(s["pattern"].get("Regex", s["pattern"].get("String", "")) for s in steps if s["type"] == "Split")


def write_vocabulary(
    file: GGUFWriter, vocabulary: Vocabulary, tokenizer: Tokenizer, chat: ChatConfig, template: str
) -> None:
    """Tokens, special ids and the chat template, as metadata of a decoder's file."""
    file.add_tokenizer_model(vocabulary.model)
    file.add_tokenizer_pre(vocabulary.cut)
    file.add_token_list(vocabulary.tokens)
    file.add_token_types(vocabulary.kinds)
    if vocabulary.model == "llama":
        file.add_token_scores(vocabulary.scores)
        file.add_add_space_prefix(tokenizer.encode("a", True) != tokenizer.encode("a", False))
        file.add_unk_token_id(vocabulary.kinds.index(UNKNOWN) if UNKNOWN in vocabulary.kinds else 0)
    else:
        file.add_token_merges(vocabulary.merges)
    stops = [*chat.eos_ids, *sorted(stop_ids(chat, tokenizer) - set(chat.eos_ids))]
    ids = {"bos": chat.bos_id if tokenizer.bos_id is None else tokenizer.bos_id, "pad": chat.pad_id}
    ids |= dict(zip(("eos", "eot"), stops))
    for name, id in ids.items():
        if id is not None and 0 <= id < len(vocabulary.tokens):
            getattr(file, f"add_{name}_token_id")(id)
    file.add_add_bos_token(tokenizer.adds_bos)
    file.add_add_eos_token(False)
    file.add_chat_template(template)
