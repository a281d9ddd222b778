"""The HTTP side: routes, who may ask, how much, and what happens to those who leave."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from minillava.errors import UserError
from minillava.generation.answer import Answer
from minillava.generation.request import Row
from minillava.generation.serve.grammar import Grammars
from minillava.generation.serve.metrics import exposition
from minillava.generation.serve.protocol import LOOK, BadRequest, Body, Form, Protocol, error_body, looks_body, usage
from minillava.generation.serve.running import Busy, Failed, Running
from minillava.media.sources import Sources

PAGE = Path(__file__).with_name("page.html")
BODY_S = 60.0  # for a client to send its body
SEND_S = 60.0  # for a client to take one event


@dataclass(frozen=True)
class Access:
    """Who may ask, and how much."""

    key: str = ""  # "": anybody who reaches the port
    hosts: Sequence[str] = ()  # names this server answers to; (): any
    body_bytes: int = 32 << 20


Handler = Callable[["Server", Request], Awaitable[Response]]


def guarded(route: Handler) -> Handler:
    """Errors in OpenAI's shape; nobody without the key."""

    @functools.wraps(route)
    async def checked(self: Server, request: Request) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self.access.key and not hmac.compare_digest(given.encode(), self.access.key.encode()):
            return JSONResponse(error_body("the API key is missing or wrong", 401, code="invalid_api_key"), 401)
        try:
            return await route(self, request)
        except BadRequest as error:
            return JSONResponse(error_body(str(error), error.status, error.param, error.code), error.status)
        except UserError as error:
            return JSONResponse(error_body(" ".join(str(error).split())), 400)
        except Busy as error:
            headers = {"Retry-After": "1"}
            return JSONResponse(error_body(str(error), 429, code="rate_limit_exceeded"), 429, headers)
        except Failed as error:
            return JSONResponse(error_body(f"the model failed: {error}", 500), 500)
        except ClientDisconnect:
            return Response(status_code=499)

    return checked


