"""Text to ids and back: SentencePiece (`tokenizer.model`) and `tokenizers` (`tokenizer.json`) behind one interface.

Nothing here adds a BOS by itself, and a text may be encoded in parts: a part that continues a text gets no
SentencePiece space in front, so that prompt and answer are tokenised apart and their ids simply follow each other.
Decoding goes through bytes, id by id, so what streams out is what `decode` returns at the end.
"""

import codecs
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from minillava.chat import token_files
from minillava.chat.token_files import TokenizerFiles
from minillava.errors import UserError

MEMO_SIZE = 4096  # parts of prompts whose ids are kept: some MB
SPACE = "▁"  # U+2581, SentencePiece's visible space


class Tokenizer(ABC):
    """One vocabulary. `files` says what the tokenizer's JSON files add to it."""

    prefix_after_special: bool  # a text behind a special token gets the space prefix too ("legacy" in transformers)
    adds_bos: bool  # whether a prompt opens with BOS
    vocab_size: int  # rows that the embedding needs: the largest id + 1
    added_ids: frozenset[int]  # of the tokens that are cut out of the text before the vocabulary is asked
    special_ids: frozenset[int]  # those of `added_ids` that decoding leaves out
    _strip_first_space: bool  # decoding drops the prefix space

    def __init__(self, files: TokenizerFiles):
        self.files = files
        self._memo: dict[tuple[str, bool], list[int]] = {}

    @abstractmethod
    def encode(self, text: str, first: bool) -> list[int]:
        """Ids of `text`, without BOS. Special tokens written in it become their ids, as in transformers.

        `first`: the text opens a tokenisation and gets the space prefix where the vocabulary has one;
        otherwise it continues what was encoded before.
        """

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """Id of exactly this token, None where the vocabulary lacks it; no token is empty."""

    @abstractmethod
    def token_bytes(self, id: int) -> bytes:
        """What an id contributes to the text; nothing for ids behind the vocabulary (padding rows of the head)."""

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token, ...: what a chat template may name."""
        return {name: token for name, token in self.files.named.items() if self.token_id(token) is not None}

    @property
    def bos_id(self) -> int | None:
        return self.token_id(self.files.named.get("bos_token", ""))

    @property
    def eos_id(self) -> int | None:
        return self.token_id(self.files.named.get("eos_token", ""))

    @property
    def pad_id(self) -> int | None:
        return self.token_id(self.files.named.get("pad_token", ""))

    def encode_parts(self, parts: Iterable[str]) -> list[list[int]]:
        """Ids of each part of one running text, no token crossing from one part into the next.

        What was encoded lately is kept, not to be changed: templates and questions recur in training.
        Raises UserError as `check_unicode` does.
        """
        result: list[list[int]] = []
        first = True
        for part in parts:
            ids = self._memo.get((part, first))
            if ids is None:
                check_unicode(part)
                if len(self._memo) >= MEMO_SIZE:
                    self._memo.clear()
                ids = self._memo[part, first] = self.encode(part, first)
            result.append(ids)
            if ids:
                first = self.prefix_after_special and ids[-1] in self.added_ids
        return result

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        stream = StreamDecoder(self, skip_special)
        return "".join(map(stream.push, [*ids, None]))

    def save(self, folder: Path) -> None:
        """Copy the files this tokenizer was read from."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in token_files.FILES:
            source = self.files.folder / name
            if source.is_file() and source.resolve() != (folder / name).resolve():
                shutil.copyfile(source, folder / name)


