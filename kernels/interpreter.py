"""Run a Triton kernel on CPU tensors, in a process where kernels are compiled too.

Triton's own switch, TRITON_INTERPRET, has to be set before Triton is imported, and then nothing can be compiled. Here
the interpreter is put in place for the length of one launch. It holds bf16 as bit patterns, cuts off instead of
rounding to it and multiplies the patterns: here casts round to the nearest even and products are of the numbers, as on
a card; other arithmetic in bf16, which no kernel here does, is refused.
"""

import functools
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.language import core  # noqa: F401  (patched with tl: the interpreter looks for both among this file's names)
from triton.runtime import interpreter

cached = functools.cache(interpreter.InterpretedFunction)
Handle, builder = interpreter.TensorHandle, interpreter.interpreter_builder
cast, dot, binary = builder.cast_impl, builder.create_dot, builder.binary_op


def _wide(x: Any) -> Any:
    """bf16 as fp32, anything else as it is."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    return Handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _cast(x: Any, to: Any) -> Any:
    if to.scalar != tl.bfloat16:
        return cast(_wide(x), to)
    numbers = np.ascontiguousarray(_wide(x).data, dtype=np.float32)
    return Handle(torch.from_numpy(numbers).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)


def _binary(a: Any, b: Any, op: Any) -> Any:
    if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
        raise TypeError(f"Triton's interpreter computes {op.__name__} of bf16 wrongly; convert to fp32 first")
    return binary(a, b, op)


def run(kernel: triton.JITFunction, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Interpret `kernel` over `grid`, program by program."""
    patch_language, compiled_call = interpreter._patch_lang, triton.JITFunction.__call__
    scope = patch_language(run)
    scope.set_attr(tl.tensor, "__index__", lambda self: self.handle.data.item())  # Triton 3.6's own breaks in numpy 2.4
    scope.set_attr(builder, "cast_impl", _cast)
    scope.set_attr(builder, "create_dot", lambda a, b, *more: dot(_wide(a), _wide(b), *more))
    scope.set_attr(builder, "binary_op", _binary)
    interpreter._patch_lang = lambda _: interpreter._LangPatchScope()
    # A function called by a kernel, such as tl.cdiv, is interpreted as well.
    triton.JITFunction.__call__ = lambda function, *given, **named: cached(function.fn).rewrite()(*given, **named)
    try:
        cached(kernel.fn)[grid](*args, **constants)
    finally:
        interpreter._patch_lang, triton.JITFunction.__call__ = patch_language, compiled_call
        scope.restore()
