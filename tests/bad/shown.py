"""Pictures, videos and prompts."""

from __future__ import annotations

from collections.abc import Iterator

from bad.contents import LFS, PICTURES, Case, picture


def shown() -> Iterator[Case]:
    ask = ("ask", "--prompt", "What?")
    for name, data in PICTURES.items():
        yield Case(f"picture ask {name}", (*ask, "--image", name), (name,), {name: data})
    for name in ("cut.png", "text.jpg", "large.png", "pointer.jpg"):
        yield Case(f"picture verify {name}", ("verify", "nano", "--image", name), (name,), {name: PICTURES[name]})
    yield Case("picture second", (*ask, "--image", "a.png", "--image", "b.png"), ("b.png",), {"a.png": picture()})
    yield Case("picture without a question", ("ask", "--image", "a.png"), ("--prompt",), {"a.png": picture()})
    for name, data in {
        "empty.mp4": b"",
        "text.mp4": b"I am no video",
        "pointer.mp4": LFS.encode(),
        "head.mp4": b"\0\0\0\x18ftypisom\0\0\0\0isom",
        "head.avi": b"RIFF\0\0\0\0AVI LIST",
        "head.mkv": b"\x1aE\xdf\xa3",
    }.items():
        yield Case(f"video {name}", (*ask, "--video", name), (name,), {name: data})
    for name, data in {
        "clip/notes.txt": b"x",
        "clip/1.png": b"no picture",
        "clip/1.jpg": picture("JPEG")[:300],
    }.items():
        yield Case(f"video folder {name}", (*ask, "--video", "clip"), ("clip",), {name: data})
    yield Case(
        "video frames of another size",
        (*ask, "--video", "clip"),
        ("clip",),
        {"clip/1.png": b"", "clip/2.png": picture()},
    )
    for prompt, names in {
        "What? " * 900: ("1024",),
        "<image>": ("<image>",),
        "bad \udcff": ("UTF-8",),
        "<image> and <image>": ("<image>",),
        "": ("prompt",),
    }.items():
        yield Case(f"prompt {prompt!r:.24}", ("ask", "--prompt", prompt), names)
    yield Case(
        "prompt <image> twice for one",
        (*ask[:2], "<image> <image>", "--image", "a.png"),
        ("<image>",),
        {"a.png": picture()},
    )
    yield Case("raw without a prompt", ("ask", "--raw"), ("--raw",))
    yield Case("raw chat", ("ask", "--raw", "--chat", "--prompt", "x"), ("--raw",))


# ---- rows of `minillava jobs`: each has an error in its place, and the others are answered ----

PART = {"type": "image_url", "image_url": {"url": "a.png"}}


def said(content: object, role: object = "user") -> dict[str, object]:
    return {"messages": [{"role": role, "content": content}]}


ASKED: dict[str, object] = {
    "a text": "What?",
    "a list": [1],
    "nothing": None,
    "no prompt": {"id": 1},
    "prompt a number": {"prompt": 7},
    "prompt a table": {"prompt": {"a": 1}},
    "messages a text in a list": {"messages": ["What?"]},
    "messages a number": {"messages": 7},
    "messages empty": {"messages": []},
    "message empty": {"messages": [{}]},
    "role unknown": said("What?", "usr"),
    "role a number": said("What?", 7),
    "content null": said(None),
    "content a number": said(7),
    "content empty": said([]),
    "part a text and a number": said(["What?", 7]),
    "part unknown": said([{"type": "audio"}]),
    "part without text": said([{"type": "text"}]),
    "part without a picture": said([{"type": "image_url"}]),
    "part's URL a number": said([{"type": "image_url", "image_url": {"url": 7}}]),
    "part of a file that is missing": said([{"type": "image_url", "image_url": {"url": "none.png"}}]),
    "part of a damaged file": said([{"type": "image_url", "image_url": {"url": "cut.png"}}]),
    "part of another protocol": said([{"type": "image_url", "image_url": {"url": "ftp://x.org/a.png"}}]),
    "part of a host": said([{"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}]),
    "part of no base64": said([{"type": "image_url", "image_url": {"url": "data:image/png;base64,???"}}]),
    "part of a data: URL without a comma": said([{"type": "image_url", "image_url": {"url": "data:image/png"}}]),
    "part without its file": said([{"type": "image"}, {"type": "text", "text": "What?"}]),
    "an answer's picture": {"messages": [*said("What?")["messages"], *said([PART], "assistant")["messages"]]},
    "an answer last": {"messages": [*said("What?")["messages"], *said("A cat.", "assistant")["messages"]]},
    "two questions": {"messages": said("What?")["messages"] * 2},
    "system last": {"messages": [*said("What?")["messages"], *said("x", "system")["messages"]]},
    "marker without a picture": {"prompt": "<image> What?"},
    "image missing": {"prompt": "What?", "image": "none.png"},
    "image a number": {"prompt": "What?", "image": 7},
    "image a folder": {"prompt": "What?", "image": "."},
    "images of numbers": {"prompt": "What?", "images": [1, 2]},
    "image no picture": {"prompt": "What?", "image": "text.jpg"},
    "video missing": {"prompt": "What?", "video": "none.mp4"},
    "temperature a text": {"prompt": "What?", "temperature": "hot"},
    "temperature below 0": {"prompt": "What?", "temperature": -1},
    "top_p of 2": {"prompt": "What?", "top_p": 2},
    "top_k of -1": {"prompt": "What?", "top_k": -1},
    "min_p of 3": {"prompt": "What?", "min_p": 3},
    "no tokens": {"prompt": "What?", "max_tokens": 0},
    "tokens true": {"prompt": "What?", "max_tokens": True},
    "tokens without end": {"prompt": "What?", "max_tokens": float("inf")},
    "tokens no number": {"prompt": "What?", "max_tokens": float("nan")},
    "half a token": {"prompt": "What?", "max_tokens": 0.5},
    "seed of a half": {"prompt": "What?", "seed": 0.5},
    "seed too large": {"prompt": "What?", "seed": 10**30},
    "top_k of a half": {"prompt": "What?", "top_k": 1.5},
    "temperature no number": {"prompt": "What?", "temperature": float("nan")},
    "penalty of 0": {"prompt": "What?", "repetition_penalty": 0},
    "n of 3": {"prompt": "What?", "n": 3},
    "stop a number": {"prompt": "What?", "stop": 7},
    "stop of numbers": {"prompt": "What?", "stop": [7]},
    "seed a text": {"prompt": "What?", "seed": "x"},
    "too long": {"prompt": "What? " * 900},
    "half a pair": {"prompt": "\ud800"},
    "body a text": {"custom_id": "1", "body": "What?"},
    "body empty": {"custom_id": "1", "body": {}},
}
