"""A run: scenes or questions in, samples out, each asked for once however often the run is killed.

The folder holds replies.jsonl (what was paid for), settings.json (what was asked with), the samples (instruct.json, or
preferences.json, which recipes train on as they are) and rejects.jsonl (what could not be used, and why).
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillava.chat.messages import Message
from minillava.errors import UserError
from minillava.files import claimed, misfit, named, parse_json, read_text, refused, write_whole
from minillava.schema import read_json
from minillava.synthetic.instruct.models import Model, Reply, Unanswered
from minillava.synthetic.instruct.prompts import judged, messages_for
from minillava.synthetic.instruct.replies import MARKER, Rejected, choice, conversation_of, sample
from minillava.synthetic.instruct.scenes import Scene


class Journal:
    """Every reply that was paid for, by key, in a file of JSON lines that only grows: on disk before anything is done
    with it, so that a killed run asks for none again. A line that a kill cut off is dropped."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.replies: dict[str, Reply] = {}
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line else None
                if row is not None:
                    key = row.pop("key")
                    self.replies[key] = Reply(**row)
            except (ValueError, RecursionError, TypeError, LookupError, AttributeError):
                if number < len(lines):
                    raise UserError(f"{path}: line {number} is no reply in JSON; remove the line") from None
                with path.open("r+b") as file:
                    file.truncate(sum(len(kept) + 1 for kept in lines[:-1]))
                break
        self.file = path.open("ab")

    def add(self, key: str, reply: Reply) -> None:
        """Write a reply; it is on the disk when this returns."""
        line = json.dumps({"key": key, **dataclasses.asdict(reply)}, ensure_ascii=False) + "\n"
        with named(self.path):
            self.file.write(line.encode(errors="backslashreplace"))
            self.file.flush()
            os.fsync(self.file.fileno())
        self.replies[key] = reply

    def tokens(self) -> tuple[int, int]:
        replies = self.replies.values()
        return sum(reply.prompt_tokens for reply in replies), sum(reply.new_tokens for reply in replies)

    def close(self) -> None:
        with named(self.path):
            self.file.close()


@dataclass
class Asker:
    """Takes a reply from the journal, or asks for it and writes it there, while the money lasts."""

    journal: Journal
    prices: tuple[float, float] = (0.0, 0.0)  # of a million prompt tokens and of a million new ones
    most: float = 0.0  # that may be spent; 0: any sum

    @property
    def spent(self) -> float:
        counts = self.journal.tokens()
        return sum(price * count / 1e6 for price, count in zip(self.prices, counts))

    async def __call__(self, model: Model, key: str, messages: Sequence[Message], image: Path | None = None) -> Reply:
        if key not in self.journal.replies:
            if self.most and self.spent >= self.most:
                raise UserError(f"{self.spent:.4g} are spent of {self.most:g}; raise --max-cost to go on")
            reply = await model.reply(key, messages, image)
            self.journal.add(key, reply)
        return self.journal.replies[key]


@dataclass
class Item:
    """One sample to make: `work(ask)` returns it, or raises Rejected."""

    key: str
    work: Callable[[Asker], Awaitable[dict[str, Any]]]


@dataclass
class Outcome:
    """What came of a run."""

    samples: list[dict[str, Any]]
    rejects: list[dict[str, str]]
    unanswered: list[str]
    stopped: UserError | None  # why nothing more was asked


def scene_items(model: Model, scenes: Sequence[Scene], kinds: Sequence[str], tries: int) -> Iterator[Item]:
    """Instruction data of these kinds about each scene; a reply that is no use is asked for again, `tries` in all."""
    for scene, kind in itertools.product(scenes, kinds):

        async def work(ask: Asker, scene: Scene = scene, kind: str = kind) -> dict[str, Any]:
            key = f"{scene.id}/{kind}"
            attempt = 0
            while True:
                reply = await ask(model, f"{key}/{attempt}", messages_for(kind, scene))
                attempt += 1
                try:
                    return sample(key, scene, conversation_of(kind, scene, reply.text, reply.cut))
                except Rejected:
                    if attempt == tries:
                        raise

        yield Item(f"{scene.id}/{kind}", work)


@dataclass(frozen=True)
class Asked:
    """A question about a picture, to which two answers are compared."""

    id: str
    image: str
    question: str  # without a marker


def preference_items(
    model: Model, judge: Model, asked: Sequence[Asked], images: Path, known: dict[str, str]
) -> Iterator[Item]:
    """AI feedback: two answers of `model`, which sees the picture, and what `judge` prefers. It is asked in both
    orders, as judges lean to one place, and reads what is `known` of the picture, by its name, or sees it."""
    for question in asked:

        async def work(ask: Asker, question: Asked = question) -> dict[str, Any]:
            path, facts = images / question.image, known.get(question.image, "")
            messages = [Message("user", question.question)]
            replies = [await ask(model, f"{question.id}/answer/{n}", messages, path) for n in (0, 1)]
            if any(reply.cut for reply in replies):
                raise Rejected("an answer was cut off; raise --max-tokens")
            answers = [reply.text.strip() for reply in replies]
            if not all(answers) or answers[0] == answers[1]:
                raise Rejected("the two answers are the same, or one is empty")
            if any(MARKER in answer for answer in answers):
                raise Rejected(f"has {MARKER} in an answer")
            votes = []
            for order in ((0, 1), (1, 0)):
                text = judged(facts, question.question, [answers[n] for n in order])
                key = f"{question.id}/judge/{order[0]}"
                reply = await ask(judge, key, text, None if facts else path)
                votes.append(order[choice(reply.text)])
            if votes[0] != votes[1]:
                raise Rejected("the judge prefers a place, not an answer")
            best = votes[0]
            row = {"id": question.id, "image": question.image, "prompt": f"{MARKER}\n{question.question}"}
            return row | {"chosen": answers[best], "rejected": answers[1 - best]}

        yield Item(question.id, work)


