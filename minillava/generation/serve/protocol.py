"""OpenAI's JSON: a body becomes requests, answers become bodies and chunks, mistakes become errors of its shape."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from minillava.chat.messages import Message, read_messages
from minillava.chat.tokenizer import Tokenizer
from minillava.config import ChatConfig
from minillava.errors import UserError, nearest
from minillava.generation.answer import Answer, TokenLogprob
from minillava.generation.engine import Engine
from minillava.generation.look import Heads, Look, attention_over_pictures
from minillava.generation.request import Request, Row
from minillava.generation.sampling import Sampling
from minillava.generation.serve.grammar import Grammars
from minillava.media.sources import Sources
from minillava.media.visual import Media

MOST_CHOICES = 16  # n
MOST_PROMPTS = 128  # of one body of /v1/completions
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
COMMON = {"model", "stream", "stream_options", "stop", "max_tokens", "seed", "n"}
COMMON |= {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
CHAT = COMMON | {"messages", "max_completion_tokens", "logprobs", "top_logprobs", "response_format"}
COMPLETIONS = COMMON | {"prompt", "logprobs"}
LOOK = {"model", "messages", "word", "layer", "heads"}
NEUTRAL = {  # what this server does not do, and the values that ask for nothing
    **{"frequency_penalty": (0, None), "presence_penalty": (0, None), "logit_bias": ({}, None), "tools": ([], None)},
    **{"tool_choice": ("none", "auto", None), "functions": ([], None), "echo": (False, None), "best_of": (1, None)},
    **{"suffix": ("", None), "modalities": (["text"], None), "audio": (None,), "reasoning_effort": (None,)},
}
JSON_OBJECT = {"type": "object"}  # the schema of response_format json_object


class BadRequest(Exception):
    """A body that cannot be answered: the message, and the key it is about."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