class Server:
    """One model behind its routes."""

    def __init__(self, running: Running, name: str, sources: Sources, access: Access):
        engine = running.engine
        self.running, self.name, self.access = running, name, access
        grammars = Grammars(engine.tokenizer, engine.eos_ids)
        self.protocol = Protocol(engine.config.chat, engine.tokenizer, grammars, sources, running.context)

    def app(self) -> Starlette:
        """For uvicorn."""
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/look", self.look, methods=["POST"]),
        ]
        hosts = [Middleware(TrustedHostMiddleware, allowed_hosts=list(self.access.hosts))] if self.access.hosts else []
        handlers: Any = {HTTPException: _http_error}
        return Starlette(routes=routes, middleware=hosts, exception_handlers=handlers, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await self.running.stop()

    # ---- routes ----

    async def page(self, request: Request) -> Response:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        headers = {"Content-Security-Policy": policy + "img-src data: blob:", "X-Content-Type-Options": "nosniff"}
        return Response(PAGE.read_bytes(), media_type="text/html", headers=headers)

    async def health(self, request: Request) -> Response:
        alive = self.running.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(exposition(self.running), media_type="text/plain; version=0.0.4")

    @guarded
    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    @guarded
    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    @guarded
    async def chat(self, request: Request) -> Response:
        return await self._answer(request, self.protocol.chat)

    @guarded
    async def completions(self, request: Request) -> Response:
        return await self._answer(request, self.protocol.completions)

    @guarded
    async def look(self, request: Request) -> Response:
        """The attention of a word of an answer to the pictures: `minillava.generation.look`."""
        with self.running.place():
            body = await self._body(request, LOOK)
            self._check_model(body.values.get("model"))
            look = await asyncio.to_thread(self.protocol.look, body)
            return JSONResponse(looks_body(await self.running.call(lambda: look(self.running.engine))))

    # ---- what all of them do ----

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "minillava",
                "max_model_len": self.running.context}  # fmt: skip

    def _check_model(self, name: object) -> None:
        if name not in (None, "", self.name):
            message = f"the model '{name!s:.100}' is not here; this server has '{self.name}'"
            raise BadRequest(message, "model", 404, "model_not_found")

    async def _body(self, request: Request, known: set[str]) -> Body:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page of another site cannot send this one without being asked for leave
            raise BadRequest("the content type has to be application/json", status=415)
        most, found = self.access.body_bytes, bytearray()
        too_large = BadRequest(f"the body is larger than {most >> 20} MB", status=413)
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise too_large
        try:
            async with asyncio.timeout(BODY_S):
                async for piece in request.stream():
                    found += piece
                    if len(found) > most:
                        raise too_large
        except TimeoutError:
            raise BadRequest(f"the body did not come within {BODY_S:.0f} s", status=408) from None
        try:
            values = await asyncio.to_thread(json.loads, found)
        except (ValueError, RecursionError):
            raise BadRequest("the body is not JSON") from None
        return Body(values, known)

    async def _answer(self, request: Request, form: Form) -> Response:
        """Read the body, make rows of it, answer at once or as a stream."""
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(self.running.place())
            body = await self._body(request, form.keys)
            self._check_model(body.values.get("model"))
            requests = await asyncio.to_thread(form.read, body)
            stack.enter_context(self.running.place(len(requests) - 1))
            rows = [await asyncio.to_thread(self.running.scheduler.row, each) for each in requests]
            n = body.values.get("n") or 1
            head = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.name}
            if body.flag("stream"):
                events = self._stream(rows, {**head, "object": form.chunk}, n, body.includes_usage, form)
                return Events(events, stack.pop_all())
            answers = await self._all(request, rows)
            choices = [form.choice(index, form.whole(answer.text), answer) for index, answer in enumerate(answers)]
            return JSONResponse({**head, "object": form.kind, "choices": choices, "usage": usage(rows, answers, n)})

    async def _all(self, request: Request, rows: Sequence[Row]) -> list[Answer]:
        """Every answer. If the client goes, its rows do too."""

        async def last(row: Row) -> Answer:
            async with contextlib.aclosing(self.running.answer(row)) as events:
                async for event in events:
                    if isinstance(event, Answer):
                        return event
            raise Failed("an answer has no end")

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        answers = asyncio.gather(*map(last, rows))
        watch = asyncio.ensure_future(gone())
        try:
            await asyncio.wait((answers, watch), return_when=asyncio.FIRST_COMPLETED)
            if not answers.done():
                raise ClientDisconnect
            return await answers
        finally:
            watch.cancel()
            answers.cancel()
            with contextlib.suppress(asyncio.CancelledError, Failed):
                await answers

    async def _stream(
        self, rows: Sequence[Row], head: dict[str, Any], n: int, includes_usage: bool, form: Form
    ) -> AsyncIterator[str]:
        """Server-sent events. When the client goes, this is cancelled, and the rows with it."""
        merged: asyncio.Queue[tuple[int, str | Answer | Exception]] = asyncio.Queue()

        async def listen(index: int, row: Row) -> None:
            try:
                async with contextlib.aclosing(self.running.answer(row)) as events:
                    async for event in events:
                        merged.put_nowait((index, event))
            except Failed as error:
                merged.put_nowait((index, error))

        tail = {"usage": None} if includes_usage else {}
        tasks = [asyncio.create_task(listen(index, row)) for index, row in enumerate(rows)]
        try:
            for index in range(len(rows)):
                yield _event({**head, "choices": [form.choice(index, form.first)], **tail})
            answers: dict[int, Answer] = {}
            while len(answers) < len(rows):
                index, event = await merged.get()
                if isinstance(event, Exception):
                    yield _event(error_body(f"the model failed: {event}", 500))
                    return
                if isinstance(event, str):
                    choice = form.choice(index, form.piece(event))
                else:
                    answers[index] = event
                    choice = form.choice(index, form.last, event)
                yield _event({**head, "choices": [choice], **tail})
            if includes_usage:
                counts = usage(rows, [answers[index] for index in range(len(rows))], n)
                yield _event({**head, "choices": [], "usage": counts})
            yield "data: [DONE]\n\n"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class Events(StreamingResponse):
    """Server-sent events that give back what they hold, however they end; nobody may take more than SEND_S for one."""

    def __init__(self, events: AsyncIterator[str], holds: contextlib.AsyncExitStack):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.holds = holds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_soon(message: Any) -> None:
            async with asyncio.timeout(SEND_S):
                await send(message)

        async with self.holds:
            with contextlib.suppress(TimeoutError):
                await super().__call__(scope, receive, send_soon)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = error.detail if isinstance(error, HTTPException) else "error"
    return JSONResponse(error_body(f"{request.method} {request.url.path}: {detail}", status), status)
