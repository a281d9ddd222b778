"""Run a Triton kernel on CPU tensors, in a process where kernels are compiled too.

Triton's own switch, TRITON_INTERPRET, has to be set before Triton is imported, and then nothing can be compiled. Here
the interpreter is put in place for the length of one launch. Good for numerics in fp16 and fp32; its bf16 is wrong (it
multiplies bit patterns), so bf16 is refused.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language import core  # noqa: F401  (patched with tl: the interpreter looks for both among this file's names)
from triton.runtime import interpreter

cached = functools.cache(interpreter.InterpretedFunction)


def _call(function: triton.JITFunction, *args: Any, **kwargs: Any) -> Any:
    return cached(function.fn).rewrite()(*args, **kwargs)


def run(kernel: triton.JITFunction, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Interpret `kernel` over `grid`, program by program."""
    if any(isinstance(t, torch.Tensor) and t.dtype == torch.bfloat16 for t in args):
        raise TypeError(f"{kernel.__name__}: Triton's interpreter computes bf16 wrongly; use fp16 or fp32")
    patch_language, compiled_call = interpreter._patch_lang, triton.JITFunction.__call__
    scope = patch_language(run)
    scope.set_attr(tl.tensor, "__index__", lambda self: self.handle.data.item())  # Triton 3.6's own breaks in numpy 2.4
    interpreter._patch_lang = lambda _: interpreter._LangPatchScope()
    triton.JITFunction.__call__ = _call  # a function called by a kernel, such as tl.cdiv, is interpreted as well
    try:
        cached(kernel.fn)[grid](*args, **constants)
    finally:
        interpreter._patch_lang, triton.JITFunction.__call__ = patch_language, compiled_call
        scope.restore()
