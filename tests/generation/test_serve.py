"""The server, over real sockets, by a client that is not ours."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from minillava.cli import run_command
from minillava.errors import UserError
from minillava.generation.engine import Engine, Request
from minillava.generation.sampling import Sampling

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from serving import PICTURES, Served, alone, servers, turn  # noqa: E402

from minillava.generation.serve import app as http_side  # noqa: E402
from minillava.generation.serve.app import Access  # noqa: E402
from minillava.generation.serve.running import Failed, Limits, Running  # noqa: E402
from minillava.media.sources import Sources, decode_data_url, public_address  # noqa: E402


@pytest.fixture(scope="module")
def engine(tiny_model, tiny_tokenizer):
    return Engine(tiny_model, tiny_tokenizer)


@pytest.fixture(scope="module")
def served(engine):
    server = Served(engine)
    yield server
    server.stop()


own = pytest.fixture(servers)


def test_sixteen_clients_at_once_get_what_each_gets_alone(served, engine):
    """Text, one picture and two, streamed and not, of all lengths, with four slots."""
    texts = ["what?", "red", "is the circle red? is it green? " * 3, "why?"]
    cases = [(texts[i % 4] + " yes" * (i // 4), PICTURES[: i % 3], 3 + i) for i in range(16)]
    expected = [alone(engine, text, pictures, max_new_tokens=limit) for text, pictures, limit in cases]

    async def one(client, number):
        text, pictures, limit = cases[number]
        how = dict(model="tiny", messages=turn(text, pictures), max_tokens=limit, temperature=0)
        if number % 2:
            found = await client.chat.completions.create(**how)
            return found.choices[0].message.content, found.choices[0].finish_reason, found.usage
        parts, reason, usage = [], None, None
        options = {"include_usage": True}
        async for chunk in await client.chat.completions.create(**how, stream=True, stream_options=options):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                parts.append(choice.delta.content or "")
                reason = choice.finish_reason or reason
        return "".join(parts), reason, usage

    async def everyone():
        async with served.client(openai.AsyncOpenAI) as client:
            return await asyncio.gather(*[one(client, number) for number in range(16)])

    for (text, reason, usage), answer in zip(asyncio.run(everyone()), expected):
        assert (text, reason) == (answer.text, answer.finish_reason)
        assert (usage.prompt_tokens, usage.completion_tokens) == (answer.prompt_tokens, len(answer.token_ids))
        assert usage.prompt_tokens_details.image_tokens == answer.image_tokens


def test_one_picture_in_ten_requests_is_encoded_once(own, engine):
    server, before = own(), engine.pictures_seen
    for i in range(10):
        server.client().chat.completions.create(
            model="tiny", messages=turn(f"what {i}?", PICTURES[:1]), max_tokens=2, temperature=0
        )
    assert engine.pictures_seen == before + 1
    metrics = dict(line.split() for line in server.call("GET", "/metrics")[1].splitlines() if line[0] != "#")
    assert metrics["minillava_pictures_reused_total"] == "9" and metrics["minillava_requests_total"] == "10"
    assert metrics["minillava_pictures_encoded_total"] == str(engine.pictures_seen)


def test_choices_stops_seeds_and_logprobs(served, engine):
    client = served.client()
    how = dict(model="tiny", messages=turn("what color?"), max_tokens=12)
    drawn = client.chat.completions.create(**how, n=3, seed=5, temperature=1, logprobs=True, top_logprobs=2)
    again = client.chat.completions.create(**how, n=3, seed=5, temperature=1)
    texts = [choice.message.content for choice in drawn.choices]
    assert texts == [choice.message.content for choice in again.choices] and len(set(texts)) == 3
    for choice in drawn.choices:
        spelled = b"".join(bytes(t.bytes) for t in choice.logprobs.content).decode(errors="replace")
        assert spelled.strip() == choice.message.content
        assert all(len(t.top_logprobs) == 2 and t.logprob <= t.top_logprobs[0].logprob for t in choice.logprobs.content)
    free = client.chat.completions.create(**how, temperature=0).choices[0].message.content
    cut = client.chat.completions.create(**how, temperature=0, stop=[free[4:6], "never"]).choices[0]
    assert cut.message.content == free[: free.index(free[4:6])].strip() and cut.finish_reason == "stop"


@pytest.mark.parametrize("how", [{"min_p": 0.3}, {"repetition_penalty": 20.0}, {"min_p": 1.0, "repetition_penalty": 2}])
def test_min_p_and_repetition_penalty_are_those_of_python(served, engine, how):
    sampling, plain = Sampling(2.0, seed=7, **how), Sampling(2.0, seed=7)
    common = dict(model="tiny", max_tokens=16, temperature=2, seed=7, extra_body=how)
    said = served.client().chat.completions.create(messages=turn("what?"), **common).choices[0].message.content
    expected = alone(engine, "what?", max_new_tokens=16, sampling=sampling).text
    assert said == expected != alone(engine, "what?", max_new_tokens=16, sampling=plain).text
    text = served.client().completions.create(prompt="red circle", **common).choices[0].text
    assert text == engine.generate([Request(raw="red circle", max_new_tokens=16, sampling=sampling)])[0].text


def test_completions_take_prompts_as_they_are(served, engine):
    ids = [5, 6, 7, 8]
    found = served.client().completions.create(model="tiny", prompt=["red circle", "why"], temperature=0, logprobs=1)
    wanted = [engine.generate([Request(raw=text, max_new_tokens=16)])[0] for text in ("red circle", "why")]
    assert [c.text for c in found.choices] == [a.text for a in wanted]
    assert len(found.choices[0].logprobs.tokens) == len(wanted[0].token_ids)
    found = served.client().completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=5)
    assert found.choices[0].text == engine.generate([Request(prompt_ids=ids, max_new_tokens=5)])[0].text
    assert found.usage.prompt_tokens == 4


def test_an_answer_is_json_of_the_schema(served):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"color": {"enum": ["red", "green"]}, "sure": {"type": "boolean"}},
              "required": ["color", "sure"], "additionalProperties": False}  # fmt: skip
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    for temperature in (0, 1.5):
        found = served.client().chat.completions.create(
            model="tiny", messages=turn("what?", PICTURES[:1]), temperature=temperature, seed=1, response_format=wanted
        )
        value = json.loads(found.choices[0].message.content)
        assert value["color"] in ("red", "green") and isinstance(value["sure"], bool)


def test_attention_of_a_word_comes_over_http(served):
    conversation = [*turn("what?", PICTURES[:1]), {"role": "assistant", "content": "red circle"}]
    status, text = served.call(path="/look", body=json.dumps({"messages": conversation, "word": [0, 3]}).encode())
    (found,) = json.loads(text)["pictures"]
    assert (
        status == 200
        and 0 < sum(found["weights"]) < 1
        and found["maps"][0]["weights"]
        == [
            found["weights"][:2],
            found["weights"][2:],
        ]
    )
    status, text = served.call(path="/look", body=json.dumps({"messages": conversation, "word": [8, 30]}).encode())
    assert status == 400 and "no characters 8 to 30" in json.loads(text)["error"]["message"]


BAD = {
    "is not here": {"model": "other"},
    "list of at least one message": {"messages": []},
    "message 1: role 'robot' is unknown": {"messages": [{"role": "robot", "content": "x"}]},
    "temperature is 9": {"temperature": 9},
    "max_tokens is 0": {"max_tokens": 0},
    "'tools' is not supported": {"tools": [{"type": "function"}]},
    "'temprature' is unknown (did you mean 'temperature'?)": {"temprature": 1},
    "stop has to be": {"stop": [1]},
    "n is 99": {"n": 99},
    "'file:' is not read": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///etc"}]}]
    },
    "picture 1": {"messages": turn("what?", [b"no picture"])},
    "'<image>' in the text, but 0 pictures": {"messages": [{"role": "user", "content": "<image>"}]},
    "fit the context of 200": {"messages": turn("red " * 300)},
    "response_format": {"response_format": {"type": "xml"}},
    "seed is 'x'": {"seed": "x"},
    "min_p is 1.5": {"min_p": 1.5},
    "repetition_penalty is 0;": {"repetition_penalty": 0},
    "repetition_penalty is '2'": {"repetition_penalty": "2"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_requests_are_told_so_in_openais_shape(served, message):
    body = {"model": "tiny", "messages": turn("what?"), **BAD[message]}
    status, text = served.call(body=json.dumps(body).encode())
    error = json.loads(text)["error"]
    assert message in error["message"] and error.keys() == {"message", "type", "param", "code"}
    assert status == (404 if "model" in BAD[message] else 400)
    assert served.running.open == 0


def test_who_may_ask_and_how(own):
    server = own(access=Access("secret", ("127.0.0.1",), body_bytes=10_000))
    assert server.client(key="secret").models.list().data[0].id == "tiny"
    with pytest.raises(openai.AuthenticationError):
        server.client(key="wrong").models.list()
    key = {"Authorization": "Bearer secret"}
    assert server.call("GET", "/health")[0] == 200 and server.call("GET", "/nowhere")[0] == 404
    assert server.call("GET", "/health", Host="evil.example")[0] == 400
    assert server.call(body=b"{}", **key, Content_Type="text/plain")[0] == 415
    assert server.call(body=b"{" * 5000, **key)[0] == 400
    assert server.call(body=b"x" * 10_001, **key)[0] == 413
    assert server.call(body=iter([b"x" * 6000, b"y" * 6000]), **key)[0] == 413, "without a length in front"
    assert server.running.open == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_dropped_client_frees_its_slot(own, engine, monkeypatch, stream):
    """The only one, long before its answer would have ended; the next client gets it."""
    monkeypatch.setattr(engine, "eos_ids", frozenset())
    server = own(limits=Limits(slots=1, chunk=24, prefix_bytes=0))
    running, scheduler = server.running, server.running.scheduler
    step = scheduler.step
    scheduler.step = lambda: (time.sleep(0.05), step())[1]  # 190 tokens take ten seconds
    body = json.dumps({"messages": turn("what?"), "max_tokens": 190, "stream": stream}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        server.until(lambda: scheduler.live)
        (row,) = scheduler.live
    server.until(lambda: row not in scheduler.live and running.open == 0)
    assert row.finish_reason == "cancelled" and len(row.token_ids) < 190
    assert not scheduler.busy and not scheduler.slots.cache.live_B.any()
    metrics = server.call("GET", "/metrics")[1].splitlines()
    for expected in ("requests_cancelled_total 1", "requests_running 0", "requests_open 0", "generated_tokens_total 0"):
        assert f"minillava_{expected}" in metrics
    how = dict(model="tiny", messages=turn("why?"), temperature=0, max_tokens=4)
    found = server.client().chat.completions.create(**how)
    assert found.choices[0].message.content == alone(engine, "why?", max_new_tokens=4).text


def test_a_crowd_is_answered_or_sent_away(own, engine):
    """60 at once, with 4 slots and 20 places to wait: each gets its answer or 429, and all is as before."""
    server = own(limits=Limits(slots=4, waiting=20, chunk=24, prefix_bytes=0))
    expected = alone(engine, "what?", max_new_tokens=20).text

    async def one(client):
        try:
            found = await client.chat.completions.create(
                model="tiny", messages=turn("what?"), max_tokens=20, temperature=0
            )
            return found.choices[0].message.content
        except openai.RateLimitError:
            return None

    async def crowd():
        async with server.client(openai.AsyncOpenAI) as client:
            return await asyncio.gather(*[one(client) for _ in range(60)])

    answers = asyncio.run(crowd())
    assert set(answers) <= {expected, None} and answers.count(expected) >= 24
    assert server.running.open == 0 and not server.running.scheduler.busy


def test_a_failing_model_fails_its_requests_and_goes_on(own, engine):
    server = own()
    step = server.running.scheduler.step

    def fail():
        server.running.scheduler.step = step
        raise RuntimeError("out of memory\nand more")

    server.running.scheduler.step = fail
    with pytest.raises(openai.InternalServerError, match="the model failed: out of memory"):
        server.client().chat.completions.create(model="tiny", messages=turn("what?"))
    found = server.client().chat.completions.create(model="tiny", messages=turn("why?"), temperature=0, max_tokens=8)
    assert found.choices[0].message.content == alone(engine, "why?", max_new_tokens=8).text


def test_a_call_that_fails_or_is_given_up_costs_the_server_nothing(served):
    """Whatever it raises: its own client hears of it. One whose client has gone is not begun."""

    async def calls():
        running, begun, gate = served.running, [], threading.Event()
        waiting = asyncio.create_task(running.call(gate.wait))
        given_up = asyncio.create_task(running.call(lambda: begun.append(1)))
        await asyncio.sleep(0.05)
        given_up.cancel()
        await asyncio.sleep(0.05)
        gate.set()
        await waiting
        for wrong, words in (
            (lambda: {}[7], "7"),
            (lambda: [][0], "out of range"),
            (lambda: next(iter([])), "StopIteration"),
        ):
            with pytest.raises(Failed, match=words):
                await asyncio.wait_for(running.call(wrong), 10)
        return begun

    assert asyncio.run(calls()) == [] and served.running.thread.is_alive()
    status, text = served.call("GET", "/health")
    assert (status, json.loads(text)) == (200, {"status": "ok"})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_comes_while_the_engine_ends_does_not_wait_for_ever(engine):
    """Its thread is still there, but has looked for requests a last time."""
    running, ended, gate = Running(engine, Limits(slots=1)), threading.Event(), threading.Event()

    def fail():
        raise KeyError("a fault")

    async def late():
        row = await asyncio.to_thread(running.scheduler.row, Request(raw="red", max_new_tokens=2))
        with pytest.raises(Failed):
            async for _ in running.answer(row):
                pass
        await asyncio.to_thread(ended.wait, 10)
        for ask in (running.answer(row).__anext__, lambda: running.call(lambda: 1)):
            with pytest.raises(Failed, match="has stopped"):
                await asyncio.wait_for(ask(), 10)

    running.scheduler.step = fail
    running.on_fault = lambda reason: (ended.set(), gate.wait(30))
    try:
        asyncio.run(late())
    finally:
        gate.set()
    running.thread.join(10)


# ---- pictures from elsewhere ----


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "::ffff:192.168.0.1", "fd00::1",
                                     "100.64.0.1", "0.0.0.0", "224.0.0.1", "2002:7f00:1::"])  # fmt: skip
def test_private_addresses_are_never_asked(monkeypatch, address):
    """Whatever the name is, and even if another of its addresses is public."""
    found = [(2, 1, 6, "", (ip, 80)) for ip in ("93.184.216.34", address)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: found)
    with pytest.raises(UserError, match="not public"):
        public_address("example.org", 80, "picture 1")
    with pytest.raises(UserError, match="not public"):
        Sources(hosts=["example.org"]).open("http://example.org/cat.png", False, 1)


def test_what_a_url_cannot_hold_is_sent_as_its_bytes(monkeypatch):
    monkeypatch.setattr("minillava.media.sources._get", lambda scheme, host, port, path, name: path.encode("ascii"))
    found = Sources(hosts=["example.org"]).open("https://example.org/stra\u00dfe/a b%20c.png?x=1&y=%C3%BC", False, 1)
    assert found.read() == b"/stra%C3%9Fe/a%20b%20c.png?x=1&y=%C3%BC"


def test_hosts_files_and_urls_that_are_read(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(PICTURES[0])
    (tmp_path / "out.png").write_bytes(PICTURES[0])
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "out.png")
    sources = Sources(hosts=[".example.org"], folder=tmp_path / "in")
    assert sources.open("a.png", False, 1).read() == tmp_path / "in" / "a.png"
    for bad in ("../out.png", "link.png", str(tmp_path / "out.png"), "", "a.png/../../out.png", "\0"):
        with pytest.raises(UserError, match="no such picture"):
            sources.open(bad, False, 1)
    for bad in (
        "http://example.com/a",
        "http://example.org.evil.com/a",
        "https://x@evil.com/.example.org",
        "ftp://a/b",
    ):
        with pytest.raises(UserError, match=r"not on this server's list|is not read"):
            sources.open(bad, False, 1)
    for bad in ("http://[::1", "http://[zz]/a.png"):
        with pytest.raises(UserError, match="is no URL"):
            sources.open(bad, False, 1)
    with pytest.raises(UserError, match="only from a folder"):
        Sources().open("a.png", False, 1)
    assert decode_data_url("data:,a%20b", "x") == b"a b" and decode_data_url("data:;base64,YQ==", "x") == b"a"
    for bad in ("data:;base64", "data:;base64,%%%"):
        with pytest.raises(UserError, match=r"data: URL|damaged"):
            decode_data_url(bad, "x")


# ---- the command ----


@pytest.mark.parametrize("words,error", [
    (["--slots", "0"], "--slots is 0; use 1 or more"),
    (["--port", "99999"], "--port is 99999; use 65535 or less"),
    (["--pictures", "/nowhere"], "/nowhere: no such folder"),
    (["--device", "tpu"], "device 'tpu' is unknown"),
])  # fmt: skip
def test_what_the_command_refuses(capsys, words, error):
    assert run_command("serve", words) == 2 and error in capsys.readouterr().err


def test_sigterm_finishes_what_runs(tmp_path):
    """The model that ships, as a process: a stream that runs when SIGTERM comes ends as it should, then the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "minillava", "serve", "--port", str(port), "--slots", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        for _ in range(600):
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                assert process.poll() is None
                time.sleep(0.1)
        stream = client.completions.create(
            model="nano", prompt="The", max_tokens=400, temperature=1, stream=True, seed=1
        )
        next(stream)
        process.send_signal(signal.SIGTERM)
        reasons = [chunk.choices[0].finish_reason for chunk in stream]
        assert reasons[-1] in ("stop", "length")
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert not re.search("Traceback|Error", process.stderr.read())
    finally:
        process.kill()
        process.wait()


def test_slow_bodies_time_out(own, monkeypatch):
    monkeypatch.setattr(http_side, "BODY_S", 0.2)
    server = own()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 100\r\n\r\n{")  # fmt: skip
        assert b" 408 " in connection.recv(100)
    server.until(lambda: server.running.open == 0)
