"""llama.cpp as a peer, where llama-cpp-python (and gguf, for whole decoders) is installed or on PYTHONPATH.

One product with a Q4_0 weight goes through ggml's C functions, into the layout that llama.cpp itself would choose for
this CPU. A decoder is written as a GGUF file and run by the library: the same weights, a prompt of the same length.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minillava.decoder import Decoder
from minillava.llava import LLaVAModel

F32, Q4_0 = 0, 2  # enum ggml_type
MARKER = "<__media__>"  # where a picture is in a text


def absent(*packages: str) -> str | None:
    """Why llama.cpp is not among the peers; None if it is."""
    missing = [name for name in ("llama_cpp", *packages) if find_spec(name) is None]
    return f"llama.cpp left out: {', '.join(missing)} not installed" if missing else None


class _Parameters(ctypes.Structure):
    _fields_ = (("bytes", c_size_t), ("memory", c_void_p), ("no_alloc", c_bool))


class _Functions:
    """ggml's functions by name; every pointer is a c_void_p."""

    def __init__(self) -> None:
        spec = find_spec("llama_cpp")
        assert spec is not None and spec.origin is not None
        folder = Path(spec.origin).parent / "lib"
        self.libraries = [ctypes.CDLL(str(next(folder.glob(f"*ggml-{part}.*")))) for part in ("base", "cpu")]

    def __call__(self, name: str, *arguments: Any, result: Any = c_void_p) -> Any:
        function = next(f for f in (getattr(lib, f"ggml_{name}", None) for lib in self.libraries) if f)
        function.restype = result
        value = function(*arguments)
        return c_void_p(value) if result is c_void_p else value


