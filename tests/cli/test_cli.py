"""`minillava COMMAND`: help and mistakes before torch, and what an installed package finds in an empty folder."""

import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from bad.flags import FILES, flags
from helpers import ROOT, disk_of

from minillava import api
from minillava.cli import COMMANDS, ask, main, model, threads
from minillava.training.progress import plot

HEAVY = {"torch", "numpy", "PIL", "transformers", "tokenizers"}


def python(*arguments, cwd=ROOT, path=None, binary=sys.executable):
    """A finished Python process; `path` is its PYTHONPATH."""
    environ = {**os.environ, "PYTHONPATH": str(path or "")}
    return subprocess.run([binary, *map(str, arguments)], cwd=cwd, env=environ, capture_output=True, text=True)


@pytest.mark.parametrize("words", [[name, "--help"] for name in COMMANDS] + [["--help"], ["--version"], []])
def test_help_is_light(words):
    """Neither torch nor numpy: a twentieth of a second, not three."""
    program = (
        f"import sys; from minillava.cli import main\ntry: assert main({words}) == 0\n"
        f"except SystemExit as end: assert end.code == 0\nassert not {HEAVY} & set(sys.modules), sorted(sys.modules)"
    )
    done = python("-c", program)
    assert done.returncode == 0 and "minillava" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["aks"], "no command 'aks' (did you mean 'ask'?)"),
        (["ask", "--modle", "x"], "--modle"),
        (["ask", "--model", "nowhere"], "nowhere: no such folder"),
        (["ask", "--dtype", "float31"], "did you mean 'float32'"),
        (["ask", "--device", "gpu"], "device 'gpu' is unknown"),
        (["ask", "--temperature", "nan"], "--temperature is nan; use 0 or more"),
        (["ask", "--top-p", "0"], "--top-p is 0; use more than 0 and at most 1"),
        (["ask", "--max-new-tokens", "0"], "--max-new-tokens is 0; use 1 or more"),
        (["chat", "--image", "missing.png"], "missing.png: no such image file"),
        (["chat", "--fps", "inf"], "--fps is inf; use 0 or more"),
        (["train", "nanno"], "did you mean 'nano'"),
        (["train", "missing.toml"], "missing.toml: cannot be read"),
        (["train", "--set", "sead=1"], "did you mean 'seed'"),
        (["train", "--set", "device=gpu"], "device 'gpu' is unknown"),
        (["train", "--stage", "claps"], "did you mean 'clip'"),
        (["train", "--set", "stage.clip.task=clop"], "stage 'clip': no task 'clop' (did you mean 'clip'?)"),
        (["train", "--set", "stage.text.shapes.turn=1"], "stage 'text': shapes.turn is unknown (did you mean 'turns'"),
        (
            ["train", "--set", "stage.clip.lr.visin=1"],
            "lr for 'visin', which task 'clip' has not (did you",
        ),
        (["train", "--set", "stage.clip.lora={vision={rank=2}}"], "task 'clip' trains no adapters; leave lora out"),
        (["train", "--set", "model.quantize=nf5"], "quantize 'nf5': type 'nf5' is unknown"),
        (["instruct", "--questions", __file__, "--images", ".", "--model", "nowhere"], "nowhere: no such folder"),
        (["instruct", "--questions", __file__, "--images", "no", "--model", "nano"], "no: no such folder of pictures"),
        (
            ["instruct", __file__, "--model", "m", "--judge", "j"],
            "--judge, --judge-url and --images are for preferences",
        ),
        (["instruct", __file__, "--model", "m", "--images", "."], "give --questions, or leave them out"),
        (
            ["instruct", "--questions", __file__, "--images", ".", "--dry-run"],
            "--dry-run shows requests about captions",
        ),
        (["serve", "--host", "no.such.host.invalid"], "cannot listen at no.such.host.invalid"),
        (["jobs", "missing.jsonl", "out.jsonl"], "missing.jsonl: no such file"),
        (["inspect", "nowhere"], "nowhere: no such folder"),
        (["inspect"], "the following arguments are required"),
    ],
)
def test_mistakes_cost_no_import(words, reason):
    """One line and status 2, before torch."""
    program = (
        "import sys; from minillava.cli import main\n"
        f"status = main({words})\nassert 'torch' not in sys.modules, 'torch'\nsys.exit(status)"
    )
    done = python("-c", program)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and reason in done.stderr


NO_TORCH = """
import contextlib, io, json, sys

class Torch:
    def find_spec(self, name, path=None, target=None):
        assert name != "torch", "torch"

sys.meta_path.insert(0, Torch())
from minillava.cli import main
for name, words in json.load(sys.stdin).items():
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            status = main(words)
    except AssertionError as error:
        status = error
    if status != 2:
        print(name, status)
"""


def test_no_bad_value_of_a_flag_costs_the_import(tmp_path):
    """All of tests/bad/flags.py, in one process that has no torch."""
    for files in FILES.values():
        for path, content in files.items():
            (tmp_path / path).write_text(content if isinstance(content, str) else json.dumps(content))
    cases = {case.name: case.words for case in flags()}
    command = [sys.executable, "-c", NO_TORCH]
    done = subprocess.run(command, cwd=tmp_path, input=json.dumps(cases), capture_output=True, text=True)
    assert len(cases) > 300 and done.returncode == 0 and done.stdout == "", done.stdout + done.stderr


