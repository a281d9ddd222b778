"""Files of the commands that neither answer nor train."""

from __future__ import annotations

import json
from collections.abc import Iterator

from bad.contents import NO_JSON, Case, checkpoint
from bad.flags import FILES
from bad.training import DATA


def others() -> Iterator[Case]:
    for kind, content in NO_JSON.items():
        gqa = FILES["gqa"]
        yield Case(
            f"evaluate annotations {kind}",
            ("evaluate", "gqa", "gqa.json", "answers.jsonl"),
            ("gqa.json",),
            gqa | {"gqa.json": content},
        )
        yield Case(
            f"evaluate answers {kind}",
            ("evaluate", "gqa", "gqa.json", "answers.jsonl"),
            ("answers.jsonl",),
            gqa | {"answers.jsonl": content},
        )
        yield Case(f"convert {kind}", ("convert", "vqa.json", "--out", "o.jsonl"), ("vqa.json",), {"vqa.json": content})
        yield Case(f"instruct {kind}", ("instruct", "s.json", "--dry-run"), ("s.json",), {"s.json": content})
        words = ("instruct", "--questions", "q.json", "--images", ".", "--model", "nano")
        yield Case(f"instruct questions {kind}", words, ("q.json",), {"q.json": content})
    for benchmark in (
        "vqav2",
        "okvqa",
        "vizwiz",
        "textvqa",
        "pope",
        "scienceqa",
        "mme",
        "seed",
        "mmbench",
        "chartqa",
        "docvqa",
    ):
        for kind, content in {"another's": {"x": [1]}, "lists": [[1], [2]], "text": "I am no table\n"}.items():
            words = ("evaluate", benchmark, "b.json", "answers.jsonl")
            yield Case(
                f"evaluate {benchmark} {kind}", words, ("b.json|answers.jsonl",), FILES["gqa"] | {"b.json": content}
            )
    for words, named, files in (
        (("evaluate", "gqqa", "gqa.json", "answers.jsonl"), "'gqa'", FILES["gqa"]),
        (("evaluate", "gqa", "gqa.json", "answers.jsonl", "--model", "none"), "--model", FILES["gqa"]),
        (("evaluate", "gqa", "none.json", "answers.jsonl"), "none.json", FILES["gqa"]),
        (("evaluate", "gqa", "gqa.json", "none.jsonl"), "none.jsonl", FILES["gqa"]),
        (("evaluate", "gqa", "gqa.json", "."), r"\.", FILES["gqa"]),
        (("convert", "none.json", "--out", "o.jsonl"), "none.json", {}),
        (("convert", "vqa.json"), "--out", FILES["vqa"]),
        (("convert", "vqa.json", "--out", "."), r"\.", FILES["vqa"]),
        (("convert", "vqa.json", "--out", "vqa.json/o.jsonl"), "vqa.json", FILES["vqa"]),
        (("jobs", "rows.jsonl", "rows.jsonl/o"), "rows.jsonl", FILES["rows"]),
        (("export", "--gguf", "a.txt"), "a.txt", {"a.txt": "x"}),
        (("verify", "nano", "--plot", "none/x.png"), "none", {}),
        (("convert", "--out", "x"), "FILE", {}),
        (("convert", ".", "--out", "o.jsonl"), r"\.", {}),
        (("jobs", "none.jsonl", "out.jsonl"), "none.jsonl", {}),
        (("jobs", "rows.jsonl", "rows.jsonl"), "rows.jsonl", FILES["rows"]),
        (("jobs", "rows.jsonl", "."), r"\.", FILES["rows"]),
        (("jobs", "rows.jsonl"), "OUT.jsonl", FILES["rows"]),
        (("jobs", ".", "out.jsonl"), r"\.", {}),
        (("jobs", "rows.jsonl", "out.jsonl"), "out.jsonl", FILES["rows"] | {"out.jsonl": '{"id": "9", "text": "x"}\n'}),
        (("instruct",), "captions", {}),
        (("instruct", "none.json", "--dry-run"), "none.json", {}),
        (("instruct", "s.json"), "--model", {"s.json": "[]"}),
        (("instruct", "--questions", "q.json", "--model", "nano"), "--images", {"q.json": DATA}),
        (("instruct", "s.jsonl", "--model", "nowhere"), "nowhere", {"s.jsonl": FILES["scenes"]["scenes.jsonl"]}),
        (
            ("instruct", "s.jsonl", "--model", "x", "--url", "nonsense"),
            "nonsense",
            {"s.jsonl": FILES["scenes"]["scenes.jsonl"]},
        ),
        (
            ("instruct", "s.jsonl", "--model", "x", "--url", "http://127.0.0.1:9/v1"),
            "127.0.0.1",
            {"s.jsonl": FILES["scenes"]["scenes.jsonl"]},
        ),
        (
            ("instruct", "s.jsonl", "--model", "nano", "--max-cost", "1"),
            "--price",
            {"s.jsonl": FILES["scenes"]["scenes.jsonl"]},
        ),
        (("export", "--model", "nano"), "--gguf", {}),
        (("verify", "nano", "--plot", "x.xyz"), "x.xyz", {}),
        (("verify",), "DIR", {}),
        (("plan",), "RECIPE", {}),
        (("plan", "nanno"), "nanno", {}),
        (("inspect",), "DIR", {}),
        (("inspect", "nowhere"), "nowhere", {}),
        (("verify", "nano", "--against", "transformers", "--quantize", "nf4"), "--quantize", {}),
        (("plan", "nano", "--quantize", "nf5"), "nf5", {}),
        (("plan", "nano", "--rows", "2"), "--rows", {}),
        (("plan", "m", "--set", "seed=1"), "--set", {"m": checkpoint()}),
        (("ask", "extra"), "extra", {}),
        (("train", "nano", "extra"), "extra", {}),
    ):
        yield Case(f"files {' '.join(words)}", words, (named,), files)
    for kind, text in {
        "captions null": {"id": 1, "image": "a.png", "captions": None},
        "captions a text": {"id": 1, "image": "a.png", "captions": "x"},
        "no image": {"id": 1, "captions": ["x"]},
        "boxes": {"id": 1, "image": "a.png", "captions": ["x"], "instances": [{"bbox": "x"}]},
        "row a list": [1],
        "image a number": {"id": 1, "image": 7, "captions": ["x"]},
    }.items():
        yield Case(
            f"scene {kind}", ("instruct", "s.jsonl", "--dry-run"), ("s.jsonl",), {"s.jsonl": json.dumps(text) + "\n"}
        )