def product(weight_NK: Tensor, x_1K: Tensor) -> tuple[Callable[[], Any], Tensor]:
    """A call that multiplies one row by the weight in Q4_0, on as many threads as torch has; and its result, fp32
    [1, N]. (Called so, its AMX code crashes on several rows.)"""
    ggml, (N, K) = _Functions(), weight_NK.shape
    backend = ggml("backend_cpu_init")
    ggml("backend_cpu_set_n_threads", backend, c_int(torch.get_num_threads()), result=None)
    device, registry = ggml("backend_get_device", backend), ggml("backend_cpu_reg")
    find = ggml("backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
    layouts = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(find.value)(device)
    plain = ggml("backend_get_default_buffer_type", backend)
    count = next(i for i in range(99) if not layouts[i])
    for layout in [*(c_void_p(layouts[i]) for i in range(count)), plain]:  # as llama.cpp: the first that will do
        stored, around = (ggml("init", _Parameters(1 << 22, None, True)) for _ in range(2))
        w = ggml("new_tensor_2d", stored, c_int(Q4_0), c_int64(K), c_int64(N))
        x = ggml("new_tensor_2d", around, c_int(F32), c_int64(K), c_int64(1))
        y = ggml("mul_mat", around, w, x)
        ggml("backend_alloc_ctx_tensors_from_buft", stored, layout)
        if ggml("backend_dev_supports_op", device, y, result=c_bool):
            break
    graph = ggml("new_graph", around)
    ggml("build_forward_expand", graph, y, result=None)
    ggml("backend_alloc_ctx_tensors", around, backend)
    size = ggml("nbytes", w, result=c_size_t)
    quantised, dense = ctypes.create_string_buffer(size), weight_NK.float().contiguous()
    data = c_void_p(dense.data_ptr())
    ggml("quantize_chunk", c_int(Q4_0), data, quantised, c_int64(0), c_int64(N), c_int64(K), None, result=c_size_t)
    ggml("backend_tensor_set", w, quantised, c_size_t(0), c_size_t(size), result=None)
    x_dense, result_1N = x_1K.float().contiguous(), torch.empty(1, N)
    given = c_void_p(x_dense.data_ptr())
    ggml("backend_tensor_set", x, given, c_size_t(0), c_size_t(x_dense.nbytes), result=None)

    def call() -> None:
        if ggml("backend_graph_compute", backend, graph, result=c_int):
            raise RuntimeError("ggml did not compute")

    call()
    got = c_void_p(result_1N.data_ptr())
    ggml("backend_tensor_get", y, got, c_size_t(0), c_size_t(result_1N.nbytes), result=None)
    return call, result_1N


def write(decoder: Decoder, path: Path, form: str) -> None:
    """A decoder as GGUF, matrices in "BF16" or another of gguf's types; no vocabulary."""
    from minillava.checkpoints import gguf

    def describe(file: Any) -> None:
        gguf.describe_decoder(file, decoder.config)
        file.add_tokenizer_model("no_vocab")

    parts = list(gguf.decoder_parts(decoder, form))
    gguf.write(path, gguf.architecture(decoder.config), path.stem, 0, describe, parts)


def write_tower(model: LLaVAModel, path: Path) -> None:
    """Tower and projector as GGUF."""
    from minillava.checkpoints import gguf

    describe = functools.partial(gguf.describe_tower, config=model.config)
    gguf.write(path, "clip", path.stem, 1, describe, list(gguf.tower_parts(model)))


@functools.cache
def quiet() -> Any:
    """A log that keeps nothing; llama.cpp calls it as long as the process lives."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda *_: None)


class Model:
    """A GGUF file, run greedily on as many threads as torch has; `mmproj` is the tower beside it."""

    def __init__(self, path: Path, capacity: int, mmproj: Path | None = None, sequences: int = 1):
        import llama_cpp

        self.api: Any = llama_cpp
        llama_cpp.llama_log_set(quiet(), None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max = capacity * sequences, sequences
        options.n_batch = min(capacity, 2048)
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.tower, self.visual_tokens = self._open_tower(mmproj) if mmproj else None, 0

    def _open_tower(self, mmproj: Path) -> Any:
        from llama_cpp import mtmd_cpp as mtmd

        self.mtmd: Any = mtmd
        mtmd.mtmd_log_set(quiet(), None)
        mtmd.mtmd_helper_log_set(quiet(), None)
        options = mtmd.mtmd_context_params_default()
        options.print_timings, options.n_threads = False, torch.get_num_threads()
        if not (tower := mtmd.mtmd_init_from_file(str(mmproj).encode(), self.model, options)):
            raise RuntimeError(f"llama.cpp does not load {mmproj}")
        return tower

    def forget(self) -> None:
        """Empty all sequences."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def read(self, ids: list[int], sequences: list[int] | None = None, at: list[int] | None = None) -> list[int]:
        """Likeliest next token behind some tokens of sequence 0; or behind the last of each of several sequences, whose
        tokens follow each other and stand `at`."""
        if sequences is None:
            tokens = (self.api.llama_token * len(ids))(*ids)
            batch, rows = self.api.llama_batch_get_one(tokens, len(ids)), [-1]
        else:
            assert at is not None
            batch, ends = self.api.llama_batch_init(len(ids), 0, 1), [*sequences[1:], -1]
            batch.n_tokens, rows = len(ids), [i for i, (a, b) in enumerate(zip(sequences, ends)) if a != b]
            for i, (id, sequence, position) in enumerate(zip(ids, sequences, at)):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = id, position, 1
                batch.seq_id[i][0], batch.logits[i] = sequence, i in rows
        if self.api.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp did not decode")
        if sequences is not None:
            self.api.llama_batch_free(batch)
        return [int(self._logits(row).argmax()) for row in rows]

    def _logits(self, row: int) -> np.ndarray:
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, row), (self.vocab_size,))

    def see(self, text: str, picture: np.ndarray, sequence: int = 0, past: int = 0) -> int:
        """Read a text with one MARKER, where the picture [H, W, 3] is; how many positions the sequence then has."""
        mtmd, context = self.mtmd, self.tower
        height, width = picture.shape[:2]
        pixels = (ctypes.c_uint8 * picture.size).from_buffer_copy(picture.tobytes())
        bitmap, chunks = mtmd.mtmd_bitmap_init(width, height, pixels), mtmd.mtmd_input_chunks_init()
        written = mtmd.mtmd_input_text()
        written.text, written.text_len = text.encode(), len(text.encode())
        written.add_special, written.parse_special = past == 0 and text != MARKER, True
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        if mtmd.mtmd_tokenize(context, chunks, ctypes.byref(written), bitmaps, 1):
            raise RuntimeError("llama.cpp did not take the picture")
        end = self.api.llama_pos(past)
        for i in range(count := mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, i)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                self.visual_tokens = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            arguments = (context, self.context, chunk, end, sequence, 2048, i == count - 1, ctypes.byref(end))
            if mtmd.mtmd_helper_eval_chunk_single(*arguments):
                raise RuntimeError("llama.cpp did not decode")
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)
        return end.value

    def answer(self, text: str, picture: np.ndarray, new: int) -> list[int]:
        """Greedy tokens behind a text with one MARKER."""
        self.forget()
        self.see(text, picture)
        ids = [int(self._logits(-1).argmax())]
        while len(ids) < new:
            ids += self.read(ids[-1:])
        return ids

    def crowd(self, requests: list[tuple[list[int], np.ndarray, list[int]]], new: int) -> float:
        """Seconds for requests that come together: tokens, a picture, tokens, and so many new ones of each."""
        self.forget()
        began, ids, ends = time.perf_counter(), list[int](), list[int]()
        for number, (before, picture, behind) in enumerate(requests):
            self.read(before, [number] * len(before), list(range(len(before))))
            end = self.see(MARKER, picture, number, len(before))
            ids += self.read(behind, [number] * len(behind), list(range(end, end + len(behind))))
            ends.append(end + len(behind))
        for step in range(new - 1):
            ids = self.read(ids, list(range(len(ids))), [end + step for end in ends])
        return time.perf_counter() - began

    def ask(self, ids: list[int], _: Any, batch: int, tokens: int) -> dict[str, float]:
        """The prompt's tokens in each of `batch` sequences, of which none is a picture's here, and greedy ones behind
        them; seconds."""
        self.forget()
        began, times, rows = time.perf_counter(), [], list(range(batch))
        new = [self.read(ids, [row] * len(ids), list(range(len(ids))))[0] for row in rows]
        times.append(time.perf_counter())
        for step in range(tokens - 1):
            new = self.read(new, rows, [len(ids) + step] * batch)
            times.append(time.perf_counter())
        return {"vision_s": 0.0, "first_s": times[0] - began, "token_s": median(np.diff(times).tolist())}
