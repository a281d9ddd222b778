"""Frames behind their times, and canvases as cv-preinfer leaves them, in OneVision-2's prompts."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from onevision import TOWER, config, drawn, make_model, packed

from minillava.chat.messages import Message
from minillava.errors import UserError
from minillava.media.canvases import open_canvases
from minillava.media.visual import Media
from minillava.visual_tokens import patch_positions, time_runs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


# ---- prompts ----


def written(model, text, media):
    prompt = model.engine.processor([Message("user", text)], media, generate=True)
    return prompt, model.tokenizer.decode(prompt.ids, skip_special=False)


def test_frames_are_pictures_behind_their_times_in_prompt_order(model):
    frames, picture = Media([drawn(60, 60, i) for i in range(2)], True), Media(drawn(90, 60, 9))
    pads = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    clip = f"<0.0 seconds>{pads}<1.0 seconds>{pads}"
    wide = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    prompt, text = written(model, "<|video_pad|>Is this from it? <|image_pad|>", [picture, frames])
    assert f"user\n{clip}Is this from it? {wide}<|im_end|>" in text
    assert [span.clip for span in prompt.spans] == [True, False]
    prompt, text = written(model, "<|image_pad|>\nIs this from it? <|video_pad|>\n", [frames, picture])
    assert f"user\n{wide}Is this from it? {clip}<|im_end|>" in text
    assert [span.clip for span in prompt.spans] == [False, True]
    assert model.engine.processor("<|vision_start|>\n<|video_pad|> <|vision_end|>", [frames]).ids.count(5) == 8


def test_a_cut_keeps_whole_clips(model):
    frames, picture = Media([drawn(60, 60, i) for i in range(2)], True), Media(drawn(90, 60, 9))
    messages = [Message("user", "<|video_pad|>What happens?<|image_pad|>"), Message("assistant", "this")]
    whole = model.engine.processor(messages, [frames, picture])
    last = len(whole.ids) - 1 - whole.ids[::-1].index(5)
    cut = model.engine.processor(messages, [frames, picture], max_tokens=last)
    assert [visual.span.clip for visual in cut.visuals] == [True] and cut.ids.count(5) == 8
    assert len(cut.ids) == last - 5 and cut.ids == whole.ids[: last - 5]


# ---- canvases ----


def canvas_folder(folder, places=None, fps=30.0, pictures=5, side=56, **meta):
    folder.mkdir(exist_ok=True)
    places = packed(5, 4, 4) if places is None else places
    for i in range(pictures):
        drawn(side, side, i).save(folder / f"canvas_{i:05}.png")
    np.save(folder / "src_patch_position.npy", places.reshape(-1, 3).to(torch.int32).numpy())
    (folder / "meta.json").write_text(json.dumps({"fps": fps} | meta))
    return folder


def test_canvases_are_one_row_of_runs(model, tmp_path):
    """As cv-preinfer leaves them: runs of equal frames, each on its line; decimals as meta.json says; no padding."""
    places = torch.cat([packed(5, 4, 4), torch.full((1, 16, 3), -1)])
    folder = canvas_folder(tmp_path / "clip", places, fps=7.0, pictures=6, decimals=2)
    prompt, text = written(model, "<|video_pad|>\nWhat happens?", [Media(folder, True)])
    (span,) = prompt.spans
    assert span.frames == (5, 4, 4) and span.windows == [64, 16] and span.tokens == 20
    expected, last = [], None
    for block in patch_positions(span, 2).view(-1, 4, 3).tolist():
        times = {time for time, _, _ in block}
        assert len(times) == 1 and block[3][1:] == [block[0][1] + 1, block[0][2] + 1]
        if block[0][0] == last:
            expected[-1][1] += 1
        else:
            expected.append([block[0][0], 1])
        last = block[0][0]
    assert [[*run] for run in time_runs(span, 2)] == expected
    blocks = [f"<{time / 7:.2f} seconds><|vision_start|>{'<|image_pad|>' * n}<|vision_end|>\n" for time, n in expected]
    assert f"user\n{''.join(blocks)}What happens?<|im_end|>" in text
    answer = model.generate("What happens?", videos=[folder], max_new_tokens=2)
    assert answer.image_tokens == 20


def test_canvases_that_cannot_be_used_are_named(model, tmp_path):
    half, mixed = packed(5, 4, 4), packed(5, 4, 4)
    half[2, 3:, 0], mixed[1, 0, 0] = -1, 99
    with pytest.raises(UserError, match=r"half.*padding in part"):
        open_canvases(canvas_folder(tmp_path / "half", half))
    with pytest.raises(UserError, match="all canvases are padding"):
        open_canvases(canvas_folder(tmp_path / "none", torch.full((5, 16, 3), -1)))
    with pytest.raises(UserError, match=r"shape \[80, 3\] for 3 canvases"):
        open_canvases(canvas_folder(tmp_path / "few", pictures=3))
    with pytest.raises(UserError, match="fps is -1, expected a positive number"):
        open_canvases(canvas_folder(tmp_path / "still", fps=-1))
    with pytest.raises(UserError, match="a block of patches that become one token is of several frames"):
        Media(canvas_folder(tmp_path / "mixed", mixed), True).open(model.config)
    with pytest.raises(UserError, match=r"canvases of 60 x 60 pixels with 16 positions are not whole in blocks"):
        Media(canvas_folder(tmp_path / "odd", side=60), True).open(model.config)
    positions = tmp_path / "half" / "src_patch_position.npy"
    positions.write_bytes(
        b"\x93NUMPY\x01\x00\x46\x00{'descr': '<i8', 'fortran_order': False, 'shape': (9999999, 3)}".ljust(80)
    )
    with pytest.raises(UserError, match=r"is no array that NumPy reads .*mmap length is greater"):
        open_canvases(tmp_path / "half")
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    positions.write_bytes((tmp_path / "two.npz").read_bytes())
    with pytest.raises(UserError, match=r"is no array that NumPy reads .*an archive of several"):
        open_canvases(tmp_path / "half")
    (tmp_path / "half/meta.json").unlink()
    with pytest.raises(UserError, match=r"half: canvases without .* pack the video with cv-preinfer"):
        Media(tmp_path / "half", True).open(model.config)
    rice = dataclasses.replace(TOWER, class_token=True, rotary_shares=(0, 1, 1), rotary_pairs=False)
    with pytest.raises(UserError, match="canvases are for models that see when a patch is"):
        Media(canvas_folder(tmp_path / "good"), True).open(config(vision=rice))
