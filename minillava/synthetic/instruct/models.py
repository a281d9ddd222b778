"""Who answers: an OpenAI-compatible endpoint, or a checkpoint in this process."""

from __future__ import annotations

import asyncio
import base64
import datetime
import email.utils
import random
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillava.chat.messages import Message
from minillava.errors import UserError
from minillava.synthetic.instruct.replies import Rejected

LONGEST_WAIT_S = 60.0  # of our own accord
LONGEST_ASKED_S = 900.0  # by a server; who asks for more has no time today


@dataclass(frozen=True)
class Reply:
    """What a model wrote, and what it counted."""

    text: str
    cut: bool = False  # at the most tokens allowed
    prompt_tokens: int = 0
    new_tokens: int = 0


class Unanswered(Exception):
    """An endpoint gave no answer, however often it was asked."""


@dataclass
class Endpoint:
    """An OpenAI-compatible server. What it says about waiting holds for all requests."""

    url: str
    name: str
    api_key: str = "none"
    temperature: float = 0.7
    max_tokens: int = 1024
    retries: int = 8
    timeout_s: float = 120.0
    wait_s: float = 0.5  # before the first try again; twice as long each time
    _free_at: float = field(default=0.0, init=False)
    _client: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        try:
            import openai
        except ImportError:
            raise UserError("endpoints are asked by the openai package: pip install 'minillava[instruct]'") from None
        self.openai = openai

    async def reply(self, key: str, messages: Sequence[Message], image: Path | None = None) -> Reply:
        """The next turn; `image` goes with the last message. `key` names the request: one that is sent twice has one.

        Raises Rejected where this one request is refused, Unanswered where nobody answers, UserError where none will.
        """
        if self._client is None:  # inside the loop that uses it
            self._client = self.openai.AsyncOpenAI(
                base_url=self.url, api_key=self.api_key, max_retries=0, timeout=self.timeout_s
            )
        why = ""
        for tried in range(self.retries + 1):
            while (left := self._free_at - time.monotonic()) > 0:
                await asyncio.sleep(left)
            try:
                return self._read(await self._send(key, messages, image))
            except self.openai.APIStatusError as error:
                why = self._explain(error)
                self._hold(error, tried)
            except (self.openai.APIError, ValueError, LookupError, AttributeError, TypeError) as error:
                why = f"{type(error).__name__}: {error}"  # cut off, or no reply in what came
            await asyncio.sleep(self._backoff(tried) if tried < self.retries else 0)
        raise Unanswered(f"{self.url}: {why}")

    async def _send(self, key: str, messages: Sequence[Message], image: Path | None) -> Any:
        said: list[dict[str, Any]] = [{"role": message.role, "content": message.text} for message in messages]
        if image is not None:
            data = base64.b64encode(image.read_bytes()).decode()
            kind = "png" if image.suffix.lower() == ".png" else "jpeg"
            picture = {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}
            said[-1]["content"] = [picture, {"type": "text", "text": messages[-1].text}]
        return await self._client.chat.completions.create(
            model=self.name, messages=said, temperature=self.temperature, max_tokens=self.max_tokens,
            extra_headers={"Idempotency-Key": key},
        )  # fmt: skip

    def _read(self, answer: Any) -> Reply:
        (choice, *_), usage = answer.choices, answer.usage
        if not isinstance(choice.message.content, str):
            raise ValueError("no text in the reply")
        counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        return Reply(choice.message.content, choice.finish_reason == "length", *counts)

    def _explain(self, error: Any) -> str:
        """What went wrong. Raises what ends the run or this request: what asking again does not change."""
        status, text = error.status_code, " ".join(str(error.message).split())[:200]
        if status in (401, 403, 404) or getattr(error, "code", None) == "insufficient_quota":
            raise UserError(f"{self.url}: {status}: {text}; check --url, --model and OPENAI_API_KEY") from None
        if status < 500 and status not in (408, 409, 425, 429):
            raise Rejected(f"the endpoint refuses the request: {status}: {text}")
        return f"{status}: {text}"

    def _hold(self, error: Any, tried: int) -> None:
        """Nobody asks before the time that the server named, or for a while where it is busy."""
        asked = retry_after(error.response.headers)
        if asked is None and error.status_code == 429:
            asked = self._backoff(tried)
        if asked is not None and asked > LONGEST_ASKED_S:
            raise UserError(f"{self.url}: asks to wait {asked:,.0f} s; run the same command again then")
        if asked is not None:
            self._free_at = max(self._free_at, time.monotonic() + asked)

    def _backoff(self, tried: int) -> float:
        return min(LONGEST_WAIT_S, self.wait_s * 2**tried) * random.uniform(0.5, 1.0)


def retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait: Retry-After as a number or a date, or in milliseconds; None: it does not."""
    try:
        if "retry-after-ms" in headers:
            return float(headers["retry-after-ms"]) / 1000
        value = headers.get("retry-after")
        if value is None:
            return None
        if value.replace(".", "", 1).isdigit():
            return float(value)
        until = email.utils.parsedate_to_datetime(value)
        return max(0.0, (until - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


class Local:
    """As `Endpoint`: a checkpoint in this process. Requests that come while it computes are answered together, next."""

    MOST = 64  # requests at once

    def __init__(self, source: Path | str, temperature: float = 0.7, max_tokens: int = 1024):
        from minillava.api import LLaVA

        self.engine, self.temperature, self.max_tokens = LLaVA.from_pretrained(source).engine, temperature, max_tokens
        self.waiting: list[tuple[Any, asyncio.Future]] = []
        self.task: asyncio.Task | None = None

    async def reply(self, key: str, messages: Sequence[Message], image: Path | None = None) -> Reply:
        from minillava.generation.request import Request
        from minillava.generation.sampling import Sampling
        from minillava.media.visual import media
        from minillava.processor import user_message

        given = media([image] if image is not None else [], [])
        said = [*messages[:-1], user_message(self.engine.config.chat, messages[-1].text, given)]
        how = Sampling(self.temperature, seed=zlib.crc32(key.encode()))
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((Request(said, given, max_new_tokens=self.max_tokens, sampling=how), future))
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self._work())
        answer = await future
        return Reply(answer.text, answer.finish_reason == "length", answer.prompt_tokens, len(answer.token_ids))

    async def _work(self) -> None:
        await asyncio.sleep(0)  # others that start together join
        while self.waiting:
            batch, self.waiting = self.waiting[: self.MOST], self.waiting[self.MOST :]
            for some in (batch,) if len(batch) == 1 else (batch, *([pair] for pair in batch)):
                todo = [(request, future) for request, future in some if not future.done()]
                if not todo:
                    break
                try:
                    answers = await asyncio.to_thread(self.engine.generate, [request for request, _ in todo])
                except UserError as error:  # of one of them: then each is asked alone
                    if len(todo) == 1:
                        todo[0][1].set_exception(Rejected(str(error)))
                    continue
                except BaseException as error:
                    for _, future in todo:
                        future.set_exception(error)
                    raise
                for (_, future), answer in zip(todo, answers):
                    future.set_result(answer)


Model = Endpoint | Local
