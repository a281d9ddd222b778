"""Times of a step's phases, and FLOPs as torch counts them."""

import time

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minillava.config import DecoderConfig, ImageConfig, LoRAConfig, ModelConfig, VisionConfig
from minillava.device import matmul_peak, peak_bytes
from minillava.layers import lora
from minillava.llava import LLaVAModel
from minillava.training.metrics import Clock, Work

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["frozen", "trained", "adapters", "experts frozen", "experts trained"])
def test_flops_are_those_that_torch_counts(kind):
    """All products in the blocks, to the last one: none for the gradient of a frozen weight, none of an expert that a
    token does not take. Attention and projector, which torch cannot see into, by hand."""
    trained, experts = "trained" in kind, 6 * ("experts" in kind)
    vision = VisionConfig(16, 32, 3, 2, 16, 8)
    decoder = DecoderConfig(300, 32, 48, 3, 4, 2, 8, num_experts=experts, experts_per_token=2, expert_size=20)
    model = LLaVAModel(ModelConfig(vision=vision, decoder=decoder, image=ImageConfig(16))).requires_grad_(trained)
    model.init_weights(0)
    if kind == "adapters":
        lora.initialise(lora.attach(model.decoder, "decoder", LoRAConfig(rank=4)), 0)
    work = Work(model)

    def products(call):
        with FlopCounterMode(display=False) as counter:
            call()
        ops = counter.get_flop_counts()["Global"].items()
        return sum(n for op, n in ops if str(op) in ("aten.mm", "aten.addmm"))

    x_TD, keep_S = torch.randn(104, 32, requires_grad=True), torch.arange(7)
    counted = products(lambda: model.decoder(x_TD, (0, 40, 104), keep_S=keep_S).sum().backward())
    head = 2 * 32 * 300 * (2 + trained)
    assert counted == 104 * work.token + 7 * (work.answer - head)

    def see():
        x_NTD = torch.randn(2, 5, 16, requires_grad=trained)
        for block in model.vision.blocks[: vision.layers_run]:
            x_NTD = block(x_NTD)
        if trained:
            x_NTD.sum().backward()

    projector = 2 * (16 * 32 + 32 * 32) * (3 if trained else 1)
    assert products(see) == 10 * (work.patch - projector)
    causal = 3 * 3 * 2 * 2 * 32 * (40**2 + 64**2) / 2  # passes, layers, products, FLOPs, width, pairs
    tower = (3 if trained else 1) * 2 * 2 * 2 * 16 * 2 * 4**2  # passes, layers, products, FLOPs, width, views
    wanted = 104 * work.token + 7 * work.answer + 8 * work.patch + causal + tower
    assert work.flops((0, 40, 104), 7, [4, 4]) == wanted


def test_clock_sums_phases_and_takes_the_tower_out_of_forward():
    tower = nn.Linear(2, 2)
    clock = Clock(CPU, tower)
    slow = tower.register_forward_hook(lambda *_: time.sleep(0.02), prepend=True)
    for _ in range(2):
        with clock("forward"):
            tower(torch.zeros(1, 2))
            time.sleep(0.01)
    seconds = clock.read()
    assert seconds["vision_s"] >= 0.04 and seconds["forward_s"] >= 0.02
    assert clock.read() == {}
    for _ in range(4):
        with clock("forward"):
            tower(torch.zeros(1, 2))
    assert 0.02 <= clock.read(4)["vision_s"] < 0.08  # of one step
    slow.remove()
    clock.close()
    tower(torch.zeros(1, 2))
    assert clock.read() == {}


def test_peaks_are_measured():
    assert 1e8 < matmul_peak(CPU, torch.float32) < 1e15
    began_s = time.monotonic()
    assert 1e7 < matmul_peak(CPU, torch.bfloat16) < 1e15
    assert time.monotonic() - began_s < 8  # where it is emulated too: products of 1024 take 20 s
    held = torch.ones(1 << 24)
    assert peak_bytes(CPU) > held.nbytes
