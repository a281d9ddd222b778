"""Files that are whole or not there, and folders that one process writes at a time."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from minillava import files
from minillava.errors import UserError

HOLD = """
import os, sys, time
from pathlib import Path
from minillava.files import claimed, claimed_file
with (claimed_file if sys.argv[1].endswith(".jsonl") else claimed)(Path(sys.argv[1])):
    worker = os.fork() if sys.argv[2:] else -1
    if worker:
        print(os.getpid(), worker, flush=True)
    else:
        os.close(1)
    time.sleep(60)
"""


@pytest.fixture
def holder():
    """Starts a process that has a folder to itself; with `worker`, one that has forked another, whose id comes too."""
    started = []

    def start(folder, *worker):
        command = [sys.executable, "-c", HOLD, str(folder), *worker]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1], int(started[-1].stdout.readline().split()[1])

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_folder_is_one_processs_until_that_ends(tmp_path, holder):
    other, _ = holder(tmp_path / "a" / "run")
    words = rf"process {other.pid} of .*, since .*--out"
    with pytest.raises(UserError, match=words) as raised, files.claimed(tmp_path / "a" / "run"):
        pass
    assert "\n" not in str(raised.value)
    other.send_signal(signal.SIGKILL)
    other.wait()
    with files.claimed(tmp_path / "a" / "run"):
        assert files.is_empty(tmp_path / "a" / "run")


def test_a_file_is_one_processs_until_that_ends(tmp_path, holder):
    out = tmp_path / "a" / "out.jsonl"
    other, _ = holder(out)
    (tmp_path / "link.jsonl").symlink_to(out)
    for name in (out, tmp_path / "link.jsonl"):
        with pytest.raises(UserError, match=rf"process {other.pid} of .*another file$"), files.claimed_file(name):
            pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with files.claimed_file(out), files.claimed_file(out.with_name("other.jsonl")):
        assert sorted(path.name for path in out.parent.iterdir()) == [".other.jsonl.lock", ".out.jsonl.lock"]
    assert list(out.parent.iterdir()) == []


def test_a_lock_that_was_removed_since_it_was_opened_is_none(tmp_path, monkeypatch):
    out, locks, lock = tmp_path / "out.jsonl", [], files._lock

    def late(file, *more):
        if not locks:
            (tmp_path / ".out.jsonl.lock").unlink()  # by the one that had it
        locks.append(file)
        lock(file, *more)

    monkeypatch.setattr(files, "_lock", late)
    with files.claimed_file(out):
        assert len(locks) == 2 and (tmp_path / ".out.jsonl.lock").is_file()


def test_a_link_is_the_same_folder_and_another_folder_is_not(tmp_path, holder):
    holder(tmp_path / "run")
    (tmp_path / "link").symlink_to("run")
    with pytest.raises(UserError, match="is writing there"), files.claimed(tmp_path / "link"):
        pass
    with files.claimed(tmp_path / "run" / "inside"):
        pass


def test_a_worker_that_outlives_a_killed_process_holds_nothing(tmp_path, holder):
    other, worker = holder(tmp_path, "worker")
    other.send_signal(signal.SIGKILL)
    other.wait()
    try:
        os.kill(worker, 0)  # it is there
        with files.claimed(tmp_path):
            os.kill(worker, 0)
    finally:
        os.kill(worker, signal.SIGKILL)
    assert (tmp_path / files.LOCK).read_text().startswith(f"process {os.getpid()} of ")  # it was this one's


def test_without_locks_a_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with files.claimed(tmp_path):
        assert "start no second run" in capsys.readouterr().out


def test_a_folder_leaves_by_one_rename(tmp_path, monkeypatch):
    """Killed while it removes: nothing is left under the name, and the rest goes with the next sweep."""
    (tmp_path / "step-1" / "trained").mkdir(parents=True)
    (tmp_path / "step-1" / "trained" / "x").write_text("x")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        files.remove(tmp_path / "step-1")
    assert [path.name for path in tmp_path.iterdir()] == [".step-1.gone"]
    (tmp_path / "step-1").mkdir()
    files.remove(tmp_path / "step-1")  # again, over what was left
    (tmp_path / ".a.partial").write_text("half")
    (tmp_path / ".b.gone").mkdir()
    (tmp_path / "kept").mkdir()
    files.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write_whole(path, "one \ud800")
    assert path.read_text() == "one \\ud800"
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        files.write_whole(path, "two")
    assert path.read_text() == "one \\ud800"
