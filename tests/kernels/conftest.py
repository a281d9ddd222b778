"""The C code of every class of CPU that this machine can run; AMX's, where it is not there, by tiles in plain C."""

import os
import shutil
from pathlib import Path

import pytest

from minillava.kernels.cpu import library as cpu

# MINILLAVA_SANITIZE=1 with libasan.so and libubsan.so preloaded: every access and every shift of the C code is checked.
SANITIZED = (
    ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all") if "MINILLAVA_SANITIZE" in os.environ else ()
)
EMULATED = ("-D__AMX_BF16__", "-include", str(Path(__file__).parent / "cpu" / "tiles.h"))


@pytest.fixture(params=cpu.CLASSES)
def c_code(request, monkeypatch):
    """The code of a class, which kernels take for this CPU's own."""
    name, able = request.param, cpu.classes()
    if not shutil.which("gcc"):
        pytest.skip("no gcc here to compile the C code with")
    if name == "amx" and name not in able and "avx512_bf16" in able:
        code = cpu.opened(cpu.built("gcc", "avx512_bf16", (*EMULATED, *SANITIZED)), name)
    elif name in able:
        code = cpu.opened(cpu.built("gcc", name, SANITIZED), name) if SANITIZED else cpu.built_for(name)
    else:
        pytest.skip(f"this CPU is one of {', '.join(able)}")
    assert code is not None
    monkeypatch.setattr(cpu, "library", lambda: code)
    monkeypatch.setattr(cpu, "chosen_class", lambda: name)
    return code
