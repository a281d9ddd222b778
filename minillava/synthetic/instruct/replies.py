"""Replies of a language model -> turns of a conversation, or the reason why not."""

from __future__ import annotations

import re
import zlib
from typing import Any

from minillava.synthetic.instruct.prompts import DESCRIBE, KINDS
from minillava.synthetic.instruct.scenes import Scene, in_picture

MARKER = "<image>"
LINE = re.compile(r"^[\s*#>\-\d.)]*(question|q|answer|a)\s*\d*\s*(?:\*\*)?\s*:\s*(?:\*\*)?\s*(.*)$", re.I)
# Words of one who reads about the picture and does not see it.
LEAKS = re.compile(
    r"\bcaptions?\b|\bbounding[ -]box(?:es)?\b|\bcoordinates?\b|\bannotat\w+"
    r"|\b(?:given|provided|above) (?:descriptions?|sentences?|text|context|information|data|details|list|scene)\b"
    r"|\b(?:descriptions?|sentences|text|context|information) (?:provided|given|above|mentions?|states?|does not)\b"
    r"|\baccording to the (?:descriptions?|sentences?|text|context|information|data)\b",
    re.I,
)
REFUSALS = re.compile(
    r"\bas an? (?:AI|language model)|\bI(?:'m| am) (?:sorry|unable)|\bI (?:cannot|can't) (?:see|view|help)", re.I
)
BOX = re.compile(r"\[\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*\]")
SHORTEST = 80  # characters of a detailed description


class Rejected(Exception):
    """Why a reply cannot be used."""


def conversation_of(kind: str, scene: Scene, text: str, cut: bool) -> list[tuple[str, str]]:
    """Questions with their answers. Raises Rejected with the first reason against the reply."""
    if cut:
        raise Rejected("cut off; raise --max-tokens")
    if not text.strip():
        raise Rejected("empty")
    fewest, most = KINDS[kind].turns
    if most:
        turns = turns_in(text)
        if not fewest <= len(turns) <= most:
            raise Rejected(f"{len(turns)} questions, wanted {fewest} to {most}")
    else:
        turns = [(DESCRIBE[zlib.crc32(scene.id.encode()) % len(DESCRIBE)], text.strip())]
        if LINE.match(turns[0][1]) or len(turns[0][1]) < SHORTEST:
            raise Rejected("no description")
    for question, answer in turns:
        check(f"{question}\n{answer}")
    if len({question for question, _ in turns}) < len(turns):
        raise Rejected("a question comes twice")
    return turns


def turns_in(text: str) -> list[tuple[str, str]]:
    """Questions and answers of a reply, each over one or more lines. Raises Rejected unless they take turns."""
    parts: list[list[str]] = []
    for line in text.strip().split("\n"):
        found = LINE.match(line)
        if found:
            parts.append([found[1][0].lower(), found[2]])
        elif parts:
            parts[-1][1] += "\n" + line
        elif line.strip():
            raise Rejected("text in front of the first question")
    kinds = "".join(kind for kind, _ in parts)
    if kinds != "qa" * (len(parts) // 2) or not parts:
        raise Rejected("questions and answers do not take turns")
    texts = [re.sub(r"\s*\n\s*(?:[-=*_]{3,}\s*)?", "\n", text).strip() for _, text in parts]
    if not all(texts):
        raise Rejected("an empty question or answer")
    return list(zip(texts[::2], texts[1::2]))


def check(text: str) -> None:
    """Raises Rejected for text that nobody would write who sees the picture, and for boxes outside it."""
    if found := LEAKS.search(text):
        raise Rejected(f"mentions what it was given: {found[0]!r}")
    if found := REFUSALS.search(text):
        raise Rejected(f"refuses: {found[0]!r}")
    if MARKER in text:
        raise Rejected(f"has {MARKER} in the text")
    for box in BOX.findall(text):
        try:
            inside = in_picture([float(x) for x in box])
        except ValueError:
            inside = False
        if not inside:
            raise Rejected(f"box [{', '.join(box)}] is not inside the picture")


def sample(identity: str, scene: Scene, turns: list[tuple[str, str]]) -> dict[str, Any]:
    """LLaVA's JSON of a conversation; the picture is in front of the first question or behind it, by the id."""
    said = []
    for question, answer in turns:
        said += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    first = (MARKER, turns[0][0])
    said[0]["value"] = "\n".join(first[::-1] if zlib.crc32(identity.encode()) % 2 else first)
    return {"id": identity, "image": scene.image, "conversations": said}


def choice(text: str) -> int:
    """0 for A, 1 for B. Raises Rejected for anything else."""
    found = re.match(r"\W*(?:answer\W+)?([AB])\b", text.strip(), re.I)
    if found is None:
        raise Rejected(f"the judge chose neither: {text.strip()[:40]!r}")
    return "ab".index(found[1].lower())