def error_body(message: str, status: int = 400, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error shape."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Body:
    """A body's values, each checked as it is taken."""

    def __init__(self, values: Any, known: set[str]):
        if not isinstance(values, dict):
            raise BadRequest("the body has to be a JSON object")
        for key, value in values.items():
            if key in NEUTRAL and value not in NEUTRAL[key]:
                raise BadRequest(f"'{key}' is not supported", key)
            if key not in known | IGNORED | NEUTRAL.keys():
                raise BadRequest(f"'{key}' is unknown{nearest(key, known)}", key)
        self.values = values

    def number(self, key: str, default: Any, low: float, high: float, whole: bool = False) -> Any:
        value = self.values.get(key)
        if value is None:
            return default
        kinds = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            raise BadRequest(f"{key} is {value!r:.40}; use {'an integer' if whole else 'a number'} "
                             f"from {low:g} to {high:g}", key)  # fmt: skip
        return value

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if not isinstance(value, bool | None):
            raise BadRequest(f"{key} is {value!r:.40}; use true or false", key)
        return bool(value)

    def stop(self) -> list[str]:
        value = self.values.get("stop")
        texts = [value] if isinstance(value, str) else value or []
        if not isinstance(texts, list) or len(texts) > 16 or not all(isinstance(t, str) and t for t in texts):
            raise BadRequest("stop has to be a text, or up to 16 texts", "stop")
        return texts

    @property
    def includes_usage(self) -> bool:
        options = self.values.get("stream_options")
        return isinstance(options, Mapping) and bool(options.get("include_usage"))

    def common(self, context: int) -> list[Request]:
        """As many requests as answers are asked for, without their prompts."""
        seed = self.number("seed", None, -(2**63), 2**63 - 1, whole=True)
        seed = secrets.randbits(62) if seed is None else seed
        heat, top_p = self.number("temperature", 1.0, 0, 2), self.number("top_p", 1.0, 0, 1) or 1e-9
        top_k = max(0, self.number("top_k", 0, -1, 2**31, whole=True))
        limits = [self.number(key, None, 1, 2**31, whole=True) for key in ("max_completion_tokens", "max_tokens")]
        limit = next((value for value in limits if value is not None), context)
        how: dict[str, Any] = {"max_new_tokens": min(limit, context), "stop": self.stop()}
        n = self.number("n", 1, 1, MOST_CHOICES, whole=True)
        min_p, penalty = self.number("min_p", 0.0, 0, 1), self.number("repetition_penalty", None, 0.01, 100)
        samplings = [Sampling(heat, top_p, top_k, (seed + i) % 2**63, min_p, penalty) for i in range(n)]
        return [Request(sampling=sampling, **how) for sampling in samplings]


@dataclass(frozen=True)
class Form:
    """What an endpoint takes, and how it writes answers."""

    keys: set[str]
    read: Callable[[Body], list[Request]]
    logprobs: Callable[[Sequence[TokenLogprob]], dict[str, Any]]
    prefix: str  # of ids
    kind: str  # "object" of a body
    chunk: str  # and of an event of a stream
    whole: Callable[[str], dict[str, Any]]  # the text of an answer in its choice
    piece: Callable[[str], dict[str, Any]]  # and a part of it
    first: dict[str, Any]  # before all parts
    last: dict[str, Any]  # behind them

    def choice(self, index: int, said: dict[str, Any], answer: Answer | None = None) -> dict[str, Any]:
        """A choice in which this is said; `answer`: the text ends with it."""
        logprobs = self.logprobs(answer.logprobs) if answer and answer.logprobs else None
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": answer and answer.finish_reason}


class Protocol:
    """What one model's server makes of bodies."""

    def __init__(self, config: ChatConfig, tokenizer: Tokenizer, grammars: Grammars, sources: Sources, context: int):
        self.config, self.tokenizer, self.grammars, self.sources = config, tokenizer, grammars, sources
        self.context = context
        self.chat = Form(
            CHAT, self.chat_requests, self.chat_logprobs, "chatcmpl", "chat.completion", "chat.completion.chunk",
            whole=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
            piece=lambda text: {"delta": {"content": text}},
            first={"delta": {"role": "assistant", "content": ""}}, last={"delta": {}},
        )  # fmt: skip
        self.completions = Form(
            COMPLETIONS, self.completion_requests, self.completion_logprobs, "cmpl", "text_completion",
            "text_completion", whole=lambda text: {"text": text}, piece=lambda text: {"text": text},
            first={"text": ""}, last={"text": ""},
        )  # fmt: skip

    def chat_requests(self, body: Body) -> list[Request]:
        """The choices of /v1/chat/completions. Raises BadRequest, UserError."""
        messages, media = self.messages(body)
        top = body.number("top_logprobs", 0, 0, 20, whole=True)
        logprobs = top if body.flag("logprobs") else None
        more: dict[str, Any] = {"messages": messages, "media": media, "logprobs": logprobs}
        return [replace(r, grammar=self._grammar(body), **more) for r in body.common(self.context)]

    def messages(self, body: Body) -> tuple[list[Message], list[Media]]:
        """The conversation and its pictures. Raises BadRequest."""
        given = body.values.get("messages")
        if not isinstance(given, list) or not given:
            raise BadRequest("messages has to be a list of at least one message", "messages")
        try:
            messages, sources = read_messages(self.config, given)
            return messages, [self.sources.open(url, video, n) for n, (video, url) in enumerate(sources, 1)]
        except UserError as error:
            raise BadRequest(str(error), "messages") from None

    def look(self, body: Body) -> Callable[[Engine], list[Look]]:
        """The attention of characters `word` of the last message."""
        messages, media = self.messages(body)
        word, heads = body.values.get("word"), body.values.get("heads", "mean")
        if not isinstance(word, list) or len(word) != 2 or not all(type(at) is int for at in word):
            raise BadRequest("word has to be [first character, end] of the answer", "word")
        if heads not in ("mean", "max"):
            raise BadRequest(f"heads is {heads!r:.40}; use 'mean' or 'max'", "heads")
        layer = body.number("layer", None, -1000, 1000, whole=True)
        over: Heads = "max" if heads == "max" else "mean"
        return lambda engine: attention_over_pictures(engine, messages, media, (word[0], word[1]), layer, over)

    def completion_requests(self, body: Body) -> list[Request]:
        """The choices of /v1/completions: n for each prompt, a text or ids."""
        given = body.values.get("prompt")
        prompts = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        if len(prompts) > MOST_PROMPTS:
            raise BadRequest(f"prompt holds {len(prompts)} prompts; send at most {MOST_PROMPTS}", "prompt")
        logprobs = body.number("logprobs", None, 0, 5, whole=True)
        requests = [replace(request, logprobs=logprobs) for request in body.common(self.context)]
        if body.values.get("max_tokens") is None:  # as OpenAI's
            requests = [replace(request, max_new_tokens=16) for request in requests]
        return [replace(request, **self._prompt(p)) for p in prompts for request in requests]

    def _prompt(self, prompt: Any) -> dict[str, Any]:
        if isinstance(prompt, str) and prompt:
            return {"raw": prompt}
        size = self.tokenizer.vocab_size
        if isinstance(prompt, list) and prompt and all(type(id) is int and 0 <= id < size for id in prompt):
            return {"prompt_ids": prompt}
        raise BadRequest(f"prompt has to be a text or ids from 0 to {size - 1}, or a list of them", "prompt")

    def _grammar(self, body: Body) -> Any:
        wanted = body.values.get("response_format")
        kind = wanted.get("type") if isinstance(wanted, dict) else None
        if wanted is None or kind == "text":
            return None
        schema = JSON_OBJECT if kind == "json_object" else None
        if kind == "json_schema" and isinstance(inner := wanted.get("json_schema"), dict):
            schema = inner.get("schema")
        if not isinstance(schema, dict):
            raise BadRequest("response_format has to be text, json_object or a json_schema", "response_format")
        return self.grammars.of_schema(schema)

    # ---- answers ----

    def chat_logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        """As in a choice of a chat."""

        def entry(id: int, logprob: float) -> dict[str, Any]:
            spelled = self.tokenizer.token_bytes(id)
            return {"token": spelled.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": [*spelled]}

        return {"content": [entry(t.id, t.logprob) | {"top_logprobs": [entry(*pair) for pair in t.likeliest]}
                            for t in self._said(found)]}  # fmt: skip

    def _said(self, found: Sequence[TokenLogprob]) -> list[TokenLogprob]:
        """Without the token that ended the answer."""
        return [t for t in found if t.id not in self.grammars.eos_ids]

    def completion_logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        """As in a choice of /v1/completions."""

        def text(id: int) -> str:
            return self.tokenizer.token_bytes(id).decode(errors="replace")

        found = self._said(found)
        texts = [text(t.id) for t in found]
        offsets = [*accumulate(map(len, texts), initial=0)][:-1]
        top = [{text(id): logprob for id, logprob in t.likeliest} for t in found]
        return {"tokens": texts, "token_logprobs": [t.logprob for t in found], "top_logprobs": top,
                "text_offset": offsets}  # fmt: skip


def looks_body(looks: Sequence[Look]) -> dict[str, Any]:
    """Weights of each picture's visual tokens, and its maps; `box` is what a map covers where the picture is 0 to 1."""

    def written(look: Look) -> dict[str, Any]:
        maps = [{"weights": map_HW.tolist(), "box": box} for map_HW, box in look.maps]
        return {"weights": look.weights_T.tolist(), "share": float(look.weights_T.sum()), "maps": maps}

    return {"object": "attention", "pictures": [written(look) for look in looks]}


def usage(rows: Sequence[Row], answers: Sequence[Answer], n: int) -> dict[str, Any]:
    """Tokens of a body: a prompt with n choices counts once. `picture_tokens` and `timing` are this server's own."""
    prompts, new = answers[::n], sum(len(a.token_ids) for a in answers)
    counts = {"prompt_tokens": sum(a.prompt_tokens for a in prompts), "completion_tokens": new}
    counts["total_tokens"] = sum(counts.values())
    details: dict[str, Any] = {"cached_tokens": sum(a.reused_tokens for a in prompts)}
    details["image_tokens"] = sum(a.image_tokens for a in prompts)
    details["picture_tokens"] = [tokens for row in rows[::n] for _, tokens in row.picture_keys]
    first = answers[0]
    timing = {"vision_s": first.vision_s, "prefill_s": first.prefill_s, "decode_tok_per_s": first.decode_tok_per_s}
    return {**counts, "prompt_tokens_details": details, "timing": timing}
