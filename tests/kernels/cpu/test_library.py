"""The compiled code in the user's cache: what is damaged, another's or of another compiler is never loaded."""

import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minillava.kernels.cpu import library as cpu

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc here to compile the C code with")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a C source of one function that compiles in no time, for any CPU."""
    source = tmp_path / "step.c"
    source.write_text("int few_rows(void) { return 42; }\n")
    monkeypatch.setattr(cpu, "SOURCES", [source])
    monkeypatch.setitem(cpu.CLASSES, "any", ())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "minillava"


@pytest.mark.parametrize("name", cpu.CLASSES)
def test_no_name_hides_another(name):
    """For every class, also of other CPUs: a count called as a type is made `sizeof` that type something else."""
    strict = ["-fsyntax-only", "-fopenmp", "-Wall", "-Wshadow", "-Werror"]
    command = ["gcc", *strict, *cpu.flags_of(name), str(cpu.SOURCES[0])]
    done = subprocess.run(command, capture_output=True, text=True)
    if "unrecognized command" in done.stderr:
        pytest.skip("this gcc is older than the class")
    assert done.returncode == 0, done.stderr


def answers(path):
    """What a process that loads a library gets from it; it dies by a signal where the file is cut off."""
    load = f"import ctypes; print(ctypes.CDLL({str(path)!r}).few_rows())"
    return subprocess.run([sys.executable, "-c", load], capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("damage", ["empty", "half", "page", "flipped", "longer", "no checksum", "elsewhere"])
def test_a_damaged_library_is_built_again(cache, damage):
    path = cpu.built("gcc", "any")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    changed = {
        "empty": b"", "half": whole[: len(whole) // 2], "page": whole[:4096], "flipped": bytes(flipped),
        "longer": whole + b"\0", "no checksum": whole[:-32], "elsewhere": b"not a library",
    }  # fmt: skip
    path.write_bytes(changed[damage])
    assert not cpu.is_whole(path)
    assert cpu.built("gcc", "any") == path and cpu.is_whole(path) and answers(path) == "42"


def test_a_whole_library_is_not_built_again(cache):
    path = cpu.built("gcc", "any")
    before = path.stat()
    after = cpu.built("gcc", "any").stat()  # it was read, which some systems note
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns) and before.st_mode & 0o077 == 0
    assert list(cache.iterdir()) == [path]


def test_a_library_that_others_can_write_is_built_again(cache):
    path = cpu.built("gcc", "any")
    path.chmod(0o722)
    assert not cpu.is_whole(path)
    assert cpu.built("gcc", "any").stat().st_mode & 0o022 == 0
    link, target = path, path.with_name("target.so")
    path.rename(target)
    link.symlink_to(target)
    assert not cpu.is_whole(link)


def test_another_users_library_is_not_loaded(cache, monkeypatch, caplog):
    path = cpu.built("gcc", "any")
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    if path.stat().st_uid == 0:  # root is trusted: give the files to somebody else
        os.chown(cache, 4243, -1)
        os.chown(path, 4243, -1)
    assert not cpu.is_whole(path)
    assert cpu.built_for.__wrapped__("any") is None
    assert "XDG_CACHE_HOME" in caplog.text and "\n" not in caplog.messages[0]


def test_an_open_folder_is_closed(cache):
    cache.mkdir(parents=True, mode=0o777)
    cache.chmod(0o777)
    cpu.built("gcc", "any")
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_another_version_of_the_compiler_builds_its_own(cache, tmp_path):
    compiler = tmp_path / "cc"

    def version(number):
        compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo cc {number} && exit\nexec gcc "$@"\n')
        compiler.chmod(0o700)
        return cpu.built(str(compiler), "any")

    first = version(1)
    assert version(2) != first and version(1) == first


def test_what_killed_compilers_left_is_swept(cache, tmp_path):
    """A compiler that is killed with its Python leaves a folder; it goes when no compiler can be at work in it."""
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\nkill -9 $PPID\n')
    compiler.chmod(0o700)
    code = (
        f"import pathlib, minillava.kernels.cpu.library as l; l.CLASSES['any'] = (); l.built({str(compiler)!r}, 'any')"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True)
    (left,) = cache.iterdir()
    cpu.built("gcc", "any")
    assert left.is_dir()  # young: it may be at work
    os.utime(left, (time.time() - 4000,) * 2)
    path = cpu.built("gcc", "any")
    assert list(cache.iterdir()) == [path]


def test_the_library_is_on_the_disk_before_it_has_its_name(cache, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).suffix), replace(a, b)))
    cpu.built("gcc", "any")
    assert order == ["fsync", ".so"]
