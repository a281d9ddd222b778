"""Values of flags that are none, flags and commands that there are not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from bad.contents import Case
from minillava.cli import COMMANDS

COUNTS = ("zwei", "1.5", "", "1e3", "0x10", "-1")
NULL = "a\0b"
AMOUNTS = ("zwei", "", "nan", "inf", "-1", "1,5")
FLAGS = {  # command -> a flag -> bad values
    "ask": {
        "--max-new-tokens": (*COUNTS, "0"),
        "--frames": (*COUNTS, "0"),
        "--top-k": COUNTS,
        "--seed": (*COUNTS[:-1], "9" * 30),
        "--temperature": AMOUNTS,
        "--top-p": (*AMOUNTS, "0", "1.01"),
        "--fps": AMOUNTS,
        "--dtype": ("float31", "", "int8", "FLOAT32", "float64", "complex64"),
        "--device": ("gpu", "", "cuda:x", "cuda:-1", "cpu:7", "tpu", "cuda:99", "meta"),
        "--quantize": ("nf5", "", "nf4:", "nf4:brain", "int9", "nf4:decoder,head=int3", "=", "nf4-doubel"),
        "--model": ("nowhere", "", "a/b/c", "no/where/at/all", "bad id!", NULL),
        "--base": ("nowhere", "", NULL),
        "--image": ("missing.png", "", ".", "file:///x.png", NULL),
        "--video": ("missing.mp4", "", NULL),
        "--out": (NULL,),
    },
    "chat": {"--temperature": ("hot", "-0.1"), "--imgae": ("x.png",), "--seed": ("x",)},
    "serve": {
        "--port": (*COUNTS, "0", "65536", "99999999999"),
        "--slots": (*COUNTS, "0"),
        "--context": (*COUNTS, "0"),
        "--chunk": (*COUNTS, "0"),
        "--waiting": COUNTS,
        "--body-mb": (*COUNTS, "0"),
        "--cache-gib": (*AMOUNTS, "0"),
        "--prefix-gib": AMOUNTS,
        "--pictures": ("nowhere", "", NULL),
        "--dtype": ("int8",),
        "--device": ("gpu",),
        "--quantize": ("nf5",),
        "--model": ("nowhere",),
        "--host": ("no host", "999.1.1.1"),
    },
    "train": {
        "--inspect": (*COUNTS, "0"),
        "--stage": ("pretrian", ""),
        "--set": ("seed", "=1", "", "sead=1", "seed.x=1", ".=1", "stage.x.steps=1"),
        "--out": ("", NULL),
        "--steps": ("3",),
    },
    "plan": {
        "--picture": ("big", "", "10", "1x2x3", "-1x5"),
        "--tokens": COUNTS,
        "--new": (*COUNTS, "0"),
        "--rows": (*COUNTS, "0"),
        "--card": ("A1000", ""),
        "--stage": ("pretrian",),
        "--set": ("seed",),
        "--quantize": ("nf5",),
    },
    "verify": {
        "--tokens": (*COUNTS, "0"),
        "--image": ("missing.png",),
        "--dtype": ("int8",),
        "--device": ("gpu",),
        "--quantize": ("nf5",),
        "--against": ("nowhere", ""),
        "--plot": (NULL,),
    },
    "export": {
        "--type": ("Q5", "", "f16"),
        "--model": ("nowhere",),
        "--base": ("nowhere",),
        "--gguf": (NULL,),
        "--name": (NULL,),
    },
    "instruct": {
        "--out": (NULL,),
        "--kinds": ("chats", "", ","),
        "--limit": COUNTS,
        "--concurrency": (*COUNTS, "0"),
        "--tries": (*COUNTS, "0"),
        "--temperature": AMOUNTS,
        "--max-tokens": (*COUNTS, "0"),
        "--price": ("1", "a,b", "1,2,3", "-1,2", "nan,1"),
        "--max-cost": AMOUNTS,
        "--tokenizer": ("nowhere",),
        "--questions": ("missing.json",),
    },
    "jobs": {
        "--slots": (*COUNTS, "0"),
        "--context": (*COUNTS, "0"),
        "--max-new-tokens": (*COUNTS, "0"),
        "--temperature": AMOUNTS,
        "--top-p": (*AMOUNTS, "0", "1.01"),
        "--seed": (*COUNTS[:-1], "9" * 30),
        "--images": ("nowhere", "", NULL),
        "--dtype": ("int8",),
        "--device": ("gpu",),
        "--model": ("nowhere",),
        "--quantize": ("nf5",),
    },
    "evaluate": {"--max-new-tokens": (*COUNTS, "0"), "--slots": (*COUNTS, "0"), "--questions": ("missing.jsonl", "")},
    "convert": {"--turns": (*COUNTS, "0"), "--seed": COUNTS[:-1], "--out": (NULL,)},
}
BEGIN = {  # what a command needs besides, and its files
    "ask": (("--prompt", "What?"), {}),
    "chat": ((), {}),
    "serve": ((), {}),
    "train": ((), {}),
    "plan": (("nano",), {}),
    "verify": (("nano",), {}),
    "export": (("--gguf", "out"), {}),
    "instruct": (("scenes.jsonl", "--model", "nano", "--dry-run"), "scenes"),
    "jobs": (("rows.jsonl", "out.jsonl"), "rows"),
    "evaluate": (("gqa", "gqa.json", "answers.jsonl"), "gqa"),
    "convert": (("vqa.json", "--out", "out.jsonl"), "vqa"),
    "inspect": (("nano",), {}),
}
FILES: dict[str, dict[str, Any]] = {
    "scenes": {"scenes.jsonl": '{"id": "1", "image": "a.png", "captions": ["A cat."]}\n'},
    "rows": {"rows.jsonl": '{"id": "1", "prompt": "What?"}\n'},
    "gqa": {"gqa.json": {"1": {"answer": "yes"}}, "answers.jsonl": '{"question_id": "1", "text": "yes"}\n'},
    "vqa": {"vqa.json": {"questions": [{"question_id": 1, "image_id": 1, "question": "What?"}]}},
}


def begin(command: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    words, files = BEGIN[command]
    return (command, *words), FILES[files] if isinstance(files, str) else {}


def flags() -> Iterator[Case]:
    for command, table in FLAGS.items():
        words, files = begin(command)
        for flag, values in table.items():
            for value in values:
                named = flag.strip("-").replace("-", "[-_]") + (
                    f"|{re.escape(value.split('=')[0])}" if value.split("=")[0] else ""
                )
                yield Case(f"flag {command} {flag} {value!r:.20}", (*words, f"{flag}={value}"), (named,), files)
    for command in COMMANDS:
        words, files = begin(command)
        yield Case(f"flag {command} unknown", (*words, "--modle-name=x"), ("--modle-name",), files)
    for typed, near in (("serv", "serve"), ("tarin", "train"), ("Serve", "serve"), ("--verison", ""), ("", "")):
        yield Case(f"command {typed!r}", (typed,), (near,))
