"""A hub that is not there, answers badly, or falls silent: one line within moments, and the cache is taken."""

import itertools
import json
import os
import socketserver
import subprocess
import sys
import threading
import time

import huggingface_hub.constants
import huggingface_hub.utils
import pytest

from minillava import files
from minillava.checkpoints.hub import _fetched, resolve
from minillava.data.hub import open_hub
from minillava.errors import UserError


def asked(what):
    """A model, or a data set, of the hub."""
    return resolve("some/model") if what == "model" else open_hub("hf://datasets/some/set", stream=False)


def test_hub_ids_offline_say_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        resolve(tmp_path / "nowhere")
    code = (
        "from minillava.checkpoints.hub import UserError, resolve\n"
        "try: resolve('llava-hf/llava-1.5-7b-hf')\n"
        "except UserError as error: print(error)"
    )
    for settings in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        env = os.environ | {"HF_HOME": str(tmp_path)} | settings
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        assert (
            out.startswith("llava-hf/llava-1.5-7b-hf: no such folder") and "hf download" in out and out.count("\n") == 1
        )


@pytest.mark.parametrize(
    ("held", "wanted"),
    [
        ("model.safetensors pytorch_model.bin onnx/model.onnx", "model.safetensors"),
        ("pytorch_model.bin training_args.bin", "pytorch_model.bin training_args.bin"),
        (
            "adapter_model.safetensors non_lora_trainables.bin optimizer.bin",
            "adapter_model.safetensors non_lora_trainables.bin",
        ),
        ("adapter_model.bin non_lora_trainables.bin", "adapter_model.bin non_lora_trainables.bin"),
        ("mm_projector.bin", "mm_projector.bin"),
    ],
)
def test_weights_are_fetched_once_and_whole(tmp_path, held, wanted):
    """In one format, and in either what original LLaVA keeps beside its adapters."""
    names = [*held.split(), "config.json"]

    def fetch(allow_patterns):
        for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    for weights in (False, True):
        found = _fetched(fetch, weights)
        fetched = {path.relative_to(found).as_posix() for path in found.rglob("*.*")}
        assert fetched == {"config.json", *wanted.split() * weights}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (None, "timed out"),
        ("", "disconnected"),
        ("no HTTP\r\n\r\n", "illegal status line"),
        ("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 6\r\n\r\n<html>", "Expecting value"),
        ("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}", "'id'"),
        ("HTTP/1.1 500 Down\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", "500"),
        (
            "HTTP/1.1 302 Found\r\nLocation: /again\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
            "redirects",
        ),
    ],
)
@pytest.mark.parametrize("what", ["model", "data"])
def test_a_hub_that_answers_badly_or_not_at_all(tmp_path, monkeypatch, reply, reason, what):
    """One line within moments, and what is in the cache is taken."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            if reply is None and b"/api/agent" not in self.request.recv(9999):
                ended.wait(30)
            self.request.sendall((nothing if reply is None else reply).encode())

    # Without "close" a client asks again over the connection that this server ends.
    nothing = "HTTP/1.1 404 None\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    ended = threading.Event()
    monkeypatch.setattr(files, "ANSWER_S", 0.3 if reply is None else 10)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        began_s = time.monotonic()
        with pytest.raises(UserError, match=reason) as caught:
            asked(what)
        assert "\n" not in str(caught.value) and time.monotonic() - began_s < 20
        if what == "model":
            cached = tmp_path / "models--some--model"
            (cached / "snapshots" / "abc").mkdir(parents=True)
            (cached / "refs").mkdir()
            (cached / "refs" / "main").write_text("abc")
            (cached / "snapshots" / "abc" / "model.safetensors").write_text("")
            assert resolve("some/model") == cached / "snapshots" / "abc"
        ended.set()
        server.shutdown()


SHA = "0123456789" * 4
BYTES = b'{"a": 1}\n' * 5


def hub_reply(request):
    """What a hub with one file of ours says to a request, whether for a model or a data set."""
    path = request.split(" ")[1]
    header, body = "", BYTES
    if "/tree/" in path:
        body = json.dumps([{"type": "file", "path": "config.json", "size": len(BYTES), "oid": SHA}]).encode()
    elif path.startswith("/api/"):
        body = json.dumps({"id": "some/model", "sha": SHA, "siblings": [{"rfilename": "config.json"}]}).encode()
    else:
        header = f"ETag: {SHA}\r\nX-Repo-Commit: {SHA}\r\n"
    head = f"HTTP/1.1 200 OK\r\nConnection: close\r\n{header}Content-Length: {len(body)}\r\n\r\n"
    return head.encode(), b"" if request.startswith("HEAD") else body


@pytest.mark.parametrize("what", ["model", "data"])
@pytest.mark.parametrize("answers", [1, 2, 3, 99])
def test_a_hub_that_falls_silent(tmp_path, monkeypatch, answers, what):
    """Behind any of its answers: one line within moments. A file may take as long as its bytes come."""
    left, ended = itertools.count(-answers), threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            request = self.request.recv(9999).decode()
            if "/api/agent" in request:
                return
            if next(left) >= 0:
                ended.wait(30)
                return
            head, body = hub_reply(request)
            self.request.sendall(head)
            for piece in range(0, len(body), 9):
                self.request.sendall(body[piece : piece + 9])
                time.sleep(pause_s if body == BYTES else 0)

    bound_s, pause_s = (2, 0.55) if answers == 99 else (0.5, 0)
    monkeypatch.setattr(files, "ANSWER_S", bound_s)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", bound_s)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", there)
        files_there = f"{there}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files_there)
        began_s = time.monotonic()
        if answers == 99:
            assert asked(what)
            assert time.monotonic() - began_s > bound_s
        else:
            with pytest.raises(UserError, match="timed out") as caught:
                asked(what)
            assert "\n" not in str(caught.value) and time.monotonic() - began_s < 20
        ended.set()
        server.shutdown()
