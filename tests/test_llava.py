"""The whole model: cached equals uncached, packed equals one by one, pictures go where their placeholders are.

In float64 nothing but a mistake makes a difference beyond 1e-9; what float32 adds is seen in tokens.
Letters: T tokens, V vocabulary, B rows, N images.
"""

import copy
import dataclasses

import pytest
import torch

from minillava.config import IGNORE
from minillava.errors import UserError
from minillava.kernels.cpu.product import linear
from minillava.layers.cache import KVCache
from minillava.llava import next_labels

LENGTHS = (7, 12, 5, 9)  # of four sequences, of which the second and the last have a picture
EXACT = dict(rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def model(tiny_model):
    return copy.deepcopy(tiny_model).double()


@pytest.fixture
def batch(model):
    """Ids and labels of the four sequences, and the pictures of the second and the last."""
    generator = torch.Generator().manual_seed(0)
    placeholder = model.config.chat.image_token_id
    ids = [torch.randint(4, 100, (n,), generator=generator) for n in LENGTHS]
    for row in (1, 3):
        ids[row][1:5] = placeholder
    labels = [torch.where(torch.rand(len(i), generator=generator) < 0.6, i, IGNORE) for i in ids]
    labels = [l.masked_fill(i == placeholder, IGNORE) for i, l in zip(ids, labels)]
    return ids, labels, torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)


def boundaries(parts):
    return [0, *torch.tensor([len(part) for part in parts]).cumsum(0).tolist()]


def cache_for(model, rows, capacity):
    weight = model.decoder.embed.weight
    return KVCache(model.config.decoder, rows, capacity, weight.device, weight.dtype)


def decode(model, token_B, cache):
    """One decode step: logits [B, V]."""
    return model(token_B[:, None], cache=cache)


# ---- the cache ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cached_decoding_equals_uncached(model, batch, dtype):
    """A prompt with a picture and 24 greedy tokens: the logits of every step, and every token."""
    model = copy.deepcopy(model).to(dtype)
    prompt_T, picture = batch[0][1], batch[2][:1].to(dtype)
    cache = cache_for(model, 1, len(prompt_T) + 24)
    all_T = prompt_T
    with torch.no_grad():
        cached_V = model(prompt_T, picture, cache=cache, last_only=True)[0]
        for _ in range(24):
            plain_V = model(all_T, picture)[-1]
            if dtype == torch.float64:
                torch.testing.assert_close(cached_V, plain_V, **EXACT)
            assert cached_V.argmax() == plain_V.argmax()
            token = cached_V.argmax()[None]
            all_T = torch.cat([all_T, token])
            cached_V = decode(model, token, cache)[-1]
    assert cache.lengths_B.tolist() == [len(prompt_T) + 24] and len(all_T[len(prompt_T) :].unique()) > 6


def test_a_prompt_may_come_in_parts(model, batch):
    """At once, or in two passes in which the rows have one, three and six tokens: the same logits as alone."""
    ids, _, pixels_NCHW = batch
    rows, pictures = [ids[0], ids[3], ids[1]], [None, pixels_NCHW[1:], pixels_NCHW[:1]]  # 7, 9 and 12 tokens
    with torch.no_grad():
        alone_BV = torch.stack([model(row_T, picture)[-1] for row_T, picture in zip(rows, pictures)])
        for cuts in ((), (6,)):
            cache = cache_for(model, 3, 12)
            for start, end in zip((0, *cuts), (*cuts, None)):
                parts = [row_T[start:end] for row_T in rows]
                seen = pixels_NCHW.flip(0) if start == 0 else None
                cut = boundaries(parts)
                logits_BV = model(torch.cat(parts), seen, cu_seqlens=cut, cache=cache, last_only=True)
            assert cache.lengths == [7, 9, 12]
            torch.testing.assert_close(logits_BV, alone_BV, **EXACT)


