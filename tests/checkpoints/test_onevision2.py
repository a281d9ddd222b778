"""OneVision-2: the tower against its formulas in float64, packed samples, passes, sizes and frames.

Letters: P patches, D width, H heads, K head size.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onevision import DENSE, LAYOUT, TOWER, config, drawn, fill, make_model, packed

from minillava.chat.messages import Message
from minillava.errors import UserError
from minillava.llava import LLaVAModel, passes
from minillava.media.video import choose
from minillava.media.visual import Media
from minillava.visual_tokens import clip_span, image_span, patch_positions


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


# ---- the tower against its formulas ----


def exact(vision, weights, patches, positions_P3, windows):
    """Features [P, D] in float64, from the formulas alone."""
    D, heads = vision.hidden_size, vision.num_heads
    half = D // heads // 2

    def norm(x, name):
        mean = 0 if vision.norm == "rms" else x.mean(-1, keepdim=True)
        x = (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + vision.norm_eps).sqrt()
        return x * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    angles = []
    for axis, size in enumerate((4 * half // 16, 6 * half // 16, 6 * half // 16)):
        inverse = (vision.rotary_theta ** -(torch.arange(size).float() / size)).double()
        angles.append(positions_P3[:, axis, None].double() * inverse)
    angles_PK = torch.cat(angles, 1).repeat(1, 2)[:, None]  # angles laid out for halves ...

    def turn(x_PHK):  # ... that turn pairs
        out = torch.empty_like(x_PHK)
        even, odd, cos, sin = x_PHK[..., ::2], x_PHK[..., 1::2], angles_PK.cos(), angles_PK.sin()
        out[..., ::2] = even * cos[..., ::2] - odd * sin[..., ::2]
        out[..., 1::2] = odd * cos[..., 1::2] + even * sin[..., 1::2]
        return out

    x = norm(patches.double().flatten(1) @ weights["patch_embedding.weight"].flatten(1).T, "pre_norm")
    for n in range(vision.num_layers):
        y = norm(x, f"blocks.{n}.norm1")
        q, k, v = (linear(y, f"blocks.{n}.attn.{part}").unflatten(1, (heads, -1)) for part in "qkv")
        seen = []
        for some in zip(turn(q).split(windows), turn(k).split(windows), v.split(windows)):
            scores = torch.einsum("phk,shk->hps", *some[:2]) * (2 * half) ** -0.5
            seen.append(torch.einsum("hps,shk->phk", scores.softmax(-1), some[2]).flatten(1))
        x = x + linear(torch.cat(seen), f"blocks.{n}.attn.out")
        y = F.gelu(linear(norm(x, f"blocks.{n}.norm2"), f"blocks.{n}.mlp.fc1"))
        x = x + linear(y, f"blocks.{n}.mlp.fc2")
    return norm(x, "post_norm") if vision.final_norm else x


KINDS = {
    "as released": {},
    "rms norms and a final one": {"norm": "rms", "final_norm": True},
    "heads of 64, whole rows": {"num_heads": 1, "window": 0},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_tower_equals_the_formulas(kind):
    """Pictures, frames of a file, a row of six frames (windows of four and two) and canvases, all in one pass."""
    made = dataclasses.replace(TOWER, **KINDS[kind])
    one_row = config(vision=made, layout=dataclasses.replace(LAYOUT, one_row=True))
    spans = [
        image_span(config(vision=made), 60, 90),
        clip_span(config(vision=made), 3, 60, 60, (0, 19, 38)),
        clip_span(one_row, 6, 56, 60, (0, 12, 24, 36, 47, 59)),
        clip_span(config(vision=made), 5, 56, 56, places_FP3=packed(5, 4, 4)),
    ]
    windows = [size for span in spans for size in span.windows]
    rows = [24], [16] * 3, [64, 32] if made.window else [96], [64, 16] if made.window else [80]
    assert windows == [size for row in rows for size in row]
    positions_P3 = torch.cat([patch_positions(span, 2) for span in spans])
    tower = fill(LLaVAModel(config(dataclasses.replace(DENSE, vocab_size=8), made)).vision).double()
    patches = torch.randn(sum(windows), 3, 14, 14, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        found_PD = tower(patches, positions_P3, windows)[:, 0]
    expected_PD = exact(made, tower.state_dict(), patches, positions_P3, windows)
    assert (found_PD - expected_PD).abs().max() < 1e-5 * expected_PD.abs().max()  # angles are float32's


def test_packed_samples_equal_each_alone(model):
    """Nine frames and a picture in a row of packed samples: logits, and gradients of the tower and merger."""
    processor, messages = (
        model.engine.processor,
        [Message("user", "<|video_pad|>What happens?"), Message("assistant", "seconds")],
    )
    clip = processor(messages, [Media([drawn(60, 60, i) for i in range(9)], True)])
    messages = [Message("user", "<|image_pad|>What happens?"), Message("assistant", "system")]
    picture = processor(messages, [Media(drawn(90, 60))])
    assert len(clip.visuals[0].tags) == 9 and clip.visuals[0].tags[8][0] == "<8.0 seconds>"

    def run(*examples):
        ends = np.cumsum([0, *(len(example.ids) for example in examples)]).tolist()
        ids, labels = (torch.tensor([x for e in examples for x in getattr(e, key)]) for key in ("ids", "labels"))
        pixels, spans = torch.cat([e.pixels_NCHW for e in examples]), [s for e in examples for s in e.spans]
        model.model.zero_grad()
        loss = model.model(ids, pixels, labels, ends, spans=spans)
        loss.backward()
        grads = [p.grad.clone() for p in (*model.model.vision.parameters(), *model.model.projector.parameters())]
        return loss.detach(), grads

    model.model.requires_grad_()
    (loss_a, grads_a), (loss_b, grads_b), (both, grads) = run(clip), run(picture), run(clip, picture)
    model.model.requires_grad_(False)
    torch.testing.assert_close(both, loss_a + loss_b, rtol=1e-5, atol=1e-5)
    for a, b, found in zip(grads_a, grads_b, grads):
        torch.testing.assert_close(found, a + b, rtol=1e-3, atol=1e-3 * float((a + b).abs().max()))


def test_passes_bound_the_tower(model):
    """768 frames go through it a few at a time: what a pass holds does not grow with the video."""
    sizes = [4, 4, 4, 9, 2]
    assert [sizes[part] for part in passes(sizes, 8)] == [[4, 4], [4], [9], [2]]
    assert [sizes[part] for part in passes(sizes, 12, 2)] == [[4, 4], [4], [9, 2]]
    largest = []
    hook = model.model.vision.blocks[0].register_forward_hook(lambda _, x, y: largest.append(x[0].shape[1]))
    span = clip_span(model.config, 768, 56, 56, range(768))
    patches = torch.randn(span.views, 3, 14, 14, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        (parts,) = model.model.see(patches, [span], at_once=1)
        (whole,) = model.model.see(patches[:160], [clip_span(model.config, 10, 56, 56, range(10))])
    hook.remove()
    assert max(largest) == 576 == 36 * 16 and len(largest) == 22 + 1  # 768 x 16 patches, then ten frames at once
    torch.testing.assert_close(parts[: len(whole)], whole, rtol=1e-4, atol=1e-4)


# ---- sizes and frames ----


@pytest.mark.parametrize("patch,merge", [(14, 2), (14, 3), (16, 2), (16, 3)])
def test_counts_of_random_sizes(patch, merge):
    """Section 4 of the facts, in exact arithmetic where it rounds: 2,500 sizes for each of the four pairs."""
    made = config(vision=dataclasses.replace(TOWER, patch_size=patch, image_size=patch), merge=merge)
    made = dataclasses.replace(made, image=dataclasses.replace(made.image, size=patch, max_pixels=4_000_000))
    block = patch * merge
    sizes = torch.randint(1, 5000, (2500, 2), generator=torch.Generator().manual_seed(patch * merge)).tolist()
    for width, height in sizes:
        if max(width, height) > 200 * min(width, height):
            with pytest.raises(UserError, match="over 200 times"):
                image_span(made, width, height)
            continue
        h, w = (half_to_even(side, block) * block for side in (height, width))
        if h * w > 4_000_000:
            beta = math.sqrt(height * width / 4_000_000)
            h, w = (max(block, math.floor(side / beta / block) * block) for side in (height, width))
        elif h * w < 3136:
            beta = math.sqrt(3136 / (height * width))
            h, w = (math.ceil(side * beta / block) * block for side in (height, width))
        span = image_span(made, width, height)
        assert (span.height * patch, span.width * patch) == (h, w), (width, height)
        assert span.tokens == h * w // block**2


def half_to_even(side, block):
    whole, rest = divmod(side, block)
    return whole + (2 * rest > block or (2 * rest == block and whole % 2 == 1))


@pytest.mark.parametrize("count,rate,layout,expected", [
    (96, 30.0, {}, [0, 14, 27, 41, 54, 68, 81, 95]),  # 3.2 s: eight
    (6, 30.0, {}, [0, 1, 2, 3, 4, 5]),
    (300, 15.0, {}, [round(299 / 15 * i) for i in range(16)]),  # 20 s: sixteen
    (2400, 24.0, {"max_frames": 3}, [0, 1200, 2399]),  # 100 s: as many as there may be; 1199.5 to even
    (96, 30.0, {"num_frames": 6}, [0, 19, 38, 57, 76, 95]),
    (96, 30.0, {"video_fps": 2.2, "num_frames": 6}, [0, 16, 32, 48, 63, 79, 95]),  # int(7.04) of them
    (96, 30.0, {"video_fps": 30.0, "max_frames": 5}, [0, 24, 48, 71, 95]),
    (9, 0.0, {}, list(range(9))),  # a list: all of it
])  # fmt: skip
def test_which_frames(count, rate, layout, expected):
    assert choose(count, rate, config(layout=dataclasses.replace(LAYOUT, **layout)), 60, 60) == expected


def test_frames_that_do_not_fit_are_refused_when_asked_for():
    short = config(dataclasses.replace(DENSE, max_positions=1200), layout=dataclasses.replace(LAYOUT, num_frames=60))
    with pytest.raises(UserError, match="60 frames do not fit the context; take 56 or fewer"):
        choose(90, 30.0, short, 56, 56)  # 4 visual tokens and a tag of up to 12 each, in three quarters of 1200