def test_a_video_file_needs_pyav(capsys, monkeypatch):
    monkeypatch.setattr(ask, "find_spec", lambda name: None)
    assert main(["ask", "--video", __file__, "--prompt", "what?"]) == 2
    assert "videos need PyAV" in capsys.readouterr().err


def test_dtypes_are_those_of_the_class():
    assert set(model.DTYPES) == set(api.DTYPES)


def test_a_closed_pipe_is_silent():
    """As in `minillava inspect nano | head -1`, with a pipe that is closed at once."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "minillava", "inspect", "nano"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""


@pytest.mark.parametrize(
    ("command", "streams", "status", "said"),
    [
        ("--help", ">&$closed", 141, ""),
        ("ask --help", ">&$closed", 141, ""),
        ("ask --help", ">/dev/full", 2, "error: the output: No space left on device; make room there"),
        ("--version", ">/dev/full", 2, "error: the output: No space"),
        ("ask --help", ">&-", 0, ""),
        ("inspect nowhere", "2>/dev/full", 2, ""),
        ("inspect nowhere", "2>&-", 2, ""),
        ("inspect nowhere", "2>&$closed", 2, ""),
        ("train $'\\xff'.toml", "", 2, "error: \\udcff.toml: cannot be read"),
        ("ask --prompt $'What \\xff?'", "", 2, "error: byte 0xff behind 'What ' is not UTF-8"),
        ("verify nano --prompt $'\\xe9t\\xe9'", "", 2, "error: byte 0xe9 behind '' is not UTF-8"),
    ],
)
def test_streams_that_are_full_closed_or_no_text(command, streams, status, said):
    reader, writer = os.pipe()
    os.close(reader)
    line = f"{sys.executable} -m minillava {command} {streams.replace('$closed', str(writer))}"
    shell = ["bash", "-c", line]
    done = subprocess.run(shell, cwd=ROOT, pass_fds=(writer,), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    os.close(writer)
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said), done.stderr


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file/out.jsonl", "Not a directory; a file stands where a folder is wanted"),
        ("folder", "Is a directory; a file stands"),
        ("n" * 300, "File name too long; choose a shorter name"),
        ("n" * 300 + "/out.jsonl", "File name too long; choose a shorter name"),
        ("missing/out.jsonl", "No such file or directory; check the path"),
        ("out.jsonl", "File too large; make room there, or choose another place"),
        ("/dev/full", "No space left on device; make room there"),
        ("/proc/out.jsonl", "No such file or directory; check the path"),
    ],
)
def test_where_nothing_can_be_written(tmp_path, capsys, place, said):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So. " * 9999}]
    (tmp_path / "in.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))
    with disk_of(9999):
        assert main(["convert", str(tmp_path / "in.json"), "--out", str(tmp_path / place)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / place}: {said}") and error.count("\n") == 1


def test_inspect(capsys):
    assert main(["inspect", "nano"]) == 0
    assert "loads      yes" in capsys.readouterr().out


def test_no_curves_without_matplotlib(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):  # another test may have imported it
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 'minillava[plots]'" in plot(tmp_path / "log.jsonl", tmp_path / "curves.png")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this tree, built in a copy of it."""
    copy = tmp_path_factory.mktemp("tree")
    copy_tree(copy)
    done = python("-c", "from setuptools.build_meta import build_wheel; print(build_wheel('.'))", cwd=copy)
    assert done.returncode == 0, done.stderr
    return copy / done.stdout.split()[-1]


def copy_tree(folder):
    """What a checkout needs to be installed and to run."""
    for name in ("minillava", "kernels", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "generate.py", "train.py"):
        shutil.copy(ROOT / name, folder / name)


