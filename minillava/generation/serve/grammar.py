"""Answers that are JSON, or JSON of a schema: llguidance says after each token which may come next."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from minillava.chat.tokenizer import Tokenizer
from minillava.errors import UserError

# As json.dumps writes it. Free spacing lets a model that is unsure write blanks for ever.
SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Vocabulary:
    """A tokenizer as llguidance takes it."""

    def __init__(self, tokenizer: Tokenizer, eos_id: int):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = eos_id, tokenizer.bos_id
        self.special_token_ids = sorted({*tokenizer.special_ids, eos_id})
        self.tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode(errors="replace"), first=False)


class Grammars:
    """Makes a `minillava.generation.request.Grammar` for each answer that asks for one."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: frozenset[int]):
        self._tokenizer, self.eos_ids = tokenizer, sorted(eos_ids)
        self._known: Any = None

    def of_schema(self, schema: dict[str, Any]) -> JsonGrammar:
        """Raises UserError for a schema that is not understood, or without llguidance."""
        if find_spec("llguidance") is None:
            raise UserError("response_format needs llguidance on the server; pip install llguidance")
        import llguidance

        if self._known is None:
            vocabulary = llguidance.TokenizerWrapper(Vocabulary(self._tokenizer, self.eos_ids[0]))
            self._known = llguidance.LLTokenizer(vocabulary, eos_token=self.eos_ids)
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), SPACING)
            matcher = llguidance.LLMatcher(self._known, grammar)
        except ValueError as error:
            raise UserError(f"response_format: {error}") from None
        if matcher.is_error():
            raise UserError(f"response_format: {matcher.get_error().splitlines()[0]}")
        return JsonGrammar(matcher, schema)


class JsonGrammar:
    """One answer's way through a schema."""

    def __init__(self, matcher: Any, schema: dict[str, Any]):
        self._matcher, self.schema = matcher, schema

    def allowed(self) -> Tensor:
        """Which ids may come next, [V] of bool."""
        return torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8) > 0

    def advance(self, id: int) -> None:
        """The next id has come."""
        self._matcher.consume_token(id)
