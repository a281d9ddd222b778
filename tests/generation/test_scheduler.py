"""Requests that come while others run: nobody's answer depends on who else is there, nothing is computed twice."""

import copy
import random

import pytest
import torch

from minillava.chat.messages import Message
from minillava.config import ChatConfig
from minillava.generation.engine import Engine, Request
from minillava.generation.memory import BLOCK, Memory
from minillava.generation.sampling import Sampling
from minillava.generation.scheduler import Scheduler
from minillava.generation.slots import Slots
from minillava.layers.quantize import Linear4bit
from minillava.layers.scheme import Scheme
from minillava.media.visual import media
from minillava.processor import user_message

LONG = "is the circle red? is it green? is it blue? what color is the large circle? "


@pytest.fixture(scope="module", params=["float32", "nf4"])
def engine(request, tiny_model, tiny_tokenizer):
    model = copy.deepcopy(tiny_model)
    for block in model.decoder.blocks if request.param == "nf4" else ():
        for part, names in ((block.attn, ("q", "k", "v", "out")), (block.mlp, ("gate", "up", "down"))):
            for name in names:
                layer = Linear4bit.from_weight(getattr(part, name).weight.detach(), scheme=Scheme())
                setattr(part, name, layer)
    return Engine(model, tiny_tokenizer)


def pixels(seed):
    return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed))


def ask(text, images=(), **options):
    return Request([user_message(ChatConfig(), text, media(images))], media(images), **options)


def scheduler_of(engine, rows=4, chunk=40, prefix_bytes=1 << 20, picture_bytes=1 << 20, capacity=200):
    with torch.inference_mode():
        slots = engine.new_slots(rows, capacity)
    return Scheduler(
        engine, slots, chunk, Memory(engine.processor.placeholders, slots.cache, prefix_bytes, picture_bytes)
    )


def submit(scheduler, request):
    row = scheduler.engine.row(0, request, {})
    scheduler.memory.describe(row)
    scheduler.submit(row)
    return row


def finish(scheduler, *requests):
    rows = [submit(scheduler, request) for request in requests]
    while scheduler.busy:
        scheduler.step()
    return rows


def crowd(count):
    """Requests that share pictures and beginnings, or nothing, with all ways of sampling."""
    requests = []
    for i in range(count):
        images = [pixels(100), pixels(i % 5)][: i % 3]
        text = LONG * (i % 4 == 1) + ["what?", "red", "why is it blue?"][i % 3] + " yes" * (i % 7)
        sampling = Sampling(temperature=(i % 2) * 0.9, top_p=1 - (i % 3) / 10, seed=i)
        requests.append(ask(text, images, max_new_tokens=[2, 7, 18][i % 3], sampling=sampling))
    return requests


@pytest.mark.parametrize("slots,chunk,prefix_bytes", [(4, 7, 1 << 20), (4, 64, 40_000), (4, 1000, 0), (15, 64, 40_000)])
def test_an_answer_does_not_depend_on_who_else_is_there(engine, slots, chunk, prefix_bytes):
    """30 requests come at random steps, 6 leave at random; memories that hold all, little, and nothing; as many rows at
    once as each way of a CPU's products takes."""
    requests, dice = crowd(30), random.Random(chunk)
    alone = [engine.generate([request])[0].token_ids for request in requests]
    scheduler, rows, most = scheduler_of(engine, slots, chunk, prefix_bytes), [], 0
    unwanted = set(dice.sample(range(30), 6))
    while len(rows) < 30 or scheduler.busy:
        while len(rows) < 30 and dice.random() < (0.5 if slots < 5 else 0.9):
            rows.append(submit(scheduler, requests[len(rows)]))
        if rows and (number := dice.randrange(len(rows))) in unwanted:
            scheduler.cancel(rows[number])
        scheduler.step()
        most = max(most, len(scheduler.live))
    assert most > slots / 2
    for number, row in enumerate(rows):
        if row.finish_reason == "cancelled":
            assert number in unwanted and row.token_ids == alone[number][: len(row.token_ids)]
        else:
            assert row.token_ids == alone[number], number
    assert sum(row.finish_reason != "cancelled" for row in rows) >= 24
    assert (sum(row.reused for row in rows) > 0) == (prefix_bytes > 0)


