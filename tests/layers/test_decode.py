"""A decode step in few kernels: the same as block by block, and how many kernels it is."""

from __future__ import annotations

import pytest
import torch

from minillava.config import DecoderConfig
from minillava.decoder import Decoder
from minillava.kernels.frame import HAS_TRITON
from minillava.kernels.nf4_dequantize import code
from minillava.layers.cache import KVCache
from minillava.layers.linear import Fused, Linear
from minillava.layers.quantize import Linear4bit
from minillava.layers.rotary import angles, cos_sin
from minillava.layers.stack import gpu_step, gpu_step_takes

TINY = {"vocab_size": 11, "hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 4, "head_dim": 16}


def in_four_bits(decoder, of=Linear4bit.from_weight):
    for block in decoder.blocks:
        for module in (block.attn, block.mlp):
            for name, layer in list(module.named_children()):
                if type(layer) is Linear:
                    setattr(module, name, of(layer.weight, layer.bias))


@pytest.mark.parametrize("bits", (16, 4))
@pytest.mark.parametrize("more", ({"num_kv_heads": 2, "qkv_bias": True}, {"num_kv_heads": 4, "qk_norm": True}))
def test_a_step_is_what_the_blocks_do(more, bits):
    """Two slots of different lengths; what the step leaves in the cache, too."""
    torch.manual_seed(0)
    config = DecoderConfig(**TINY, **more)
    decoder = Decoder(config).requires_grad_(False)
    if bits == 4:
        in_four_bits(decoder)
    decoder.blocks.join()
    caches = [KVCache(config, 3, 8, torch.device("cpu"), torch.float32) for _ in range(2)]
    prompt, new = torch.randn(7, 64), torch.randn(2, 64)
    hidden = []
    for cache in caches:
        decoder(prompt, (0, 5, 7), cache)
        if cache is caches[0]:
            hidden.append(decoder(new, None, cache))
            continue
        assert gpu_step_takes(decoder.blocks, new, cache)
        rotary = cos_sin(angles(cache.begin(2, None), config), torch.float32)
        hidden.append(decoder.norm(gpu_step(decoder.blocks, new, rotary, cache)))
        cache.advance()
    torch.testing.assert_close(*hidden)
    for name in ("k_LBSGK", "v_LBSGK", "lengths_B"):
        torch.testing.assert_close(*(getattr(cache, name) for cache in caches))


def test_what_it_takes():
    """Joined products of plain layers and such in four bits; not experts, many rows, or other types in the cache."""
    cache = KVCache(DecoderConfig(**TINY), 32, 8, torch.device("meta"), torch.float32)
    with torch.device("meta"):
        plain, experts = Decoder(DecoderConfig(**TINY)), Decoder(DecoderConfig(**TINY, num_experts=4, expert_size=8))
        assert not gpu_step_takes(plain.blocks, torch.empty(2, 64), cache)
        plain.blocks.join(), experts.blocks.join()
        assert gpu_step_takes(plain.blocks, torch.empty(16, 64), cache)
        assert not gpu_step_takes(plain.blocks, torch.empty(17, 64), cache)
        assert not gpu_step_takes(plain.blocks, torch.empty(2, 64, dtype=torch.bfloat16), cache)
        assert not gpu_step_takes(experts.blocks, torch.empty(2, 64), cache)


def meta_decoder(bits, **sizes):
    """A decoder of Vicuna-7B's sizes without memory, joined; scales are not nested."""

    def four(weight, bias):
        (N, K), size = weight.shape, weight.numel()
        parts = torch.empty(size // 2, dtype=torch.uint8), torch.empty(size // 64), None, None
        return Linear4bit(parts, (N, K), "nf4", 64, bias, torch.bfloat16)

    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(**sizes)).to(torch.bfloat16).requires_grad_(False)
        if bits == 4:
            in_four_bits(decoder, four)
    decoder.blocks.join()
    assert isinstance(decoder.blocks[0].attn.qkv, Fused)
    return decoder


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed here")
@pytest.mark.parametrize("bits", (16, 4))
@pytest.mark.parametrize("B", (1, 8))
def test_kernels_a_layer(B, bits):
    """At most 7, of operations that are captured as one graph: counted as wrappers launch them."""
    from minillava.kernels.tools import aot
    from minillava.kernels.tools.launches import Launches

    decoder = meta_decoder(bits, num_layers=1)
    cache = KVCache(decoder.config, B, 4096, torch.device("meta"), torch.bfloat16)
    with torch.device("meta"):
        x_BD = torch.empty(B, 4096, dtype=torch.bfloat16)
    rotary = cos_sin(angles(cache.begin(B, None), decoder.config), torch.bfloat16)
    assert gpu_step_takes(decoder.blocks, x_BD, cache)
    code("nf4", x_BD.device)  # the table of codes is made once
    with aot.compiling("sm_90") as found, Launches(found) as seen:
        gpu_step(decoder.blocks, x_BD, rotary, cache)
    assert seen.kernels == {(1, 16): 6, (8, 16): 5, (1, 4): 6, (8, 4): 7}[B, bits] <= 7
    assert not [row.complaints() for row in found if row.complaints()]
    assert all(row.settings["PDL"] and row.settings["launch_pdl"] for row in found)
