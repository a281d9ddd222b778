"""One scheduler in several processes that share a decoder (`layers.tensor_parallel`).

The first process has the server. Before each step it tells the others which rows came and went since the last; they do
the same to their own schedulers and take the same step, in which all choose the same tokens. Each message also has the
tokens that were chosen last, and a process that chose others ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import count
from typing import Any

import torch.distributed as dist

from minillava.errors import UserError
from minillava.generation.answer import AnswerText
from minillava.generation.engine import Engine
from minillava.generation.memory import Memory
from minillava.generation.request import Row
from minillava.generation.scheduler import Event, Scheduler
from minillava.generation.serve.grammar import Grammars, JsonGrammar
from minillava.generation.slots import Slots

# Messages from memory to memory; how long the others may wait for one.
GLOO: Any = {"backend": "gloo", "timeout": timedelta(days=365)}


class Apart(Exception):
    """The processes are no longer at the same step; none of them can go on."""


class Leader(Scheduler):
    """The scheduler of the first process."""

    def __init__(self, engine: Engine, slots: Slots, chunk: int, memory: Memory | None = None):
        super().__init__(engine, slots, chunk, memory)
        self._others, self._numbers = dist.new_group(**GLOO), count()
        self._news: list[tuple[str, Any]] = []  # since the last step

    def submit(self, row: Row) -> None:
        super().submit(row)
        row.index = next(self._numbers)
        self._news.append(("submit", _packed(row)))

    def cancel(self, row: Row) -> None:
        super().cancel(row)
        self._news.append(("cancel", row.index))

    def step(self) -> list[Event]:
        """Raises Apart where another process has ended, or this one failed in the middle of the step."""
        self._tell(more=True)
        with _together():
            return super().step()

    def end(self) -> None:
        self._tell(more=False)

    def _tell(self, more: bool) -> None:
        news, self._news = self._news, []
        with _together():
            dist.broadcast_object_list([(_chosen(self.live), news, more)], src=0, group=self._others)


def follow(scheduler: Scheduler) -> None:
    """Take the first process's steps in another one, until it says that there are no more.

    Raises UserError where the first one has gone, a step fails, or the tokens are not those of the first.
    """
    rows, group, more = dict[int, Row](), dist.new_group(**GLOO), True
    grammars = Grammars(scheduler.engine.tokenizer, scheduler.engine.eos_ids)
    try:
        while more:
            message: list[Any] = [None]
            dist.broadcast_object_list(message, src=0, group=group)
            chosen, news, more = message[0]
            if chosen != _chosen(scheduler.live):
                raise UserError(
                    f"process {dist.get_rank()} has chosen other tokens than the first; are the GPUs alike?"
                )
            for what, value in news:
                if what == "submit":
                    row = _unpacked(value, scheduler.engine, grammars)
                    rows[row.index] = row
                    scheduler.submit(row)
                elif value in rows:
                    scheduler.cancel(rows.pop(value))
            for row, _ in scheduler.step() if more else ():
                if row.finish_reason:
                    rows.pop(row.index, None)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"process {dist.get_rank()}: the first process has gone, or a step failed: {reason}") from None


@contextlib.contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise Apart(str(error).splitlines()[0]) from error


def _chosen(live: Sequence[Row]) -> list[tuple[int, int, list[int]]]:
    """Of each row how many tokens it has, and the last one."""
    return [(row.index, len(row.token_ids), row.token_ids[-1:]) for row in live]


def _packed(row: Row) -> dict[str, Any]:
    """A row that has not begun, without the tokenizer and the grammar's state."""
    values = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name not in ("text", "grammar")}
    schema = row.grammar.schema if isinstance(row.grammar, JsonGrammar) else None
    return {"row": values, "stops": row.text.stops, "strip": row.text.strip, "schema": schema}


def _unpacked(values: dict[str, Any], engine: Engine, grammars: Grammars) -> Row:
    text = AnswerText(engine.tokenizer, values["stops"], values["strip"])
    grammar = None if values["schema"] is None else grammars.of_schema(values["schema"])
    return Row(text=text, grammar=grammar, **values["row"])
