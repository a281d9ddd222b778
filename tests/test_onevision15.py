"""OneVision-1.5: RICE tower, merger and Qwen3, against transformers' MLCD, the facts in float64, and the golden files.

Letters: N views, P patches, T tokens, D width, H heads, K head size, V vocabulary.
"""

import dataclasses

import pytest
import torch

from minillava.config import VisionConfig
from minillava.vit import VisionTower, patch_positions

RICE = VisionConfig(
    32, 48, 3, 4, 14, 14, activation="gelu", rotary=True, select_layers=(-1,)
)  # heads of 8: two frequencies an axis


def cut(pixels_CHW, merge=2):
    """Patches [P, 3, 14, 14] of a picture, in the order that the tower takes."""
    rows, columns = pixels_CHW.shape[1] // 14, pixels_CHW.shape[2] // 14
    return torch.stack(
        [pixels_CHW[:, 14 * r : 14 * r + 14, 14 * c : 14 * c + 14] for r, c in patch_positions(rows, columns, merge)]
    )


def tower(config=RICE, seed=0):
    made = VisionTower(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + ("norm" in name and name.endswith("weight")))
    return made


def test_patches_come_in_blocks():
    where = patch_positions(4, 6, 2).tolist()
    assert where[:6] == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]] and where[12:14] == [[2, 0], [2, 1]]
    assert sorted(where) == [[r, c] for r in range(4) for c in range(6)]


def test_the_trunk_is_mlcd_up_to_order():
    """transformers' MLCD (RICE's origin) goes row by row, and knows one size of square: 4 x 4 patches."""
    transformers = pytest.importorskip("transformers")
    ours = tower().double()
    config = transformers.MLCDVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14,
        num_key_value_groups=1, hidden_act="gelu",
    )  # fmt: skip
    theirs = transformers.MLCDVisionModel(config).eval().double()
    names = dict(class_embedding="embeddings.class_embedding", class_angles="class_pos_emb", pre_norm="pre_layrnorm")
    state = {}
    for name, p in ours.state_dict().items():
        name = name.replace("patch_embedding", "embeddings.patch_embedding").replace("blocks", "encoder.layers")
        name = name.replace("norm1", "layer_norm1").replace("norm2", "layer_norm2").replace(".attn.", ".self_attn.")
        for p_ in "qkv":
            name = name.replace(f"attn.{p_}.", f"attn.{p_}_proj.")
        name = name.replace("attn.out.", "attn.out_proj.")
        head = name.split(".")[0]
        state[names.get(head, head) + name.removeprefix(head)] = p
    prefix = "vision_model." if any(k.startswith("vision_model.") for k in theirs.state_dict()) else ""
    missing, extra = theirs.load_state_dict({prefix + k: v for k, v in state.items()}, strict=False)
    assert not extra and all("post_layernorm" in k or "position_ids" in k for k in missing)
    pixels_NCHW = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    with torch.no_grad():
        states = theirs(pixels_NCHW, output_hidden_states=True).hidden_states
        for layer in range(4):
            config = dataclasses.replace(RICE, select_layers=(layer,))
            ours.config = config
            for expected_TD, pixels_CHW in zip(states[layer], pixels_NCHW):
                found_PD = ours(cut(pixels_CHW), [(1, 4, 4)], 2)[:, 0]
                order = patch_positions(4, 4, 2) @ torch.tensor([4, 1])
                torch.testing.assert_close(
                    found_PD, expected_TD[1:][order], rtol=1e-5, atol=1e-5
                )  # MLCD's rotation is float32


def test_frames_do_not_see_each_other():
    """Two pictures and a clip of two frames together are what each is alone; the slip of the reference is its own."""
    ours = tower().double()
    grids = [(1, 2, 4), (2, 4, 2), (1, 2, 2)]
    pixels = [torch.randn(f * h * w, 3, 14, 14, dtype=torch.float64) for f, h, w in grids]
    with torch.no_grad():
        together = ours(torch.cat(pixels), grids, 2).squeeze(1)
        frames = [*pixels[:1], *pixels[1].chunk(2), *pixels[2:]]
        alone = [ours(p, [(1, h, w)], 2).squeeze(1) for p, (h, w) in zip(frames, [(2, 4), (4, 2), (4, 2), (2, 2)])]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-9, atol=1e-9)

        ours.config = dataclasses.replace(RICE, strip_slip=True)
        slipped = ours(torch.cat(pixels), grids, 2).squeeze(1)
    assert torch.equal(slipped[:8], together[:8])  # the first is right
    # Of frame 1 the file takes the class token and all patches but the last; of frame 2 it begins with frame 1's last.
    assert torch.equal(slipped[9:16], together[8:15]) and torch.equal(slipped[16], together[15])
    assert not any(torch.allclose(slipped[8], row) for row in together)
