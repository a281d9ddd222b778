"""Serve a LLaVA over HTTP: OpenAI's API at /v1, a page to talk to at /, Prometheus' metrics at /metrics.

Without options: the model that ships, on this machine alone, http://127.0.0.1:8000."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from minillava.cli import ranks
from minillava.cli.model import add_model, add_numbers, check_numbers, find_model
from minillava.cli.values import amount, whole
from minillava.errors import UserError

if TYPE_CHECKING:
    from minillava.generation.engine import Engine
    from minillava.generation.scheduler import Limits

LOOPBACK = {"127.0.0.1": ("127.0.0.1", "localhost"), "localhost": ("127.0.0.1", "localhost")}
GIB, MB = 1 << 30, 1 << 20


def add_arguments(p: argparse.ArgumentParser) -> None:
    """A model, where to listen, what clients may do, and how much memory they get."""
    add = p.add_argument
    add_model(p)
    add("--name", metavar="NAME", help="what clients call the model (default: the last part of --model)")
    add_numbers(p)
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="0.0.0.0: all networks (default: 127.0.0.1)")
    add("--port", type=whole(1, 65535), default=8000, metavar="N", help="default: 8000")
    add("--api-key", metavar="KEY", help="asked of every client (or variable MINILLAVA_API_KEY)")
    fetch = "pictures may be fetched from this host, .example.org: from all below; may be given several times"
    add("--fetch", action="append", default=[], metavar="HOST", help=fetch)
    add("--pictures", metavar="DIR", help="pictures may be named by their path in this folder")
    add("--slots", type=whole(1), default=16, metavar="N", help="requests answered at once (default: 16)")
    add("--waiting", type=whole(), default=240, metavar="N", help="requests that may wait (default: 240)")
    add("--context", type=whole(1), default=4096, metavar="N", help="tokens of a request (default: 4096)")
    add("--chunk", type=whole(1), default=512, metavar="N", help="prompt tokens of a step (default: 512)")
    slots = "keys and values in slots (default: 4)"
    add("--cache-gib", type=amount(zero=False), default=4.0, metavar="G", help=slots)
    add("--prefix-gib", type=amount(), default=1.0, metavar="G", help="of earlier prompts, kept (default: 1)")
    add("--body-mb", type=whole(1), default=32, metavar="N", help="largest body of a request (default: 32)")


def check(args: argparse.Namespace) -> None:
    """Raises UserError for what can be refused before torch is imported."""
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise UserError(f"serving needs {package}; pip install minillava[serve]")
    if ranks.rank() == 0:  # who listens, which is tried before the model is loaded
        check_address(args.host, args.port)
    if args.pictures is not None and not Path(args.pictures).is_dir():
        raise UserError(f"{args.pictures}: no such folder of pictures; check the path")
    check_numbers(args)


def check_address(host: str, port: int) -> None:
    """Raises UserError where nobody can listen: an unknown host, a port that another program has."""
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise UserError(f"cannot listen at {host}, port {port} ({why}); choose another --host or --port") from None


def run(args: argparse.Namespace) -> None:
    """Load the model and serve until SIGTERM or Ctrl-C; what runs then is finished."""
    check(args)
    source = find_model(args)
    import uvicorn

    from minillava.generation.scheduler import Limits
    from minillava.generation.serve.app import Access, Server
    from minillava.generation.serve.running import Running
    from minillava.media.sources import Sources

    model = ranks.load(source, args)
    memory = int(args.cache_gib * GIB), int(args.prefix_gib * GIB)
    limits = Limits(args.slots, args.context, args.waiting, args.chunk, *memory)
    if ranks.rank():
        return _follow(model.engine, limits)
    running = Running(model.engine, limits)
    if ranks.world() > 1:
        running.on_fault = _end
    key = args.api_key or os.environ.get("MINILLAVA_API_KEY", "")
    access = Access(key, LOOPBACK.get(args.host, ()), args.body_mb * MB)
    sources = Sources(args.fetch, Path(args.pictures) if args.pictures else None)
    name, host = args.name or Path(os.path.abspath(args.model)).name, args.host
    slots, fewer = running.scheduler.slots.rows, ""
    if slots < args.slots:
        holds = f"--cache-gib {args.cache_gib * args.slots / slots:.0f} holds all"
        fewer = f" (of {args.slots}; {holds}, or a smaller --context)"
    address = f"http://{f'[{host}]' if ':' in host else host}:{args.port}"
    print(f"{name}: {slots} slots{fewer} of {running.context} tokens; {address}", flush=True)
    app = Server(running, name, sources, access).app()
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning", server_header=False)


def _follow(engine: Engine, limits: Limits) -> None:
    """A process without a server; the first one says when to end, torchrun's SIGTERM does not."""
    from minillava.generation.scheduler import Scheduler
    from minillava.generation.serve.ranks import follow

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    follow(Scheduler.of(engine, limits))


def _end(reason: str) -> None:
    """The first process ends as by SIGTERM: it cannot go on without the others."""
    print(f"error: the processes cannot go on together: {reason}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