def test_a_picture_in_ten_requests_is_encoded_once(engine):
    before, picture = engine.pictures_seen, pixels(7)
    scheduler = scheduler_of(engine)
    finish(scheduler, *[ask(f"what {i}?", [picture.clone()], max_new_tokens=2) for i in range(5)])
    finish(scheduler, *[ask(f"why {i}?", [picture.clone()], max_new_tokens=2) for i in range(5)])
    assert engine.pictures_seen == before + 1


def test_the_same_prefix_is_computed_once_even_at_once(engine):
    """Eight equal prompts at the same moment: one is computed, the others take its blocks over."""
    scheduler = scheduler_of(engine, rows=8, chunk=1000)
    rows = finish(scheduler, *[ask(LONG, [pixels(1)], max_new_tokens=3) for _ in range(8)])
    tokens, known = len(rows[0].ids), (len(rows[0].ids) - 1) // BLOCK * BLOCK
    assert known >= BLOCK and [row.reused for row in rows] == [0] + [known] * 7
    assert scheduler.prefilled_tokens == tokens + 7 * (tokens - known)


def test_a_second_turn_takes_over_the_first_with_its_answer(engine):
    scheduler, question = scheduler_of(engine), user_message(ChatConfig(), LONG, media([pixels(1)]))
    (first,) = finish(scheduler, Request([question], media([pixels(1)]), max_new_tokens=8))
    turns = [question, Message("assistant", first.text.text), Message("user", "why?")]
    (second,) = finish(scheduler, Request(turns, media([pixels(1)]), max_new_tokens=8))
    assert second.reused >= len(first.ids) // BLOCK * BLOCK > 0
    (scratch,) = engine.generate([Request(turns, media([pixels(1)]), max_new_tokens=8)])
    assert second.token_ids == scratch.token_ids


def test_equal_ids_about_other_pictures_are_another_prefix(engine):
    scheduler = scheduler_of(engine)
    finish(scheduler, ask(LONG, [pixels(1)], max_new_tokens=3))
    (other,) = finish(scheduler, ask(LONG, [pixels(2)], max_new_tokens=3))
    assert other.reused == BLOCK <= other.ids.index(engine.config.chat.image_token_id), "the system prompt alone"
    assert other.token_ids == engine.generate([ask(LONG, [pixels(2)], max_new_tokens=3)])[0].token_ids


def test_a_long_prompt_does_not_stall_the_others(engine):
    """While 150 tokens go in by 10, a row that runs gets a token at every step."""
    scheduler = scheduler_of(engine, chunk=10)
    short = submit(scheduler, ask("red", max_new_tokens=30))
    while not short.token_ids:
        scheduler.step()
    long = submit(scheduler, Request(prompt_ids=[5, 6, 7] * 50, max_new_tokens=2))
    for _ in range(14):
        before = len(short.token_ids)
        scheduler.step()
        assert len(short.token_ids) == before + 1 and not long.token_ids
    finish(scheduler)
    assert long.finish_reason == "length"


def test_rows_enter_in_order_of_arrival(engine):
    scheduler = scheduler_of(engine, rows=1)
    rows = [submit(scheduler, ask(f"what {i}?", max_new_tokens=2 + i % 3)) for i in range(5)]
    ended = []
    while scheduler.busy:
        ended += [row for row, _ in scheduler.step() if row.finish_reason]
    assert [id(row) for row in ended] == [id(row) for row in rows]


def test_blocks_leave_from_the_end_of_what_was_used_least(engine):
    """A pool of four blocks: a second prompt of three takes the places of the first one's last two."""
    scheduler = scheduler_of(engine, prefix_bytes=0)
    config = engine.config.decoder
    size = 2 * config.num_layers * BLOCK * config.num_kv_heads * config.head_dim * 4
    scheduler = scheduler_of(engine, prefix_bytes=4 * size)
    first, second = (Request(prompt_ids=[id] * (3 * BLOCK + 2), max_new_tokens=1) for id in (7, 8))
    (row,) = finish(scheduler, first)
    finish(scheduler, second)
    prefixes = scheduler.memory.prefixes
    assert len(prefixes) == prefixes.blocks == 4 and prefixes.known(row.block_keys) == 1
    (again,) = finish(scheduler, first)
    assert again.reused == BLOCK and again.token_ids == row.token_ids


def test_of_equal_requests_the_one_that_is_cancelled_leaves(engine):
    """They are compared as what they are, not by what they hold: pictures have no truth value."""
    scheduler = scheduler_of(engine, rows=1)
    rows = [submit(scheduler, ask("what?", [pixels(1)], max_new_tokens=9)) for _ in range(4)]
    scheduler.step()
    scheduler.cancel(rows[2])
    assert [id(row) for row in scheduler.waiting] == [id(rows[1]), id(rows[3])]


