"""What clients do wrong, all at once and for long: nothing hangs, answers stay, memory goes back. All are slow."""

import asyncio
import base64
import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minillava.generation.engine import Engine

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from serving import PICTURES, alone, png, servers, turn  # noqa: E402

from minillava.generation.serve import app as http_side  # noqa: E402
from minillava.generation.serve.app import Access  # noqa: E402
from minillava.generation.serve.running import Limits  # noqa: E402

pytestmark = pytest.mark.slow
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "


@pytest.fixture
def engine(tiny_model, tiny_tokenizer):
    return Engine(tiny_model, tiny_tokenizer)


own = pytest.fixture(servers)


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def settled(server):
    """As before the first request."""
    running = server.running
    server.until(lambda: running.open == 0 and not running.scheduler.busy and not running._tickets)
    assert not running.scheduler.slots.cache.live_B.any()


def test_two_hundred_at_once_with_sixteen_slots_among_clients_that_do_everything_wrong(own, engine, monkeypatch):
    """Slow and dropped clients, bodies of 50 MB, broken pictures, requests that never fit; the model cannot tell."""
    monkeypatch.setattr(http_side, "BODY_S", 2.0)
    server = own(limits=Limits(slots=16, chunk=64, prefix_bytes=1 << 20), access=Access(body_bytes=32 << 20))
    texts = ["what?", "red", "is the circle red? is it green?", "why?"]
    cases = [(texts[i % 4], PICTURES[: i % 3], 3 + i % 20) for i in range(200)]
    expected = {str(case): alone(engine, *case[:2], max_new_tokens=case[2]).text for case in cases}
    body = json.dumps({"messages": turn("what?"), "max_tokens": 150}).encode()
    broken = turn("what?", [base64.b64decode("AAAA") * 100])
    cut = turn("what?", [PICTURES[0][: len(PICTURES[0]) // 2]])

    def drop(number):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"{HEAD}{len(body)}\r\n\r\n".encode() + body[: None if number % 2 else 20])
            time.sleep(0.05)
        return "dropped"

    def dawdle(_):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(f"{HEAD}{len(body)}\r\n\r\n".encode() + body[:5])
            return connection.recv(100).split()[1].decode()

    def large(_):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(f"{HEAD}{50 << 20}\r\n\r\n".encode())
            with contextlib.suppress(ConnectionError):  # it is refused before it is sent
                connection.sendall(b"x" * (50 << 20))
            return connection.recv(100).split()[1].decode()

    def wrong(messages):
        return str(server.call(body=json.dumps({"messages": messages}).encode())[0])

    async def one(client, text, pictures, limit):
        how = dict(model="tiny", messages=turn(text, pictures), max_tokens=limit, temperature=0)
        return (await client.chat.completions.create(**how)).choices[0].message.content

    async def everyone():
        loop, pool = asyncio.get_running_loop(), concurrent.futures.ThreadPoolExecutor(40)
        faults = [(drop, n) for n in range(12)] + [(dawdle, n) for n in range(6)] + [(large, n) for n in range(3)]
        faults += [(wrong, messages) for messages in (broken, cut, turn("red " * 3000)) for _ in range(4)]
        waiting = [loop.run_in_executor(pool, fault, value) for fault, value in faults]
        async with server.client(openai.AsyncOpenAI) as client:
            answers = await asyncio.gather(*[one(client, *case) for case in cases])
        return answers, await asyncio.gather(*waiting)

    answers, statuses = asyncio.run(everyone())
    assert answers == [expected[str(case)] for case in cases]
    assert statuses == ["dropped"] * 12 + ["408"] * 6 + ["413"] * 3 + ["400"] * 12
    settled(server)


def test_a_client_that_does_not_read_loses_its_answer_and_nobody_else_waits(own, engine, monkeypatch):
    monkeypatch.setattr(http_side, "SEND_S", 1.0)
    monkeypatch.setattr(engine, "eos_ids", frozenset())
    server = own(limits=Limits(slots=17, chunk=64, prefix_bytes=0))
    body = {"messages": turn("what?"), "max_tokens": 190, "n": 16, "temperature": 1, "seed": 1, "stream": True}
    sent = json.dumps(body).encode()
    silent = []
    for _ in range(4):  # more than the sockets between them hold
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(f"{HEAD}{len(sent)}\r\n\r\n".encode() + sent)
        silent.append(connection)
    server.until(lambda: server.running.scheduler.live)
    how = dict(model="tiny", messages=turn("why?"), max_tokens=8, temperature=0)
    assert (
        server.client().chat.completions.create(**how).choices[0].message.content
        == alone(engine, "why?", max_new_tokens=8).text
    )
    settled(server)
    for connection in silent:
        connection.close()


def test_sigterm_under_load_finishes_what_runs_and_what_waits(tmp_path):
    """The model that ships with two slots and eight streams, of which six wait."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "minillava", "serve", "--port", str(port), "--slots", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

    def stream(seed):
        how = dict(model="nano", prompt="The", max_tokens=200, temperature=1, seed=seed)
        return client.completions.create(**how, stream=True)

    try:
        for _ in range(600):
            with contextlib.suppress(openai.APIConnectionError):
                client.models.list()
                break
            assert process.poll() is None
            time.sleep(0.1)
        streams = [stream(seed) for seed in range(8)]
        next(streams[0])
        process.send_signal(signal.SIGTERM)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            reasons = list(pool.map(lambda s: [chunk.choices[0].finish_reason for chunk in s][-1], streams))
        assert set(reasons) <= {"stop", "length"}
        assert process.wait(30) in (0, -signal.SIGTERM) and "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()


def test_memory_is_flat_over_two_thousand_requests(own):
    """New pictures and new words all the time, so that what is kept is always full; some leave, some are wrong."""
    server = own(limits=Limits(slots=8, chunk=64, prefix_bytes=1 << 20, picture_bytes=1 << 16))

    def ask(number):
        words = " ".join(["red", "green", "blue", "circle"][number >> shift & 3] for shift in range(0, 12, 2))
        body = {"messages": turn(words, [png(number)]), "max_tokens": 8, "temperature": 1, "seed": number}
        if number % 50 == 0:
            body["messages"] = turn("red " * 3000)
        return server.call(body=json.dumps(body).encode())[0]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert {*pool.map(ask, range(500))} == {200, 400}  # fills the caches, and what allocators keep
        before = resident()
        assert {*pool.map(ask, range(500, 2500))} == {200, 400}
    settled(server)
    assert resident() - before < 8 << 20
    assert server.running.scheduler.memory.pictures.held_bytes <= 1 << 16
