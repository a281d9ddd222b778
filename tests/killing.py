"""Commands that are killed at random moments, beside a second process that wants the same files, on a disk that fills.

Each is a process of its own, forked from one that has torch: a kill costs a second, not ten.
"""

import contextlib
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["minillava.training.pipeline", "minillava.cli.jobs", "minillava.api", "torch._dynamo"])
LONGEST_S = 120  # that anything may take on a busy machine


def work(words, said):
    """A command in a process of its own; what it writes goes to a file."""
    from tqdm import tqdm

    from minillava.cli import main

    tqdm.set_lock(threading.RLock())  # not one of all processes, which a kill leaves behind
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
    os._exit(main(words))


@contextlib.contextmanager
def small_disk(folder, size="24m"):
    """A disk of its own at a folder; None where this process may mount none."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]
    mounted = sys.platform == "linux" and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk):
    """Until nothing more goes onto it."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(512))


class Killed:
    """A command and what happened to it: `count` has kills, refused second writers and full disks."""

    def __init__(self, words, progress, folder, seed, disk=None):
        self.words, self.progress, self.disk, self.random = [*map(str, words)], progress, disk, random.Random(seed)
        self.folder, self.count, self.number = folder, Counter(), 0

    def start(self):
        """One more process of the command."""
        self.number += 1
        process = FORKS.Process(target=work, args=(self.words, str(self.folder / f"said-{self.number}.txt")))
        process.said = self.folder / f"said-{self.number}.txt"
        process.start()
        return process

    def until(self, holds, process):
        """Wait until something holds or the process has ended."""
        began_s = time.monotonic()
        while process.is_alive() and not holds():
            assert time.monotonic() - began_s < LONGEST_S, process.said.read_text()
            time.sleep(0.002)

    def pair(self):
        """Two at once: the one that comes second is refused, and the first is returned."""
        first, second = self.start(), self.start()
        self.until(lambda: not second.is_alive(), first)
        if not first.is_alive():
            first, second = second, first
        second.join(LONGEST_S)
        if second.exitcode:  # else it had come to the end before the other began
            assert second.exitcode == 2 and "is writing there" in second.said.read_text(), second.said.read_text()
            self.count["second writers"] += 1
        return first

    def once(self):
        """One process, killed at some moment or ended by a full disk; whether it came to its end before."""
        chance, begun = self.random.random, self.progress()
        process = self.pair() if chance() < 0.3 else self.start()
        if chance() < 0.7:
            wanted = begun + self.random.randrange(6)
            self.until(lambda: self.progress() > wanted, process)
            time.sleep(chance() * 0.05)
        else:
            process.join(chance() * 1.5)
        full = self.disk is not None and chance() < 0.4
        if full:
            fill(self.disk)
            process.join(LONGEST_S if chance() < 0.5 else chance() * 0.2)
        if process.is_alive():
            process.kill()
            self.count["kills"] += 1
            self.count["kills on a full disk"] += full
        process.join(LONGEST_S)
        if full:
            (self.disk / "filler").unlink()
            if process.exitcode == 2:
                said = process.said.read_text()
                assert "No space left on device" in said and "Traceback" not in said, said
                self.count["full disks"] += 1
        assert process.exitcode in (0, -9) or (full and process.exitcode == 2), process.said.read_text()
        return process.exitcode == 0

    def to_the_end(self, kills):
        """Kill so often, then let it end; True where it ended before."""
        while self.count["kills"] < kills:
            if self.once():
                return
        process = self.start()
        process.join(LONGEST_S)
        assert process.exitcode == 0, process.said.read_text()
