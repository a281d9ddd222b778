"""Files that are whole or not there, folders for one process, texts that people bring, and what the system refuses."""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from minillava.errors import UserError

ANSWER_S = 10.0  # that the hub may take for an answer
LOCK, PARTIAL, GONE = ".lock", ".partial", ".gone"
LFS = b"version https://git-lfs"
POINTER = "is a pointer of Git LFS, not the file itself; fetch that with 'git lfs pull'"
ROOM, RIGHTS = "make room there, or choose another place", "choose a place that you may use"
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)), ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), RIGHTS),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.EISDIR), "a file stands where a folder is wanted, or a folder "
                    "where a file is; choose another place"),
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "make room there, or check the disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}  # fmt: skip


def refused(error: OSError) -> str:
    """What the system refused, why, and what to do. Without the name of a file it was to write its output."""
    what = error.filename if error.filename is not None else "the output"
    return f"{what}: {error.strerror or error}; {REMEDIES.get(error.errno or 0, 'check the path')}"


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Have an OSError inside say that it is about `path`: a full disk names no file, or one that is only on its way."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # numpy's, which say how many bytes were written
            raise OSError(errno.EIO, str(error), str(path)) from error
        error.filename = str(path)
        raise


def write_whole(path: Path, text: str) -> None:
    """A file that is there whole or not at all. What UTF-8 cannot hold is written as its escape."""
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    with named(path):
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)


def sync(folder: Path) -> None:
    """Have the disk take the names in a folder: a power cut must not leave an older state than was reported."""
    if os.name == "nt":  # where folders cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """A folder that leaves by one rename, so that no kill leaves half of it; what a kill leaves `sweep` takes."""
    gone = path.with_name(f".{path.name}{GONE}")
    if gone.exists():
        shutil.rmtree(gone)
    os.rename(path, gone)
    shutil.rmtree(gone)


def sweep(folder: Path) -> None:
    """Remove what killed processes left in a folder: files and folders half written or half removed."""
    for pattern in (f".*{PARTIAL}", f".*{GONE}"):
        for left in folder.glob(pattern):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what a process leaves that was killed when it began."""
    return all(path.name == LOCK or path.name.endswith(PARTIAL) for path in folder.iterdir())


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Have a folder, which is made where it is not there, to oneself for as long as this lasts, by the file .lock.

    Raises UserError where another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        _lock(file, folder, "another folder with --out")
        yield


@contextlib.contextmanager
def claimed_file(path: Path) -> Iterator[None]:
    """Have a file to oneself, which need not be there, by a lock beside it (not beside a link) that goes at the end.

    Raises UserError where another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    real = path.resolve()
    lock = real.with_name(f".{real.name}{LOCK}")
    while True:
        with lock.open("a+", encoding="utf-8") as file:
            _lock(file, path, "another file")
            if not (lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat())):
                continue  # the one before has removed it since it was opened
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # Windows removes no open file
                    lock.unlink()
            return


def _lock(file: IO[str], place: Path, remedy: str) -> None:
    """Lock an open file, and write into it who has it.

    The lock is the system's own (POSIX record locks, which NFS has too), and ends with the process, however that ends.
    Where there is none (Windows, some network disks) a line says so and nothing is locked.
    """
    try:
        import fcntl

        # Not flock: workers that outlive a killed process would inherit that.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        who = " ".join(file.read(200).split()) or "another process"
        raise UserError(f"{place}: {who} is writing there; wait for its end, stop it, or choose {remedy}") from None
    except (ImportError, OSError) as error:
        print(f"{place}: cannot be locked here ({error}); start no second run in it")
    else:
        who = f"process {os.getpid()} of {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M')},\n"
        with named(place):
            file.truncate(0)
            os.write(file.fileno(), who.encode())  # unbuffered: nothing is left to fail when it is closed


# ---- the hub ----


@contextlib.contextmanager
def answered_soon() -> Iterator[None]:
    """Have every question to the hub inside be answered within ANSWER_S, or raise TimeoutError.

    By itself its client waits without end, or asks again for minutes. What is streamed, the bytes of files, keeps the
    client's own bound of the silence between two pieces, and may take as long as they come.
    """
    from huggingface_hub.utils import get_session

    session = get_session()
    send = session.send

    def send_soon(request: Any, **how: Any) -> Any:
        if how.get("stream"):
            return send(request, **how)
        if hasattr(request, "extensions"):  # httpx; before huggingface_hub 1.0 it is requests
            request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), ANSWER_S)
        else:
            how["timeout"] = ANSWER_S
        try:
            return send(request, **how)
        except Exception as error:
            if re.search("Timeout|Connect", type(error).__name__):  # which the hub's library would try again
                raise TimeoutError(str(error) or "timed out") from error
            raise

    session.send = send_soon  # type: ignore[method-assign]
    try:
        yield
    finally:
        session.send = send  # type: ignore[method-assign]


# ---- read ----


def check_null(text: str, where: object) -> None:
    """Raises UserError for a text with a byte of value 0, which ends a path wherever a system takes one."""
    if "\0" in text:
        raise UserError(f"{where} is {shown(text)}, with a byte of value 0 in it, which no path can have; take it out")


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. Raises UserError."""
    check_null(str(path), "a path")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({(error.strerror or str(error)).lower()}); check the path") from None
    if data.startswith(LFS):
        raise UserError(f"{path}: {POINTER}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8, or fetch it again"
        ) from None


def parse_json(text: str, where: object) -> Any:
    """The value that JSON says. Raises UserError for what is none, or cannot be read by Python."""
    try:
        return json.loads(text)
    except RecursionError:
        why = "brackets in brackets without end"
    except json.JSONDecodeError as error:
        why = f"line {error.lineno}: {error.msg.removesuffix(' enclosed in double quotes')}"
    except ValueError:  # Python's own bound
        why = "a number of thousands of digits"
    raise UserError(f"{where}: cannot be read as JSON ({why}); correct it, or fetch it again")


def read_rows(path: Path) -> list[Any]:
    """The values of a JSON list, or of JSON lines. Raises UserError that names the line."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        return parse_json(text, path)
    lines = enumerate(text.split("\n"), 1)
    return [parse_json(line, f"{path}: row {number}") for number, line in lines if line.strip()]


def refuse_pointer(path: Path) -> None:
    """Raises UserError where Git LFS has left its note of a file, as clones without it do."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise UserError(f"{path}: {POINTER}")


# ---- what they hold, for messages ----


IN_WORDS = {
    int: "a whole number", float: "a number", str: "a text", bool: "true or false", tuple: "a list", list: "a list",
    dict: "a table", bytes: "bytes", type(None): "nothing",
}  # fmt: skip


def in_words(value: Any) -> str:
    """What a value of JSON or TOML is, for a message."""
    return IN_WORDS.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """A value as JSON and TOML write it, shortened, for a message."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return f"{text[:60]}..." if len(text) > 64 else text


def short(text: str) -> str:
    """A name in a message: of one as long as a book the beginning, which is no name but often a picture in base64."""
    return text if len(text) <= 200 else f"{text[:40]}... ({len(text):,} characters)"


def misfit(error: Exception) -> str:
    """In words, what Python raised where a file is of another kind than the code that reads it expects."""
    return f"{error} is missing" if isinstance(error, KeyError) else "a value in it is of another kind"
