"""The decode step in C: every row as in float32, no further off than the plain step in bf16."""

import copy
import mmap

import pytest
import torch

from minillava.config import DecoderConfig
from minillava.decoder import Decoder
from minillava.kernels.cpu import step as step_cpu
from minillava.layers.cache import KVCache
from minillava.layers.linear import Linear
from minillava.layers.quantize import Linear4bit
from minillava.layers.scheme import Scheme
from minillava.layers.stack import Stack, to_huge_pages

CACHED = [5, 37, 1, 18]  # tokens of each row in the cache

pytestmark = pytest.mark.usefixtures("c_code")


def decoder(heads: int, kv_heads: int, head_dim: int, scheme: Scheme | None, **more) -> Decoder:
    config = DecoderConfig(100, 224, 416, 3, heads, kv_heads, head_dim, **more)
    torch.manual_seed(0)
    made = Decoder(config).requires_grad_(False)
    for p in made.parameters():
        p.normal_(float(p.ndim == 1), 0.1 if p.ndim == 1 else p.shape[-1] ** -0.5)
    made.to(torch.bfloat16)
    return replaced(made, Linear, lambda old: Linear4bit.from_weight(old.weight, old.bias, scheme)) if scheme else made


def replaced(model: Decoder, kind: type, by) -> Decoder:
    """`model` with every layer of a kind replaced."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kind):
                setattr(module, name, by(child))
    return model


def hidden(model: Decoder, rows: int) -> torch.Tensor:
    """What leaves the norm [3, rows, D] in three steps, after prompts of CACHED tokens."""
    dtype = model.embed.weight.dtype
    cache = KVCache(model.config, 4, 64, torch.device("cpu"), dtype)
    made = [torch.randn(n + 3, 224, generator=torch.Generator().manual_seed(n)) for n in CACHED[:rows]]
    made = [x_TD.bfloat16().to(dtype) for x_TD in made]
    with torch.inference_mode():
        for slot, (n, x_TD) in enumerate(zip(CACHED, made)):
            model(x_TD[:n], [0, n], cache, slots=[slot])
        steps = [torch.stack([x_TD[i - 3] for x_TD in made]) for i in range(3)]
        seen = torch.stack([model(x_BD, None, cache) for x_BD in steps])
    assert cache.lengths_B.tolist()[:rows] == [n + 3 for n in CACHED[:rows]]
    return seen.float()


@pytest.mark.parametrize("rows", (1, 2, 3, 4))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "scheme", "more"),
    (
        (4, 2, 32, None, {}),
        (6, 1, 96, None, {"qkv_bias": True, "model_type": "qwen2"}),
        (5, 5, 64, None, {"qk_norm": True, "model_type": "qwen3"}),
        (4, 4, 64, Scheme("nf4", False, 32), {"qkv_bias": True, "model_type": "qwen2"}),
        (8, 1, 128, Scheme("fp4", True, 32), {}),
        (4, 2, 32, Scheme(), {}),  # blocks of 64 in rows of 224
    ),
)
def test_a_step_is_no_further_from_float32_than_the_plain_one(
    monkeypatch, rows, heads, kv_heads, head_dim, scheme, more
):
    plain = decoder(heads, kv_heads, head_dim, scheme, **more)
    exact = replaced(copy.deepcopy(plain), Linear4bit, lambda old: Linear.around(old.dequantize(), old.bias)).float()
    fused = copy.deepcopy(plain)
    fused.fuse()
    want, got = hidden(exact, rows), hidden(fused, rows)
    assert isinstance(fused.blocks._step, step_cpu.Step)
    monkeypatch.setattr(Stack, "step", lambda *_: None)
    off, allowed = ((x - want).norm() / want.norm() for x in (got, hidden(fused, rows)))
    assert off < 1.2 * allowed < 0.05


@pytest.mark.parametrize("scheme", (None, Scheme("nf4", True, 32)))
def test_rows_do_not_change_each_other(scheme):
    model = decoder(4, 2, 32, scheme)
    model.fuse()
    together = hidden(model, 4)
    assert model.blocks._step
    for rows in (1, 2, 3):
        assert torch.equal(hidden(model, rows), together[:, :rows])


def test_what_it_does_not_take_goes_the_plain_way():
    """Weights in float32, heads of 48, a decoder that is not fused; a copy finds its own addresses."""
    for model in (decoder(4, 2, 48, None), decoder(4, 2, 32, None).float()):
        model.fuse()
        hidden(model, 1)
        assert not model.blocks._step
    model = decoder(4, 2, 32, None)
    hidden(model, 1)
    assert not model.blocks._step
    model.fuse()
    hidden(model, 1)
    other = copy.deepcopy(model)
    assert model.blocks._step and other.blocks._step is None
    assert torch.equal(hidden(model, 2), hidden(other, 2)) and other.blocks._step is not model.blocks._step
    assert model.to(torch.float32).blocks._step is None


def test_a_full_cache_is_refused():
    model = decoder(4, 2, 32, None)
    model.fuse()
    cache = KVCache(model.config, 1, 8, torch.device("cpu"), torch.bfloat16)
    with torch.inference_mode():
        model(torch.randn(8, 224).bfloat16(), [0, 8], cache)
        with pytest.raises(IndexError, match=r"room for 8 tokens and holds \[8\]"):
            model(torch.randn(1, 224).bfloat16(), None, cache)


def test_a_system_without_large_pages_keeps_the_weights(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    layer = torch.nn.Linear(8, 4)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    to_huge_pages(layer)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