def read_questions(path: Path) -> list[Asked]:
    """The first question of each sample of LLaVA's JSON that has one picture. Raises UserError for another file."""
    rows, asked = parse_json(read_text(path), path), []
    try:
        for number, row in enumerate(rows):
            if isinstance(row["image"], str):
                text = row["conversations"][0]["value"].replace(MARKER, "").strip()
                asked.append(Asked(str(row.get("id", number)), row["image"], text))
    except (TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{path}: not LLaVA's JSON ({misfit(error)}); give a list of samples") from None
    if not asked:
        raise UserError(f"{path}: no sample with a picture in it; give a list of samples about one picture each")
    return asked


async def collect(items: Sequence[Item], asker: Asker, concurrency: int, note: Callable[[int], None]) -> Outcome:
    """Work on so many items at once; `note(done)` after each. The outcome is in the order of the items.

    Where nothing more will be answered no item is begun, but what was asked is waited for: it is paid.
    """
    found: dict[str, Any] = {}  # by key: a sample, or why there is none
    stopped: list[UserError] = []
    following = iter(items)

    async def worker() -> None:
        for item in following:
            if stopped:
                return
            try:
                found[item.key] = await item.work(asker)
            except (Rejected, Unanswered) as why:
                found[item.key] = type(why)(str(why))  # without where it was raised: its picture stands there
            except OSError as error:
                stopped.append(UserError(refused(error)))
            except UserError as error:
                stopped.append(error)
            note(len(found))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(items))):
            group.create_task(worker())
    ordered = [(item.key, found[item.key]) for item in items if item.key in found]
    return Outcome(
        [sample for _, sample in ordered if isinstance(sample, dict)],
        [{"id": key, "reason": str(why)} for key, why in ordered if isinstance(why, Rejected)],
        [str(why) for _, why in ordered if isinstance(why, Unanswered)],
        next(iter(stopped), None),
    )


def run(
    folder: Path, name: str, items: Sequence[Item], settings: dict[str, Any], concurrency: int,
    prices: tuple[float, float] = (0.0, 0.0), most: float = 0.0, note: Callable[[int], None] = lambda done: None,
) -> Outcome:  # fmt: skip
    """Make all samples and write `name` and rejects.jsonl into the folder; goes on with what is there.

    Raises UserError where the folder has other settings or another process, an id comes twice, or the run has to stop.
    """
    twice = [key for key, number in Counter(item.key for item in items).items() if number > 1]
    if twice:
        raise UserError(f"{twice[0]}: comes twice; ids must differ")
    with claimed(folder):
        keep_settings(folder / "settings.json", settings)
        journal = Journal(folder / "replies.jsonl")
        asker = Asker(journal, prices, most)
        try:
            outcome = asyncio.run(collect(items, asker, concurrency, note))
        finally:
            journal.close()
        write_whole(folder / name, json.dumps(outcome.samples, indent=1, ensure_ascii=False) + "\n")
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in outcome.rejects]
        write_whole(folder / "rejects.jsonl", "".join(lines))
    prompt, new = journal.tokens()
    cost = f", {asker.spent:.4g} spent" if any(prices) else ""
    print(f"{folder / name}: {len(outcome.samples):,} samples; {len(outcome.rejects):,} rejected (rejects.jsonl)")
    print(f"  {len(journal.replies):,} replies: {prompt:,} prompt tokens, {new:,} new ones{cost}")
    for reason, number in Counter(row["reason"] for row in outcome.rejects).most_common(5):
        print(f"  {number:,} x {reason}")
    if outcome.stopped is not None:
        raise outcome.stopped
    if outcome.unanswered:
        first = outcome.unanswered[0]
        raise UserError(f"{len(outcome.unanswered):,} got no answer, the first: {first}; the same command asks again")
    return outcome


def keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write what is asked with, or compare it with what the folder was begun with."""
    if path.is_file():
        before = read_json(path)
        changed = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
        if changed:
            raise UserError(f"{path.parent}: was begun with another {', '.join(changed)}; choose another --out")
        return
    write_whole(path, json.dumps(settings, indent=1) + "\n")


def fingerprint(messages: Sequence[Message]) -> str:
    """Of a prompt, so that a changed one is noticed."""
    return hashlib.sha256(repr([dataclasses.astuple(message) for message in messages]).encode()).hexdigest()[:16]
