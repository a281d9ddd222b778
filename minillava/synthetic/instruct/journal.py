"""Every reply that was paid for, on disk before anything is done with it: a killed run asks for none of them again."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from minillava.errors import UserError
from minillava.files import named


@dataclass(frozen=True)
class Reply:
    """What a model wrote, and what it counted."""

    text: str
    cut: bool = False  # at the most tokens allowed
    prompt_tokens: int = 0
    new_tokens: int = 0


class Journal:
    """Replies by key, in a file of JSON lines that only grows. A line that a kill cut off is dropped."""

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
        line = json.dumps({"key": key, **asdict(reply)}, ensure_ascii=False) + "\n"
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