def test_the_wheel_holds_all_that_runs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside, pattern in (
        ("minillava", "minillava", "**/*"), ("kernels", "minillava/kernels", "**/*"),
        ("recipes", "minillava/recipes", "*"),
    ):  # fmt: skip
        files = [path for path in (ROOT / folder).glob(pattern) if path.is_file() and "__pycache__" not in path.parts]
        expected = {f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" for path in files}
        assert expected <= names, expected - names
    assert all(name.startswith(("minillava/", "minillava-")) for name in names), "nothing beside the package"


def test_the_wheel_answers_and_trains_in_an_empty_folder(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    zipfile.ZipFile(wheel).extractall(site)
    work.mkdir()
    done = python("-m", "minillava", "ask", cwd=work, path=site)
    assert done.returncode == 0 and "answer:   yellow\n" in done.stdout, done.stderr
    assert (work / "runs" / "demo.png").is_file()
    small = ["--set", "stage.*.steps=1", "--set", "stage.*.eval_samples=8", "--set", "stage.*.batch_size=8"]
    done = python("-m", "minillava", "train", "nano", *small, "--stage", "clip", "--out", "run", cwd=work, path=site)
    assert done.returncode == 0 and "done in" in done.stdout, done.stderr
    done = python("-c", "import minillava.kernels.frame as f; print(f.__file__)", cwd=work, path=site)
    assert Path(done.stdout.strip()).is_relative_to(site)


def test_a_second_checkout_uses_its_own_kernels(tmp_path):
    """One is installed (editable); another is run from its folder; each reports its own."""
    first, second, venv = tmp_path / "first", tmp_path / "second", tmp_path / "venv"
    for folder in (first, second):
        folder.mkdir()
        copy_tree(folder)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    binary = venv / "bin" / "python"
    site = Path(
        python("-c", "import site; print(site.getsitepackages()[0])", binary=binary, cwd=tmp_path).stdout.strip()
    )
    (site / "outer.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    done = python("-m", "pip", "--python", binary, "install", "--no-deps", "--no-build-isolation", "-e", first)
    assert done.returncode == 0, done.stderr
    show = "import minillava.kernels.cpu.library as l, minillava; print(minillava.__file__, l.__file__, sep='\\n')"
    for cwd, expected in ((tmp_path, first), (second, second), (first, first)):
        done = python("-c", show, binary=binary, cwd=cwd)
        assert all(Path(line).is_relative_to(expected) for line in done.stdout.split()), (done.stdout, done.stderr)
    command = venv / "bin" / "minillava"
    assert subprocess.run([command, "--version"], capture_output=True, text=True).stdout.startswith("minillava ")


POSIX_ONLY = """
import importlib, mmap, os, signal, sys
import torch, numpy, PIL.Image, tokenizers, jinja2, huggingface_hub, tqdm, multiprocessing.spawn, zipfile, tempfile
from pathlib import Path
for name in ("resource", "fcntl", "termios", "pwd", "grp", "tty", "pty", "syslog", "readline", "curses", "triton"):
    sys.modules[name] = None
for owner, names in (
    (signal, "SIGKILL SIGHUP SIGUSR1 SIGUSR2 SIGCHLD SIGALRM SIGQUIT alarm setitimer pthread_sigmask"),
    (os, "fork getuid geteuid getgid sched_getaffinity sched_setaffinity killpg setsid getpgid mkfifo statvfs uname"
         " posix_fadvise posix_fallocate sysconf getloadavg nice"),
    (mmap, " ".join(name for name in dir(mmap) if name.startswith(("MADV_", "MAP_", "PROT_")))),
):
    for name in names.split():
        if hasattr(owner, name):
            delattr(owner, name)
modules = [path for folder in ("minillava", "kernels") for path in Path(folder).rglob("*.py")]
for path in modules:
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    others = ("kernels.tools", "kernels.interpreter", "minillava.evaluation.lmms")  # Triton's, and lmms-eval's
    if path.stem != "__main__" and not name.startswith(others):
        importlib.import_module(name if name.startswith("minillava") else f"minillava.{name}")
from minillava import LLaVA, device
from minillava.synthetic.shapes import demo_scene
image, question, expected = demo_scene()
sys.platform = "win32"
assert device.peak_bytes(torch.device("cpu")) == 0
print(LLaVA.from_pretrained("nano", dtype="bfloat16").generate(question, [image]).text)
"""


def test_it_runs_without_what_only_posix_has():
    """As on Windows and macOS: no `resource`, no SIGKILL, no advice to the memory, no Triton."""
    done = python("-c", POSIX_ONLY)
    assert done.returncode == 0 and done.stdout == "yellow\n", done.stderr


def test_threads_wait_as_the_user_says(tmp_path):
    """Chosen before torch is loaded; a container's quota bounds their number."""
    code = (
        "from minillava.cli import threads; threads.prepare(); import os; print({n: os.environ.get(n) for n in NAMES})"
    )
    code = f"NAMES = {[*threads.WAITS]}; {code}"
    plain = {name: value for name, value in os.environ.items() if name not in threads.WAITS}
    for own in ({}, {"OMP_WAIT_POLICY": "ACTIVE"}):
        run = subprocess.run(
            [sys.executable, "-c", code], env={**plain, **own}, capture_output=True, text=True, check=True
        )
        assert eval(run.stdout) == {**dict.fromkeys(threads.WAITS), **(own or threads.SPINS)}
    assert threads.cpu_quota(tmp_path) is None
    for text, want in (("max 100000", None), ("150000 100000", 2), ("1000 100000", 1)):
        (tmp_path / "cpu.max").write_text(text)
        assert threads.cpu_quota(tmp_path) == want


_FAULTS = """
import resource, sys
from minillava.cli.train import keep_freed_memory
keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(b"x") * (16 << 20) for _ in range(8)]
    del blocks
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is glibc's")
@pytest.mark.parametrize("own", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}])
def test_memory_that_a_step_frees_is_kept_for_the_next(own):
    """Fresh pages cost as much as what is written to them; what the user's environment says stays."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | own
    done = subprocess.run([sys.executable, "-c", _FAULTS], env=environment, capture_output=True, text=True, check=True)
    first, *later = map(int, done.stdout.split())
    assert first > 32 and (max(later) < first / 10) == (not own), (first, later)