def test_slots_that_a_graph_takes_along_keep_their_random_numbers(engine, monkeypatch):
    """On a GPU three rows take a step of four slots: the fourth, where nobody is or a prompt enters by parts, does not
    move on. Without a GPU the same step runs plainly."""

    def launch(slots, n):
        slots.step(min(1 << (n - 1).bit_length(), slots.rows), frozenset(slots.kinds[:n]))
        slots.pending.append((slots.tokens_B[:n].clone(), None))

    asked = [ask(text, max_new_tokens=40, sampling=Sampling(1.0, seed=i)) for i, text in enumerate(("a", "b", "c"))]
    late = ask(LONG, max_new_tokens=9, sampling=Sampling(1.0, seed=7))
    alone = [engine.generate([request])[0].token_ids for request in (*asked, late)]
    monkeypatch.setattr(Slots, "launch", launch)
    scheduler = scheduler_of(engine, chunk=1000, capacity=120)
    for _ in range(4):  # more steps than there are numbers for a row
        assert [row.token_ids for row in finish(scheduler, *asked)] == alone[:3]
    rows = [submit(scheduler, request) for request in asked]
    scheduler.step()
    scheduler.chunk = 5
    rows.append(submit(scheduler, late))
    finish(scheduler)
    assert [row.token_ids for row in rows] == alone


def test_what_can_never_fit_is_refused(engine):
    with pytest.raises(ValueError, match="do not fit a slot of 20"):
        submit(scheduler_of(engine, capacity=20), ask(LONG))


def test_logprobs_are_those_of_the_whole_model(engine):
    """Of each token and the likeliest three, greedy and drawn, among others: log softmax of one pass over all ids."""
    asked = [ask("what?", max_new_tokens=6, logprobs=3, sampling=Sampling(t, seed=4)) for t in (0.0, 1.2)]
    for row in finish(scheduler_of(engine), *asked, ask("red", max_new_tokens=9))[:2]:
        with torch.no_grad():
            logits_TV = engine.model(torch.tensor(row.ids + row.token_ids))[len(row.ids) - 1 : -1]
        wanted_TV = logits_TV.log_softmax(-1)
        scale = 1e-5 * logits_TV.abs().max()
        for found, wanted_V, id in zip(row.token_logprobs, wanted_TV, row.token_ids, strict=True):
            assert found.id == id and abs(found.logprob - wanted_V[id]) < scale
            values, ids = wanted_V.topk(3)
            assert [i for i, _ in found.likeliest] == ids.tolist()
            assert all(abs(value - wanted) < scale for (_, value), wanted in zip(found.likeliest, values))


class Counting:
    """A grammar: 20, 21, 22, ... and nothing else; it tells of so many tokens, or of those up to the next."""

    def __init__(self, size=0):
        self.next, self.size = 20, size

    def allowed(self):
        return torch.arange(self.size or self.next + 1) == self.next

    def advance(self, id):
        assert id == self.next
        self.next += 1


def test_a_grammar_bounds_its_own_row_alone(engine):
    plain = [ask("what?", max_new_tokens=8), ask("red", max_new_tokens=5, sampling=Sampling(1.0, seed=3))]
    alone = [engine.generate([request])[0].token_ids for request in plain]
    words = engine.config.decoder.vocab_size
    for size in (0, words - 3, words, words + 3):  # a tokenizer may have more tokens than the model, or fewer
        bound = ask("what?", max_new_tokens=7, grammar=Counting(size), sampling=Sampling(1.0, top_p=0.5))
        rows = finish(scheduler_of(engine), plain[0], bound, plain[1])
        assert [rows[0].token_ids, rows[2].token_ids] == alone
        assert rows[1].token_ids == list(range(20, 27))


def test_stop_strings_of_one_request_are_its_own(engine):
    free = engine.generate([ask("what?", max_new_tokens=30)])[0]
    stop = free.text[3:5]
    stopped, other = finish(
        scheduler_of(engine), ask("what?", max_new_tokens=30, stop=[stop]), ask("what?", max_new_tokens=30)
    )
    assert stopped.finish_reason == "stop" and stopped.text.text == free.text[: free.text.index(stop)].strip()
    assert other.text.text == free.text
