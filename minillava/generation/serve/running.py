"""A model that answers while requests come: one thread runs the scheduler, coroutines wait for their text."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from minillava.errors import UserError
from minillava.generation.answer import Answer
from minillava.generation.engine import Engine
from minillava.generation.request import Row
from minillava.generation.scheduler import Limits, Scheduler
from minillava.generation.serve.ranks import Apart, Leader
from minillava.layers.tensor_parallel import is_shared

T = TypeVar("T")


class Busy(Exception):
    """More requests than the server keeps waiting."""


class Failed(Exception):
    """The model could not be run: no memory, or a fault."""

    @classmethod
    def by(cls, error: Exception) -> Failed:
        return cls((str(error) or repr(error)).splitlines()[0])


@dataclass(eq=False)
class Ticket:
    """An answer that is being made."""

    row: Row
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[str | Answer | Exception] = field(default_factory=asyncio.Queue)

    def tell(self, event: str | Answer | Exception) -> None:
        """From the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Running:
    """Takes requests until `stop`, which lets the ones that it has finish."""

    def __init__(self, engine: Engine, limits: Limits):
        self.engine = engine
        self.scheduler = (Leader if is_shared(engine.model.decoder) else Scheduler).of(engine, limits)
        self.context = self.scheduler.slots.capacity
        self.most, self.open = self.scheduler.slots.rows + limits.waiting, 0
        self.on_fault: Callable[[str], None] = lambda reason: None  # when the thread ends and nobody has asked it to
        self.totals = dict.fromkeys(("requests", "failed", "cancelled", "prompt_tokens", "reused", "new_tokens"), 0)
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}  # by id of the row; the thread's own
        self._stopping = False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    @contextlib.contextmanager
    def place(self, count: int = 1):
        """Room for so many requests, from before their pictures are opened until they are answered. Raises Busy."""
        if self.open + count > self.most:
            raise Busy(f"{self.open} requests are being answered or wait, of at most {self.most}; try again")
        self.open += count
        try:
            yield
        finally:
            self.open -= count

    async def answer(self, row: Row) -> AsyncGenerator[str | Answer, None]:
        """The text piece by piece, then the Answer. Whoever stops listening (`aclose`) cancels the row."""
        ticket, ended = Ticket(row, asyncio.get_running_loop()), False
        try:
            self._put(lambda: self._submit(ticket))
            while not ended:
                event = await ticket.events.get()
                ended = not isinstance(event, str)
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            if not ended:
                self._commands.put(lambda: self._cancel(ticket))

    async def call(self, function: Callable[[], T]) -> T:
        """What the function returns or raises, from the engine's thread, between two steps."""
        done: Future[T] = Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():  # nobody waits for it any more
                return
            try:
                done.set_result(function())
            except Exception as error:  # noqa: BLE001 (whatever it is, requests that run have no part in it)
                done.set_exception(error if isinstance(error, UserError) else Failed.by(error))

        self._put(run)
        return await asyncio.wrap_future(done)

    def _put(self, command: Callable[[], None]) -> None:
        """For the engine's thread. Raises Failed if it may never get to it: it takes what is there once it stops, and
        nothing after that."""
        self._commands.put(command)
        if self._stopping:
            raise Failed("the engine has stopped")

    async def stop(self) -> None:
        """No more requests; returns when those that run are finished."""
        self._commands.put(None)
        await asyncio.to_thread(self.thread.join)

    # ---- the engine's thread ----

    def _run(self) -> None:
        fault = "the engine has stopped"
        try:
            while not (self._stopping and not self.scheduler.busy):
                self._take_commands()
                if self.scheduler.busy:
                    self._step()
            self.scheduler.end()
            fault = ""
        except Apart as error:
            fault = str(error)
        finally:  # also for a fault that nobody foresaw: no client waits for ever
            self._stopping = True
            self._take_commands()
            self._abandon(Failed("the engine has stopped"))
            if fault:
                self.on_fault(fault)

    def _take_commands(self) -> None:
        while True:
            try:
                command = self._commands.get(block=not (self.scheduler.busy or self._stopping))
            except queue.Empty:
                return
            if command is None:
                self._stopping = True
            else:
                command()

    def _step(self) -> None:
        try:
            events = self.scheduler.step()
        except RuntimeError as error:  # out of memory, say: these requests fail, the server goes on
            self._abandon(Failed.by(error))
            return
        for row, piece in events:
            ticket = self._tickets.get(id(row))
            if ticket is None:
                continue
            if piece:
                ticket.tell(piece)
            if row.finish_reason:
                self.totals["prompt_tokens"] += len(row.ids)
                self.totals["reused"] += row.reused
                self.totals["new_tokens"] += len(row.token_ids)
                del self._tickets[id(row)]
                ticket.tell(self.engine.answer(row))

    def _submit(self, ticket: Ticket) -> None:
        self.totals["requests"] += 1
        self._tickets[id(ticket.row)] = ticket
        self.scheduler.submit(ticket.row)

    def _cancel(self, ticket: Ticket) -> None:
        if self._tickets.pop(id(ticket.row), None) is not None:
            self.totals["cancelled"] += 1
            self.scheduler.cancel(ticket.row)

    def _abandon(self, error: Exception) -> None:
        self.scheduler.abandon()
        self.totals["failed"] += len(self._tickets)
        for ticket in self._tickets.values():
            ticket.tell(error)
        self._tickets.clear()
