"""A server in a thread, for tests that speak to it over a socket, and what they ask."""

import base64
import http.client
import io
import threading
import time

import openai
import uvicorn
from PIL import Image

from minillava.config import ChatConfig
from minillava.generation.engine import Request
from minillava.generation.serve.app import Access, Server
from minillava.generation.serve.running import Limits, Running
from minillava.media.sources import Sources
from minillava.media.visual import media
from minillava.processor import user_message


class Served:
    """A server in a thread of this process."""

    def __init__(self, engine, limits=None, access=None, sources=None):
        limits = limits or Limits(slots=4, chunk=24, prefix_bytes=1 << 20)
        self.running = Running(engine, limits)
        server = Server(self.running, "tiny", sources or Sources(), access or Access(body_bytes=1 << 20))
        config = uvicorn.Config(server.app(), port=0, log_level="error")
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)
        self.port = self.uvicorn.servers[0].sockets[0].getsockname()[1]

    def client(self, kind=None, key="none"):
        return (kind or openai.OpenAI)(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0)

    def call(self, method="POST", path="/v1/chat/completions", body=b"", **headers):
        """Status and body of a request by hand."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        kinds = {"Content-Type": "application/json"} if method == "POST" else {}
        headers = kinds | {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        status, text = answer.status, answer.read().decode()
        connection.close()
        return status, text

    def until(self, condition):
        for _ in range(500):
            if condition():
                return
            time.sleep(0.02)
        raise AssertionError("it did not happen in 10 s")

    def stop(self):
        self.uvicorn.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive() and not self.running.thread.is_alive()


def servers(engine):
    """As a fixture: what makes the servers of one test, which end with it."""
    made = []

    def make(**options):
        made.append(Served(engine, **options))
        return made[-1]

    yield make
    for server in made:
        server.stop()


def png(seed):
    out = io.BytesIO()
    Image.effect_noise((20, 14), 40 + seed).convert("RGB").resize((20, 14)).save(out, "PNG")
    return out.getvalue()


PICTURES = [png(seed) for seed in range(3)]


def url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def turn(text, pictures=()):
    parts = [{"type": "image_url", "image_url": {"url": url(data)}} for data in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def alone(engine, text, pictures=(), **options):
    given = media(pictures)
    return engine.generate([Request([user_message(ChatConfig(), text, given)], given, **options)])[0]
