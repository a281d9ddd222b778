"""Many questions from a file, answered as one batch that is kept full; answers are appended in the order of the rows.

A row is JSON: `prompt` (also `text`, `question`) or `messages`, with `image`, `images`, `video` or `videos` beside, and
`id` (also `question_id`); or a line of OpenAI's batches, with `custom_id` and `body`. What is written depends on
neither time nor neighbours, so a file that a kill has cut short goes on where it ends, to the same bytes.
"""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from minillava.errors import UserError
from minillava.files import named
from minillava.generation.engine import Engine
from minillava.generation.prompts import request_of
from minillava.generation.request import Request, Row
from minillava.generation.scheduler import Limits, Scheduler
from minillava.media.sources import OwnSources

IDS = ("id", "question_id", "custom_id")
PROMPTS = ("messages", "prompt", "text", "question")
LENGTHS = ("max_new_tokens", "max_completion_tokens", "max_tokens")
LENGTH = "the length"  # one of them
SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
AHEAD = 4  # rows for each slot that are prepared, or wait for an earlier one's answer


@dataclass
class Outcome:
    """How many rows were answered, how many had a mistake, and how many an earlier run had done."""

    answered: int = 0
    failed: int = 0
    kept: int = 0


@dataclass
class Job:
    """A row of the file on its way: its prompt is being made, or the engine has it, or it went wrong."""

    given: Any
    making: Future[Row]
    row: Row | None = None
    error: str = ""

    @property
    def settled(self) -> bool:
        return bool(self.error) or (self.row is not None and bool(self.row.finish_reason))


def run(
    engine: Engine, rows: Path, out: Path, how: Request, sources: OwnSources, slots: int, context: int,
    note: Callable[[int], None] = lambda done: None,
) -> Outcome:  # fmt: skip
    """Answers every row of `rows` that `out` does not have yet. `how` says what a row leaves out: length, sampling
    (rows draw with its seed, seed + 1, ...), stops. A prompt with its answer gets `context` tokens at most.

    A row that cannot be answered gets an error in its place. Raises UserError where `out` has answers to other rows.
    """
    outcome = Outcome(kept=resume(rows, out))
    note(outcome.kept)
    scheduler = Scheduler.of(engine, Limits(slots, context, cache_bytes=sys.maxsize))

    def make(number: int, given: Any) -> Row:
        return scheduler.row(asked(engine, given, number, how, sources))

    with ThreadPoolExecutor(1) as pool, named(out), out.open("a", encoding="utf-8", errors="backslashreplace") as file:
        coming = islice(enumerate(lines(rows)), outcome.kept, None)
        jobs: deque[Job] = deque()
        while True:
            for number, line in islice(coming, AHEAD * slots - len(jobs)):
                given = parsed(line)
                jobs.append(Job(given, pool.submit(make, number, given)))
            if not jobs:
                break
            enter(scheduler, jobs, slots)
            if scheduler.busy:
                scheduler.step()
            while jobs and jobs[0].settled:
                job = jobs.popleft()
                file.write(json.dumps(result(engine, job), ensure_ascii=False) + "\n")
                file.flush()
                outcome.failed += bool(job.error)
                outcome.answered += not job.error
                note(1)
        os.fsync(file.fileno())
    return outcome


def enter(scheduler: Scheduler, jobs: deque[Job], slots: int) -> None:
    """Rows whose prompt is made enter, in order; waits for the next one only where there is nothing else to do."""
    for job in jobs:
        if job.row is not None or job.error:
            continue
        if len(scheduler.waiting) >= slots or (scheduler.busy and not job.making.done()):
            return
        try:
            job.row = job.making.result()
            scheduler.submit(job.row)
        except UserError as error:
            job.error = str(error)