def test_rows_of_unequal_lengths_decode_together(model, batch):
    """One token each on top of 7, 12, 5 and 9: equal to each row alone, also after two of them have left."""
    ids, _, pixels_NCHW = batch
    pictures = [None, pixels_NCHW[:1], None, pixels_NCHW[1:]]
    token_B = torch.tensor([11, 12, 13, 14])
    with torch.no_grad():
        cache = cache_for(model, 4, 14)
        model(torch.cat(ids), pixels_NCHW, cu_seqlens=boundaries(ids), cache=cache)
        logits_BV = decode(model, token_B, cache)
        longer = [torch.cat([row_T, token[None]]) for row_T, token in zip(ids, token_B)]
        alone = [model(row_T, picture) for row_T, picture in zip(longer, pictures)]
        torch.testing.assert_close(logits_BV, torch.stack([logits_TV[-1] for logits_TV in alone]), **EXACT)

        cache.move(0, 3, len(longer[3]))
        cache.live_B[1] = False
        for _ in range(2):  # a slot that is not live stays where it is
            logits_BV = decode(model, token_B[[3, 1]], cache)
            for row, was in enumerate([3, 1]):
                tokens_T = token_B[was].repeat(cache.lengths_B[0] - len(longer[3]) if was == 3 else 1)
                alone_TV = model(torch.cat([longer[was], tokens_T]), pictures[was])
                torch.testing.assert_close(logits_BV[row], alone_TV[-1], **EXACT)


def test_fused_products_change_nothing(model, batch):
    """q, k and v as one product, gate and up as one: equal logits, and the state dict that the parts had."""
    fused = copy.deepcopy(model)
    fused.decoder.fuse()
    assert sum("qkv" in name or "gate_up" in name for name, _ in fused.named_parameters()) == 2 * 3
    with torch.no_grad():
        torch.testing.assert_close(fused(batch[0][0]), model(batch[0][0]), **EXACT)
    state, expected = fused.state_dict(), model.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], t) for name, t in expected.items())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 65])
def test_few_rows_are_as_exact_as_the_library(rows, bias):
    generator = torch.Generator().manual_seed(rows)
    x, weight, b = (torch.randn(shape, generator=generator).bfloat16() for shape in ((rows, 304), (200, 304), (200,)))
    b = b if bias else None
    with torch.no_grad():
        exact = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        ours, library = linear(x, weight, b), torch.nn.functional.linear(x, weight, b)
    assert ours.shape == library.shape and (ours - exact).abs().max() <= 2 * (library - exact).abs().max()


# ---- packing ----


def test_packed_loss_and_gradients_equal_one_by_one(model, batch):
    """The sum of the losses, the number of supervised positions that it runs over, and every gradient."""
    ids, labels, pixels_NCHW = batch
    model = copy.deepcopy(model)
    cut = boundaries(ids)
    packed = model(torch.cat(ids), pixels_NCHW, torch.cat(labels), cut)
    packed.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    pictures = [None, pixels_NCHW[:1], None, pixels_NCHW[1:]]
    losses = [model(i, picture, label) for i, picture, label in zip(ids, pictures, labels)]
    sum(losses).backward()
    torch.testing.assert_close(packed.double(), sum(losses).double(), **EXACT)
    for name, p in model.named_parameters():
        unused = name.startswith(("vision.blocks.2", "vision.post_norm"))  # behind the layer that LLaVA reads
        assert (name in gradients) == (not unused), name
        if not unused:
            assert p.grad.abs().max() > 0, name
            torch.testing.assert_close(gradients[name], p.grad, **EXACT)


