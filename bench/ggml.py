"""llama.cpp as a peer, where llama-cpp-python (and gguf, for whole decoders) is installed or on PYTHONPATH.

One product with a Q4_0 weight goes through ggml's C functions, into the layout that llama.cpp itself would choose for
this CPU. A decoder is written as a GGUF file and run by the library: the same weights, a prompt of the same length.
"""

from __future__ import annotations

import ctypes
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

F32, Q4_0 = 0, 2  # enum ggml_type


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


def write(decoder: Decoder, path: Path, kind: str) -> None:
    """A LLaMA as GGUF, matrices in "BF16" or "Q4_0"; no vocabulary. llama.cpp turns neighbouring numbers together in
    its rotary embedding, so the rows of q and k are put in that order."""
    import gguf

    c, form = decoder.config, gguf.GGMLQuantizationType[kind]
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(c.max_positions)
    file.add_embedding_length(c.hidden_size)
    file.add_block_count(c.num_layers)
    file.add_feed_forward_length(c.intermediate_size)
    file.add_head_count(c.num_heads)
    file.add_head_count_kv(c.num_kv_heads)
    file.add_rope_dimension_count(c.head_dim)
    file.add_rope_freq_base(c.rope_theta)
    file.add_layer_norm_rms_eps(c.norm_eps)
    file.add_vocab_size(c.vocab_size)
    file.add_tokenizer_model("no_vocab")

    def add(name: str, p: Tensor) -> None:
        values = p.detach().float()
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            values = values.view(-1, 2, c.head_dim // 2, c.hidden_size).transpose(1, 2).reshape(p.shape)
        if p.ndim == 1:
            file.add_tensor(name, values.numpy())
        else:
            file.add_tensor(name, gguf.quantize(values.numpy(), form), raw_dtype=form)

    add("token_embd.weight", decoder.embed.weight)
    for i, block in enumerate(decoder.blocks):
        attn, mlp = block.attn, block.mlp
        parts = {"attn_norm": block.attn_norm, "attn_q": attn.q, "attn_k": attn.k, "attn_v": attn.v}
        parts |= {"attn_output": attn.out, "ffn_norm": block.mlp_norm}
        parts |= {"ffn_gate": mlp.gate, "ffn_up": mlp.up, "ffn_down": mlp.down}
        for name, module in parts.items():
            add(f"blk.{i}.{name}.weight", module.weight)
    add("output_norm.weight", decoder.norm.weight)
    add("output.weight", decoder.head_weight)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


class Model:
    """A GGUF file, run greedily on as many threads as torch has."""

    def __init__(self, path: Path, capacity: int):
        import llama_cpp

        self.api: Any = llama_cpp
        self.log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.log, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = capacity
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def read(self, ids: list[int]) -> np.ndarray:
        """Go on with some tokens; the logits [V] behind the last."""
        tokens = (self.api.llama_token * len(ids))(*ids)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama.cpp did not decode")
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, -1), (self.vocab_size,))

    def ask(self, ids: list[int], pixels: Tensor, batch: int, tokens: int) -> dict[str, float]:
        """The prompt's tokens, of which none is a picture's here, and greedy ones behind them; seconds."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        began, times = time.perf_counter(), []
        for _ in range(tokens):
            ids = [int(self.read(ids).argmax())]
            times.append(time.perf_counter())
        return {"vision_s": 0.0, "first_s": times[0] - began, "token_s": median(np.diff(times).tolist())}