def lines(path: Path) -> Iterator[str]:
    """Of a file; empty ones are none. Raises UserError for a file that cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            yield from (line for line in file if line.strip())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def parsed(line: str) -> Any:
    """The JSON of a line, or the text of one that is none."""
    try:
        return json.loads(line.encode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return line


def identity(given: Any) -> Any:
    """What a row is called."""
    return next((given[key] for key in IDS if key in given), None) if isinstance(given, Mapping) else None


def asked(engine: Engine, given: Any, number: int, how: Request, sources: OwnSources) -> Request:
    """The request of a row. Raises UserError for one that is none."""
    if not isinstance(given, Mapping):
        raise UserError("not a JSON object; write one row a line")
    body = given["body"] if isinstance(given.get("body"), Mapping) else given
    if (count := body.get("n")) not in (None, 1) or body.get("stream"):
        raise UserError(f"n is {count!r:.40} or stream is set; a row has one answer")
    prompt = next((body[key] for key in PROMPTS if body.get(key) is not None), None)
    if not isinstance(prompt, str | list) or not prompt:
        raise UserError(f"no question; give {', '.join(PROMPTS)}")
    numbers = {key: body[key] for key in SAMPLED if body.get(key) is not None}
    numbers[LENGTH] = next((body[key] for key in LENGTHS if body.get(key) is not None), how.max_new_tokens)
    stop = body.get("stop") or how.stop
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
        raise UserError(f"stop is {stop!r:.40}; use a text or a list of texts")
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{key} is {value!r:.40}; use a number")
        if key in ("seed", "top_k", LENGTH):
            if value != value // 1:
                raise UserError(f"{key} is {value}; use a whole number")
            numbers[key] = int(value)
    length, sampling = numbers.pop(LENGTH), replace(how.sampling, seed=how.sampling.seed + number)
    how = replace(how, max_new_tokens=length, sampling=replace(sampling, **numbers), stop=tuple(stop))
    images, videos = ([*_several(body, f"{kind}s"), *_several(body, kind)] for kind in ("image", "video"))
    return request_of(engine.config.chat, prompt, images, videos, sources, how)


def _several(body: Mapping[str, Any], key: str) -> list[Any]:
    value = body.get(key)
    return [] if value is None else value if isinstance(value, list) else [value]


def result(engine: Engine, job: Job) -> dict[str, Any]:
    """What is written for a row; OpenAI's shape for a line of its batches."""
    given, name = job.given, identity(job.given)
    batch = isinstance(given, Mapping) and isinstance(given.get("body"), Mapping)
    if job.error or job.row is None:
        error = {"code": "invalid_request_error", "message": job.error} if batch else job.error
        return {"custom_id": name, "response": None, "error": error} if batch else {"id": name, "error": error}
    answer = engine.answer(job.row)
    prompt, new = answer.prompt_tokens, len(answer.token_ids)
    if not batch:
        return {"id": name, "text": answer.text, "finish_reason": answer.finish_reason, "prompt_tokens": prompt,
                "image_tokens": answer.image_tokens, "new_tokens": new}  # fmt: skip
    message = {"role": "assistant", "content": answer.text}
    usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    body = {"object": "chat.completion", "usage": usage,
            "choices": [{"index": 0, "message": message, "finish_reason": answer.finish_reason}]}  # fmt: skip
    return {"custom_id": name, "response": {"status_code": 200, "body": body}, "error": None}


def resume(rows: Path, out: Path) -> int:
    """How many rows `out` has answers to, after a line that a kill cut short is taken off.

    Raises UserError where these are answers to other rows.
    """
    done = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("ab+") as file:
        file.seek(0)
        whole, given = 0, lines(rows)
        for line in file:
            if not line.endswith(b"\n"):
                break
            written = parsed(line.decode("utf-8", "surrogateescape"))
            name = identity(parsed(next(given, "")))
            if not isinstance(written, dict) or identity(written) != name:
                raise UserError(f"{out}: line {done + 1} is no answer to row {done + 1} of {rows}; choose another file")
            done, whole = done + 1, whole + len(line)
        file.truncate(whole)
    return done