def test_the_loss_is_that_of_the_next_token(model, batch):
    """Against cross-entropy written out; the last token of one sequence does not predict the first of the next."""
    ids, labels, pixels_NCHW = batch
    cut = boundaries(ids)
    with torch.no_grad():
        log_p_TV = model(torch.cat(ids), pixels_NCHW, cu_seqlens=cut).log_softmax(-1)
        loss = model(torch.cat(ids), pixels_NCHW, torch.cat(labels), cut)
    expected, start = 0.0, 0
    for label_T in labels:
        for at in range(1, len(label_T)):
            if label_T[at] != IGNORE:
                expected -= log_p_TV[start + at - 1, label_T[at]].item()
        start += len(label_T)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_next_labels_end_with_each_sequence():
    assert next_labels(torch.tensor([1, 2, 3, 4, 5]), [0, 2, 5]).tolist() == [2, IGNORE, 4, 5, IGNORE]


def test_rows_of_equal_length_may_come_as_a_matrix(model):
    ids_BT = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        packed_TV = model(ids_BT.flatten(), cu_seqlens=[0, 10, 20])
        torch.testing.assert_close(model(ids_BT), packed_TV, **EXACT)
        torch.testing.assert_close(model(ids_BT, last_only=True), packed_TV[[9, 19]], **EXACT)


def test_a_sequence_does_not_see_its_neighbours(model, batch):
    ids, _, pixels_NCHW = batch
    with torch.no_grad():
        before_TV = model(torch.cat(ids), pixels_NCHW, cu_seqlens=boundaries(ids))
        ids[0], pixels_NCHW[0] = ids[0].flip(0), -pixels_NCHW[0]
        after_TV = model(torch.cat(ids), pixels_NCHW, cu_seqlens=boundaries(ids))
    changed_T = (before_TV - after_TV).abs().amax(-1) > 1e-9
    # All of sequence 0 but palindromic luck; sequence 1 from its picture on; nothing of 2 and 3.
    assert changed_T[:7].any() and changed_T[8:19].all() and not changed_T[7] and not changed_T[19:].any()


# ---- pictures ----


def test_pictures_come_in_the_order_of_their_placeholders(model, batch):
    ids, _, pixels_NCHW = batch
    with torch.no_grad():
        x_TD = model.embed(torch.cat(ids))
        spliced_TD = model.splice(x_TD, torch.cat(ids), model.see(pixels_NCHW))
        first_TD, second_TD = model.see(pixels_NCHW)
    assert torch.equal(spliced_TD[8:12], first_TD) and torch.equal(spliced_TD[25:29], second_TD)
    text = torch.cat(ids) != model.config.chat.image_token_id
    assert torch.equal(spliced_TD[text], x_TD[text]) and text.sum() == sum(LENGTHS) - 8


def test_placeholders_and_pictures_must_agree(model, batch):
    ids, _, pixels_NCHW = batch
    with pytest.raises(UserError, match="8 image placeholders, the pictures give 4 visual tokens"):
        model(torch.cat(ids), pixels_NCHW[:1], cu_seqlens=boundaries(ids))


def test_a_placeholder_outside_the_vocabulary(model, batch, monkeypatch):
    """-200, as original LLaVA has it: the same features as with an id of the vocabulary."""
    ids_T, pixels_NCHW = batch[0][1], batch[2][:1]
    with torch.no_grad():
        expected_TV = model(ids_T, pixels_NCHW)
        chat = dataclasses.replace(model.config.chat, image_token_id=-200)
        placeholder = model.config.chat.image_token_id
        monkeypatch.setattr(model, "config", dataclasses.replace(model.config, chat=chat))
        assert torch.equal(model(ids_T.masked_fill(ids_T == placeholder, -200), pixels_NCHW), expected_TV)


def test_a_frozen_tower_builds_no_graph(model, batch):
    model = copy.deepcopy(model)
    model.vision.requires_grad_(False)
    assert model.vision(batch[2]).requires_grad is False
    visual_TD = torch.cat(model.see(batch[2]))
    assert visual_TD.requires_grad and visual_TD.grad_fn is not None
    visual_TD.sum().backward()
    assert all(p.grad is None for p in model.vision.parameters())
    assert all(p.grad is not None for p in model.projector.parameters())