class StreamDecoder:
    """Ids in, text out, piece by piece; what comes out, joined, is `Tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer._strip_first_space

    def push(self, id: int | None) -> str:
        """The text that is complete with this id; empty while a character still lacks bytes. None is the end of the
        ids: U+FFFD for a character cut short, else nothing."""
        if id is not None and id in self._skip:
            return ""
        text = self._utf8.decode(b"" if id is None else self._tokenizer.token_bytes(id), final=id is None)
        if self._strip and text:
            self._strip = False
            text = text.removeprefix(" ")
        return text


class SentencePieceTokenizer(Tokenizer):
    """`tokenizer.model` of LLaMA, Vicuna and the original LLaVA checkpoints, as transformers 4's slow LlamaTokenizer.

    `legacy` in tokenizer_config.json decides on the space prefix of a text behind a special token: "</s>USER" is
    </s>, ▁US, ER where it is true and </s>, USER where it is false. Files that do not say are older than the flag,
    and so are the models trained with them: true. (transformers 5 takes false there, which differs behind a special
    token only; and converting a tokenizer.model it merges runs of blanks too early, which SentencePiece never did.)
    """

    def __init__(self, files: TokenizerFiles):
        super().__init__(files)
        original, sp = token_files.open_sentencepiece(files.folder / "tokenizer.model")
        self.sp = sp
        prefixed = files.config.get("add_prefix_space")
        if not isinstance(prefixed, bool):
            prefixed = original.encode("a") != sp.encode("a")
        self._prefix = " " if prefixed else ""
        self._strip_first_space = prefixed
        self.prefix_after_special = files.config.get("legacy") is not False
        for name, id in (("bos_token", sp.bos_id()), ("eos_token", sp.eos_id()), ("unk_token", sp.unk_id())):
            if id >= 0 and name not in files.named:
                files.named[name] = sp.id_to_piece(id)
        self.adds_bos = files.config.get("add_bos_token") is not False and "bos_token" in files.named

        base = sp.get_piece_size()
        self._added = dict(files.ids)
        for token in dict.fromkeys([*files.named.values(), *files.special]):
            if token not in self._added:
                known = sp.piece_to_id(token)
                if sp.id_to_piece(known) != token:
                    known = max([base - 1, *self._added.values()]) + 1
                self._added[token] = known
        self._contents = {id: token for token, id in self._added.items()}
        self.added_ids = frozenset(self._contents)
        self.special_ids = frozenset(id for id, token in self._contents.items() if files.is_special(token))
        self.vocab_size = max([base - 1, *self._contents]) + 1
        longest = sorted(self._added, key=len, reverse=True)
        self._cut = re.compile("|".join(_pattern(token, files.flags.get(token, {})) for token in longest))

    def encode(self, text: str, first: bool) -> list[int]:
        ids: list[int] = []
        at = 0
        for match in self._cut.finditer(text) if self._added else ():
            ids += self._run(text[at : match.start()], first)
            ids.append(self._added[match[match.lastindex or 0]])  # the group is a token, without blanks around it
            at, first = match.end(), self.prefix_after_special
        return ids + self._run(text[at:], first)

    def _run(self, text: str, prefix: bool) -> list[int]:
        return self.sp.encode(self._prefix + text if prefix else text) if text else []

    def token_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        id = self.sp.piece_to_id(token)
        return id if self.sp.id_to_piece(id) == token else None

    def token_bytes(self, id: int) -> bytes:
        if id in self._contents:
            return self._contents[id].encode()
        if not 0 <= id < self.sp.get_piece_size() or self.sp.is_control(id):
            return b""
        piece = self.sp.id_to_piece(id)
        return bytes([int(piece[3:5], 16)]) if self.sp.is_byte(id) else piece.replace(SPACE, " ").encode()


class JsonTokenizer(Tokenizer):
    """`tokenizer.json`: LLaMA-like (Prepend or Metaspace) and byte-level BPE (Qwen2, Llama 3, our own small one)."""

    def __init__(self, files: TokenizerFiles):
        import tokenizers

        super().__init__(files)
        self._path = path = files.folder / "tokenizer.json"
        full, decoder, prefixed = token_files.open_json(path)
        self._full = full
        self._read_decoder(decoder)
        known = {token.content for token in full.get_added_tokens_decoder().values()}
        fixed = sorted(files.ids, key=lambda token: files.ids[token])
        for token in dict.fromkeys([*fixed, *files.special]):
            if token not in known:
                flags = {"special": True, "normalized": False, **files.flags.get(token, {})}
                full.add_tokens([tokenizers.AddedToken(token, **flags)])
            if token in files.ids and full.token_to_id(token) != files.ids[token]:
                found = full.token_to_id(token)
                raise UserError(f"{path}: '{token}' is id {found}, but {files.ids[token]} in the files beside it")
        added = full.get_added_tokens_decoder()
        self.added_ids = frozenset(added)
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        largest = max(full.get_vocab(with_added_tokens=True).values(), default=0)
        self.vocab_size = token_files.checked_id(largest, f"{path}: a token") + 1
        # Its post-processor alone decides on BOS: transformers 5 ignores add_bos_token beside a tokenizer.json.
        opened, bare = token_files.guarded(path, full.encode, "a").ids, self._encode(full, "a").ids
        self.adds_bos = opened[:1] != bare[:1]
        if self.adds_bos:
            files.named["bos_token"] = str(full.id_to_token(opened[0]))
        special = next((full.id_to_token(id) for id in sorted(self.special_ids)), None)
        behind = [] if special is None else self._encode(full, special + "a").ids[1:]
        self._continuing = token_files.without_prefix(full) if prefixed else full
        self.prefix_after_special = behind != self._encode(self._continuing, "a").ids

    def _encode(self, tokenizer: Any, text: str) -> Any:
        return token_files.guarded(self._path, tokenizer.encode, text, add_special_tokens=False)

    def _read_decoder(self, steps: dict[str, Any]) -> None:
        """How this vocabulary spells bytes and blanks, from the decoder of its JSON file."""
        self._byte_level = "ByteLevel" in steps
        self._byte_fallback = "ByteFallback" in steps
        metaspace = steps.get("Metaspace", {"prepend_scheme": "never", "add_prefix_space": False})
        drops = metaspace.get("prepend_scheme", "always") != "never" and metaspace.get("add_prefix_space") is not False
        self._strip_first_space = drops or steps.get("Strip", {}).get("start", 0) > 0

    def encode(self, text: str, first: bool) -> list[int]:
        whole = self._encode(self._full, text)
        if first or self._continuing is self._full:
            return whole.ids
        # Up to the first special token the text continues; from there on it is tokenised as transformers would.
        at = next((span[0] for id, span in zip(whole.ids, whole.offsets) if id in self.added_ids), len(text))
        head, tail = self._encode(self._continuing, text[:at]).ids, text[at:]
        return head + self._encode(self._full, tail).ids if tail else head

    def token_id(self, token: str) -> int | None:
        return self._full.token_to_id(token) if token else None

    def token_bytes(self, id: int) -> bytes:
        token = self._full.id_to_token(id) if 0 <= id < self.vocab_size else None
        if token is None:
            return b""
        if id in self.added_ids:
            return token.encode()
        if self._byte_level:
            return bytes(BYTE_OF[char] for char in token) if all(char in BYTE_OF for char in token) else token.encode()
        if self._byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").encode()


def check_unicode(text: str) -> None:
    """Raises UserError for what UTF-8 cannot hold: half of a surrogate pair, as JSON can spell it and as Python keeps a
    byte of the command line or of stdin that is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at, code = text[max(0, error.start - 20) : error.start], ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            raise UserError(f"byte 0x{code - 0xDC00:02x} behind {at!r} is not UTF-8; write the text in UTF-8") from None
        raise UserError(f"half a surrogate pair behind {at!r}; mend the \\u escape in the JSON") from None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder. Raises UserError where there is none or it cannot be read.

    With both files there, tokenizer.json wins: for a LLaVA checkpoint transformers 5 loads exactly that file, and
    where the two disagree (text behind a special token, leading blanks) it is the one whose ids its processor gives.
    The original checkpoints ship tokenizer.model alone.
    """
    folder = Path(folder)
    files = TokenizerFiles(folder)
    if (folder / "tokenizer.json").is_file():
        return JsonTokenizer(files)
    if (folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(files)
    raise UserError(f"{folder}: neither tokenizer.json nor tokenizer.model is there; copy one from the base model")


def _pattern(token: str, flags: dict[str, bool]) -> str:
    before, after = (r"\s*" if flags.get(side) else "" for side in ("lstrip", "rstrip"))
    return f"{before}({re.escape(token)}){after}"


# Byte-level BPE writes each byte as one printable character (GPT-2): itself, or the next free one from U+0100.
PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTE_OF = {chr(byte): byte for byte in PRINTABLE}
BYTE_OF |= {chr(0x100 + i): byte for i, byte in enumerate(b for b in range(256) if b not in PRINTABLE)}
