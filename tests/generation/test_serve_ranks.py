"""Two processes that share a decoder serve as one does, to the token; neither outlives the other."""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT

from minillava import LLaVA
from minillava.checkpoints.save import save_model
from minillava.generation.engine import Request
from minillava.generation.sampling import Sampling

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from serving import PICTURES, alone, turn  # noqa: E402


@pytest.fixture(scope="module")
def folder(tiny_model, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks") / "tiny"
    save_model(tiny_model, folder, tiny_tokenizer)
    return folder


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serving(folder, port):
    words = ["serve", "--model", str(folder), "--dtype", "float32", "--device", "cpu", "--port", str(port)]
    return [*words, "--slots", "4", "--context", "200", "--chunk", "24", "--name", "tiny"]


def client_of(port, kind=openai.OpenAI):
    return kind(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=30)


def wait_for(port, process):
    for _ in range(900):
        try:
            return client_of(port).models.list()
        except openai.APIConnectionError:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
    raise AssertionError("no server after 90 s")


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ended(pid, seconds=30):
    """Whether a process that is not our child ends."""
    for _ in range(10 * seconds):
        if not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_torchrun_serves_the_tokens_of_one_process_and_sigterm_ends_all(folder):
    engine, port = LLaVA.from_pretrained(folder, "float32", "cpu").engine, free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["minillava", *serving(folder, port)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process, both = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=-1, stderr=-1), []
    try:
        wait_for(port, process)
        both += children(process.pid)
        cases = [(f"what {i}?", PICTURES[: i % 3], 6 + i) for i in range(8)]
        expected = [alone(engine, text, pictures, max_new_tokens=limit).text for text, pictures, limit in cases]

        async def one(client, text, pictures, limit):
            how = dict(model="tiny", messages=turn(text, pictures), max_tokens=limit, temperature=0)
            if limit % 2:
                return (await client.chat.completions.create(**how)).choices[0].message.content
            stream = await client.chat.completions.create(**how, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        async def everyone():
            async with client_of(port, openai.AsyncOpenAI) as client:
                return await asyncio.gather(*[one(client, *case) for case in cases])

        assert asyncio.run(everyone()) == expected
        client = client_of(port)
        for how in ({"seed": 3}, {"seed": 4, "extra_body": {"repetition_penalty": 3.0}}):
            found = client.completions.create(model="tiny", prompt="red", max_tokens=12, temperature=1, **how)
            sampling = Sampling(1.0, seed=how["seed"], **how.get("extra_body", {}))
            (wanted,) = engine.generate([Request(raw="red", max_new_tokens=12, sampling=sampling)])
            assert found.choices[0].text == wanted.text
        left = client.completions.create(model="tiny", prompt="red", max_tokens=190, temperature=1, stream=True)
        next(left)
        left.close()  # its row is cancelled in both
        if subprocess.run([sys.executable, "-c", "import llguidance"], stderr=-1).returncode == 0:
            schema = {"type": "object", "properties": {"red": {"type": "boolean"}}, "required": ["red"],
                      "additionalProperties": False}  # fmt: skip
            wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
            found = client.chat.completions.create(model="tiny", messages=turn("what?"), response_format=wanted)
            assert isinstance(json.loads(found.choices[0].message.content)["red"], bool)

        stream = client.completions.create(
            model="tiny", prompt="The", max_tokens=150, temperature=1, stream=True, seed=1
        )
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("stop", "length")
        process.communicate(timeout=60)
        assert len(both) == 2 and all(map(ended, both))
    finally:
        for pid in (process.pid, *both):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_neither_process_outlives_the_other(folder, victim):
    """Without torchrun, which would end them: SIGKILL of one while a stream runs."""
    port, meeting = free_port(), free_port()
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting), "OMP_NUM_THREADS": "1"}
    ranks = [common | {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    command = [sys.executable, "-m", "minillava", *serving(folder, port)]
    processes = [subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=-1, stderr=-1) for env in ranks]
    try:
        wait_for(port, processes[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = {"prompt": "The", "max_tokens": 190, "temperature": 1, "stream": True, "seed": 1}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert b'"text"' in answer.readline()
        processes[victim].kill()
        with contextlib.suppress(http.client.HTTPException, OSError):
            assert b"[DONE]" not in answer.read()
        _, errors = processes[1 - victim].communicate(timeout=60)
        assert processes[1 - victim].returncode != 0
        said = "the processes cannot go on together" if victim else "the first process has gone"
        assert said in errors and "Traceback" not in errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()
