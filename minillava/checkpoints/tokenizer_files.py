"""What transformers needs of a tokenizer and original LLaVA lacks: ids for placeholders, and tokenizer.json."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillava.chat.token_files import TokenizerFiles, user_defined
from minillava.chat.tokenizer import SPACE, SentencePieceTokenizer, Tokenizer
from minillava.checkpoints.hf_llava import WITH_VIDEO, hf_class
from minillava.config import ModelConfig
from minillava.errors import UserError
from minillava.schema import optional_json


def add_placeholders(config: ModelConfig, state: dict[str, Tensor], tokenizer: Tokenizer, folder: Path) -> ModelConfig:
    """Give <image>, and <video> where the class wants it, an id and a row of the embedding where a model has none.

    Original LLaVA has none, transformers needs them. `state` (our names) and tokenizer_config.json in `folder` are
    changed. New rows are the mean of the old; their number is rounded up to 64, as transformers' own conversion does.
    Nothing else about the prompt changes.
    """
    chat, rows = config.chat, config.decoder.vocab_size
    wanted = {"image": (chat.image_token, chat.image_token_id)}
    if hf_class(config) in WITH_VIDEO:
        wanted["video"] = (chat.video_token or "<video>", chat.video_token_id if chat.video_token else -1)
    added, ids, size = list[str](), dict[str, Any](), tokenizer.vocab_size
    for kind, (token, index) in wanted.items():
        if 0 <= index < rows:
            continue
        found = tokenizer.token_id(token)
        if found is None:
            found = size + len(added)
            added.append(token)
        ids |= {f"{kind}_token": token, f"{kind}_token_id": found}
    chat = dataclasses.replace(chat, **ids)
    if added:
        _add_tokens(folder / "tokenizer_config.json", dict(enumerate(added, size)))
    most = max(chat.markers.values())
    if most >= rows:
        rows = -(-(most + 1) // 64) * 64
        for name in {"decoder.embed.weight", "decoder.head.weight"} & state.keys():
            old = state[name]
            new = old.float().mean(0, keepdim=True).to(old.dtype).expand(rows - len(old), -1)
            state[name] = torch.cat([old, new])
    decoder = dataclasses.replace(config.decoder, vocab_size=rows)
    return dataclasses.replace(config, decoder=decoder, chat=chat)


def _add_tokens(path: Path, tokens: dict[int, str]) -> None:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    values = optional_json(path)
    added = {str(id): flags | {"content": token, "special": True} for id, token in tokens.items()}
    values |= {"added_tokens_decoder": (values.get("added_tokens_decoder") or {}) | added}
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer_json(folder: Path) -> None:
    """Put tokenizer.json beside a lone tokenizer.model, as original LLaVA has it, with the same ids.

    transformers 5 reads a LLaVA's tokenizer.model without the space in front of a text.
    """
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    tokenizer = SentencePieceTokenizer(TokenizerFiles(folder))
    sp, path = tokenizer.sp, folder / "tokenizer.model"
    vocab = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    unknown = sp.id_to_piece(sp.unk_id())
    backend = Backend(models.BPE(vocab, _merges(sp, vocab, path), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    # A blank is a piece's own letter, and one stands in front of a text where this tokenizer puts one.
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    prefixed = tokenizer.encode("a", True) != tokenizer.encode("a", False)
    if prefixed and tokenizer.prefix_after_special:
        spaces.insert(0, normalizers.Prepend(SPACE))
    elif prefixed:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "first", split=False)
    backend.normalizer = normalizers.Sequence(spaces)
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    # A blank that stands in front of texts will also stand behind a piece that is found first, unlike SentencePiece's.
    for id in sorted(tokenizer.added_ids | user_defined(path)):
        special = id in tokenizer.special_ids
        token = AddedToken(tokenizer.token_bytes(id).decode(), special=special, normalized=False)
        (backend.add_special_tokens if special else backend.add_tokens)([token])
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        bos = tokenizer.special_tokens["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_id)]
        )
    backend.save(str(folder / "tokenizer.json"))
    config = folder / "tokenizer_config.json"
    stated = {**tokenizer.special_tokens, "add_bos_token": tokenizer.adds_bos}
    values = stated | optional_json(config) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _merges(sp: Any, vocab: dict[str, int], path: Path) -> list[tuple[str, str]]:
    """A BPE of SentencePiece is a list of pieces by rank; its merges are all ways to make a piece of two others,
    best-ranked piece first."""
    plain = [i for i in vocab.values() if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))]
    if any(sp.get_score(i) != int(sp.get_score(i)) for i in plain):  # log-probabilities: a unigram model
        raise UserError(f"{path}: only a BPE can be written as tokenizer.json; put one beside it")
    merges = []
    for piece in map(sp.id_to_piece, sorted(plain, key=lambda i: -sp.get_score(i))):
        pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in vocab and piece[k:] in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges
