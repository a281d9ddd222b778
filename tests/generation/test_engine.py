"""Generation: batches, sampling, stopping, conversations. Letters: V vocabulary, T tokens, B rows."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from minillava.chat.messages import Message
from minillava.chat.prompt import render
from minillava.config import ChatConfig, DecoderConfig
from minillava.errors import UserError
from minillava.generation.answer import AnswerText
from minillava.generation.conversation import Conversation
from minillava.generation.engine import Engine, Request
from minillava.generation.sampling import ARGMAX, CUT, WHOLE, Sampler, Sampling
from minillava.generation.scheduler import Scheduler
from minillava.generation.slots import Slots
from minillava.layers.cache import KVCache
from minillava.media.visual import media
from minillava.processor import user_message


@pytest.fixture
def engine(tiny_model, tiny_tokenizer):
    return Engine(tiny_model, tiny_tokenizer)


def pixels(seed):
    return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed))


def request(text="what color is the circle?", images=(), **options):
    return Request([user_message(ChatConfig(), text, media(images))], media(images), **options)


def mixed_requests():
    """Eight rows that differ in everything: prompt, pictures, length, sampling."""
    texts = ["what?", "what color is the large circle?", "is the circle red? is it green? is it blue?", "red"]
    shared = pixels(100)
    requests = []
    for i in range(8):
        images = [shared, pixels(i)][: i % 3]
        sampling = Sampling(temperature=0.0 if i % 2 else 0.8 + i / 10, top_p=1 - i / 20, top_k=5 * (i % 3), seed=i)
        requests.append(request(texts[i % 4], images, max_new_tokens=[3, 5, 9, 20][(i * 3) % 4], sampling=sampling))
    return requests


# ---- batches ----


def test_a_batch_equals_its_rows_alone(engine):
    together = engine.generate(mixed_requests())
    alone = [engine.generate([r])[0] for r in mixed_requests()]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert [a.text for a in together] == [a.text for a in alone]
    assert [a.finish_reason for a in together] == [a.finish_reason for a in alone]
    assert len({tuple(a.token_ids) for a in together}) == 8, "the rows are too alike to prove anything"


def test_rows_that_stop_early_change_nothing_for_the_others(engine):
    """Rows leave at different steps, and the gaps are filled by rows from the end."""
    requests = mixed_requests()
    longest = [dataclasses.replace(r, max_new_tokens=20) for r in requests]
    for short, long in zip(engine.generate(requests), engine.generate(longest)):
        assert long.token_ids[: len(short.token_ids)] == short.token_ids


def test_waiting_rows_take_the_slots_of_those_that_left(engine, monkeypatch):
    """Three slots for eight rows, or one; prompts prefilled in pieces of 7 tokens; tokens read a step late."""
    expected = [a.token_ids for a in engine.generate(mixed_requests())]
    made, new_slots = [], engine.new_slots

    def watched(rows, capacity):
        made.append(new_slots(rows, capacity))
        made[-1].lag = lag
        return made[-1]

    monkeypatch.setattr(engine, "new_slots", watched)
    for bound, value, rows in (("MAX_ROWS", 3, 3), ("CACHE_BYTES", 1, 1), ("PREFILL_TOKENS", 7, 8)):
        for lag in (0, 1, 2):
            with monkeypatch.context() as patch:
                patch.setattr(f"minillava.generation.engine.{bound}", value)
                engine._idle = None
                assert [a.token_ids for a in engine.generate(mixed_requests())] == expected, (bound, lag)
            assert made[-1].rows == rows


def test_a_picture_asked_ten_questions_is_seen_once(engine):
    picture = pixels(0)
    engine.generate([request(f"what {i}?", [picture], max_new_tokens=2) for i in range(10)])
    assert engine.pictures_seen == 1


def test_a_cache_refuses_what_does_not_fit():
    cache = KVCache(DecoderConfig(num_layers=1, num_kv_heads=1, head_dim=2), 2, 3, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="4 new tokens do not fit slot 1 with 0 of 3"):
        cache.begin(6, [0, 2, 6])
    with pytest.raises(ValueError, match="do not fit slot 2"):
        cache.begin(2, [0, 2], [2])


# ---- stopping ----


def test_stops_at_eos(engine):
    engine.eos_ids = frozenset()
    (long,) = engine.generate([request(max_new_tokens=12)])
    assert long.finish_reason == "length" and len(long.token_ids) == 12
    eos = long.token_ids[7]
    expected = long.token_ids[: long.token_ids.index(eos) + 1]
    engine.eos_ids = frozenset([eos])
    (short,) = engine.generate([request(max_new_tokens=12)])
    assert short.finish_reason == "stop" and short.token_ids == expected
    assert short.text == engine.tokenizer.decode(expected[:-1]).strip()


def test_stops_at_the_end_of_the_context(engine):
    context = engine.config.decoder.max_positions
    (answer,) = engine.generate([Request(prompt_ids=[5] * (context - 3), max_new_tokens=50)])
    assert answer.finish_reason == "length" and len(answer.token_ids) == 3
    with pytest.raises(UserError, match=rf"the prompt is {context} tokens .* context of {context}"):
        engine.generate([Request(prompt_ids=[5] * context)])


def test_stops_at_a_stop_string(engine):
    """The text ends before the first stop string, wherever token boundaries lie, and no part of one is shown."""
    engine.eos_ids = frozenset()
    (free,) = engine.generate([request(max_new_tokens=30)])
    assert len(free.text) > 8
    stop = free.text[4:6]
    engine.stops = (stop, "never")
    shown = []
    (answer,) = engine.generate([request(max_new_tokens=30)], lambda _, piece: shown.append(piece))
    assert answer.text == free.text[: free.text.index(stop)].strip() == "".join(shown)
    assert answer.finish_reason == "stop"
    assert answer.token_ids == free.token_ids[: len(answer.token_ids)]


def test_the_templates_stop_string_counts(tiny_model, tiny_tokenizer, monkeypatch):
    chat = dataclasses.replace(tiny_model.config.chat, template="llava_v0", stop_strings=("mine",))
    monkeypatch.setattr(tiny_model, "config", dataclasses.replace(tiny_model.config, chat=chat))
    assert set(Engine(tiny_model, tiny_tokenizer).stops) == {"mine", "###"}


def test_text_that_may_become_a_stop_string_is_held_back(tiny_tokenizer):
    def settled(pieces, stops, strip=True):
        """What comes out as pieces of text come, in place of ids; None is their end."""
        text = AnswerText(tiny_tokenizer, stops, strip)
        text.stream = SimpleNamespace(push=lambda piece: piece or "")
        return [text.push(piece) for piece in pieces], text.stopped

    pieces, stopped = settled(["  a", " ##", "b  ", "#", "#", "#c", None], ["###", "User:"])
    assert pieces == ["a", "", " ##b", "", "", "", ""] and stopped
    assert settled(["\n", "User", ":"], ["\nUser:"]) == (["", "", ""], True)
    assert settled([" a #", None], ["###"], strip=False) == ([" a ", "#"], False)
    assert settled([" a #", " ", None], ["###"]) == (["a", " #", ""], False)


def test_streamed_text_is_the_answer(engine):
    shown = [""] * 8

    def hear(index, piece):
        shown[index] += piece

    answers = engine.generate(mixed_requests(), hear)
    assert shown == [a.text for a in answers] == [engine.tokenizer.decode(a.token_ids).strip() for a in answers]
    row = engine.row(0, request(max_new_tokens=1), {})
    assert {id(said) for said, _ in engine.stream([row])} <= {id(row)} and row.finish_reason


# ---- sampling ----


def test_sampling_follows_its_seed(engine):
    def ask(seed, limit=16):
        return engine.generate([request(max_new_tokens=limit, sampling=Sampling(1.0, seed=seed))])[0].token_ids

    assert ask(1) == ask(1) != ask(2)
    assert ask(1, limit=40)[:16] == ask(1), "a longer limit must not change the first tokens"


def test_sampling_draws_from_the_distribution():
    """4,000 rows of one distribution: frequencies are right, top-p and top-k keep exactly the tokens they should."""
    p_V = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    logits_BV = p_V.log().expand(4000, 5)

    def frequencies(**options):
        sampler = Sampler(4000, 1, torch.device("cpu"))
        for seed in range(4000):
            sampler.enter(seed, Sampling(seed=seed, **options), 1)
        tokens_B = sampler(logits_BV, slice(0, 4000), {ARGMAX, WHOLE, CUT})
        return torch.bincount(tokens_B, minlength=5) / 4000

    def expected(keep, temperature=1.0):
        kept_V = torch.zeros(5).index_fill(0, torch.tensor(keep), 1.0) * p_V ** (1 / temperature)
        return kept_V / kept_V.sum()

    cases = [
        (dict(temperature=1.0), expected([0, 1, 2, 3, 4])),
        (dict(temperature=2.0), expected([0, 1, 2, 3, 4], 2.0)),
        (dict(temperature=1.0, top_k=2), expected([1, 3])),
        (dict(temperature=1.0, top_p=0.75), expected([1, 3, 2])),
        (dict(temperature=1.0, top_p=0.65), expected([1, 3])),
        (dict(temperature=1.0, top_p=1e-6), expected([1])),
        (dict(temperature=0.5, top_k=3, top_p=0.9), expected([1, 3], 0.5)),
    ]
    for options, wanted_V in cases:
        found_V = frequencies(**options)
        assert ((found_V == 0) == (wanted_V == 0)).all(), options
        assert (found_V - wanted_V).abs().max() < 4 * (0.25 / 4000) ** 0.5, options  # four standard deviations


def test_temperature_near_zero_is_greedy(engine):
    cold = [request(max_new_tokens=12, sampling=Sampling(temperature=t)) for t in (1e-5, 1e-38, 1e-46, 1e-100)]
    first, *others = engine.generate([request(max_new_tokens=12), *cold])
    assert all(first.token_ids == other.token_ids for other in others)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=-1.0),
        dict(temperature=float("nan")),
        dict(temperature=1e39),
        dict(top_p=0.0),
        dict(top_p=1.5),
        dict(top_k=-1),
        dict(top_k=2**63),
        dict(repetition_penalty=1e39),
    ],
)
def test_sampling_out_of_range_is_refused(engine, options):
    with pytest.raises(UserError, match=next(iter(options))):
        engine.generate([request(sampling=Sampling(**options))])


# ---- requests ----


def test_bad_requests_are_named(engine):
    with pytest.raises(UserError, match=r"^max_new_tokens is 0"):
        engine.generate([request(max_new_tokens=0)])
    with pytest.raises(UserError, match=r"^question 7: 2 '<image>' in the text, but 1 pictures"):
        engine.generate([Request([Message("user", "<image> or <image>?")], media([pixels(0)]), name="question 7")])
    marker = engine.config.chat.image_token_id
    with pytest.raises(UserError, match="hold 3 image placeholders, the pictures make 4"):
        engine.generate([Request(prompt_ids=[5, marker, marker, marker, 6], media=media([pixels(0)]))])


def test_raw_and_ids_are_taken_as_they_are(engine):
    ids = engine.row(0, request(images=[pixels(0)]), {}).ids
    messages = [Message("user", "<image>\nwhat color is the circle?")]
    prompt = "".join(text for text, _ in render(engine.config.chat, engine.tokenizer, messages, generate=True))
    raw = Request(raw=prompt, media=media([pixels(0)]), max_new_tokens=8)
    given = Request(prompt_ids=ids, media=media([pixels(0)]), max_new_tokens=8)
    first, second = engine.generate([raw, given])
    assert first.token_ids == second.token_ids and first.prompt_tokens == second.prompt_tokens == len(ids)
    assert first.image_tokens == 4


# ---- conversations ----


def test_a_second_turn_equals_a_run_from_scratch(engine):
    picture = pixels(3)
    conversation = Conversation(engine, media([picture]))
    sampling = Sampling(temperature=0.7, seed=5)
    messages = []
    for turn, question in enumerate(["what color is it?", "and the large circle?", "why?"]):
        messages.append(user_message(ChatConfig(), question, media([picture] if turn == 0 else [])))
        answer = conversation.ask(question, sampling, max_new_tokens=6)
        new = conversation.prefilled_tokens
        (scratch,) = engine.generate([Request(list(messages), media([picture]), max_new_tokens=6, sampling=sampling)])
        assert answer.token_ids == scratch.token_ids and answer.prompt_tokens == scratch.prompt_tokens
        assert new == answer.prompt_tokens if turn == 0 else new < answer.prompt_tokens / 2
        messages.append(Message("assistant", answer.text))
    assert engine.pictures_seen == 1 + 3, "once for the conversation, once for each run from scratch"


def test_an_interrupted_turn_leaves_the_conversation_as_it_was(engine):
    def ask(conversation, question):
        return conversation.ask(question, Sampling(), max_new_tokens=6).token_ids

    plain, disturbed = Conversation(engine, media([pixels(3)])), Conversation(engine, media([pixels(3)]))
    assert ask(plain, "what?") == ask(disturbed, "what?")

    def interrupt(index, piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disturbed.ask("red?", Sampling(), 6, interrupt)
    assert ask(plain, "green?") == ask(disturbed, "green?")


# ---- the step ----


def prefilled(engine, requests):
    """Slots with these requests in them, behind their first tokens."""
    opened = {}
    rows = [engine.row(i, r, opened) for i, r in enumerate(requests)]
    with torch.inference_mode():
        slots = engine.new_slots(len(rows), max(len(row.ids) + row.limit for row in rows))
        scheduler = Scheduler(engine, slots, chunk=1 << 14)
        for row in rows:
            scheduler.submit(row)
        scheduler._prefill()
    return slots


def test_a_step_asks_nothing_of_the_host(tiny_model):
    """On meta tensors, which have no values, whatever wants one fails. So the step can be captured as a CUDA graph."""
    model = copy.deepcopy(tiny_model).to("meta", torch.bfloat16)
    model.decoder.fuse()
    slots = Slots(model, 8, 64, torch.bfloat16, frozenset([2]))
    with torch.inference_mode():
        for n in (1, 5, 8):
            slots.step(n, frozenset([ARGMAX, WHOLE, CUT]))
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            slots.tokens_B.tolist()


def test_a_step_leaves_every_tensor_in_its_place(engine):
    """What a captured graph would read and write stays where it was; only values change."""
    slots = prefilled(engine, mixed_requests())

    def places():
        state = (slots.tokens_B, slots.left_B, slots.cache.lengths_B, slots.cache.live_B, *slots.sampler.state)
        return [t.data_ptr() for t in (*state, slots.cache.k_LBSGK, slots.cache.v_LBSGK)]

    before, lengths_B = places(), slots.cache.lengths_B.clone()
    with torch.inference_mode():
        for _ in range(3):
            slots.step(8, frozenset(slots.kinds))
    assert places() == before
    moved_B = slots.cache.lengths_B - lengths_B  # by limits of 3, 5, 9 and 20 tokens, of which one came with the prompt
    assert moved_B.max() == 3 and moved_B.min() <= 2 and not slots.cache.live_B[moved_B < 3].any()


def test_a_rehearsal_changes_nothing(engine, monkeypatch):
    """What precedes a capture, in front of every step of a batch that shrinks: the same answers."""
    expected = [a.token_ids for a in engine.generate(mixed_requests())]
    launch, rehearsed = Slots.launch, []

    def rehearsing(slots, n):
        slots.rehearse(size := min(1 << (n - 1).bit_length(), slots.rows), frozenset(slots.kinds[:size]))
        rehearsed.append(size)
        launch(slots, n)

    monkeypatch.setattr(Slots, "launch", rehearsing)
    assert [a.token_ids for a in engine.generate(mixed_requests())] == expected and set(rehearsed) >= {2, 4, 8}


def test_compiled_steps_give_the_same_tokens(engine):
    """Eight rows, five steps, float32: the step traced as one graph without a break, its changes of state among the
    graph's outputs, and plain. (Code generation for it takes a minute, and does not pay on a CPU: bench/LOG.md.)"""
    torch._dynamo.reset()
    tokens = []
    for compile in (lambda step: step, lambda step: torch.compile(step, fullgraph=True, backend="aot_eager")):
        slots = prefilled(engine, [dataclasses.replace(r, max_new_tokens=20) for r in mixed_requests()])
        slots.step = compile(slots.step)
        with torch.inference_mode():
            for _ in range(5):
                slots.launch(8)
        tokens.append([slots.take() for _ in range(5)])
    assert tokens[0] == tokens[1] and len({tuple(row) for row in zip(*tokens[0])}) == 8


def test_rows_of_a_bf16_batch_are_within_rounding_of_each_alone(tiny_model, tiny_tokenizer):
    """Logits behind the prompts and after four given tokens, against float64: a row is as exact in the batch of eight
    as it is alone, and with fused products as without."""

    def logits(model, requests, fuse=False):
        model = copy.deepcopy(model)
        if fuse:
            model.decoder.fuse()
        engine = Engine(model, tiny_tokenizer)
        slots, out = prefilled(engine, requests), []
        with torch.inference_mode():
            slots.cache.live_B.fill_(True)
            for step in range(4):
                slots.tokens_B.fill_(11 + step)
                out.append(model(slots.tokens_B[:, None], cache=slots.cache).double())
        return torch.stack(out, 1)

    def error(found_BTV):
        return (found_BTV - exact_BTV).pow(2).mean(2).sqrt()

    bf16 = copy.deepcopy(tiny_model).bfloat16()
    requests = [dataclasses.replace(r, max_new_tokens=20) for r in mixed_requests()]
    exact_BTV = logits(copy.deepcopy(bf16).double(), requests)
    alone = error(torch.cat([logits(bf16, [r]) for r in requests]))
    for fuse in (False, True):
        together = error(logits(bf16, requests, fuse))
        assert (together.mean(1) <= 2 * alone.mean(1)).all() and together.mean() <= 1.2 * alone.mean()


def test_bytes_of_a_step(engine):
    """By hand for 3 layers, 32 wide, 4 heads over 2 of 8, 48 inside, float32, 10 tokens held."""
    vocabulary = engine.config.decoder.vocab_size
    layer = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert engine.step_bytes(10) == 4 * (3 * layer + 32 + vocabulary * 32 + 10 * 3 * 2 * 2 * 8)


def test_slots_are_used_again(engine):
    """The second batch takes the first one's slots, a longer one gets new ones; what was in them does not matter."""
    first = [a.token_ids for a in engine.generate(mixed_requests())]
    slots = engine._idle
    assert [a.token_ids for a in engine.generate(mixed_requests()[:5])] == first[:5] and engine._idle is slots
    stream = engine.stream([engine.row(0, mixed_requests()[0], {})])
    next(stream)  # holds the slots until it ends
    assert [a.token_ids for a in engine.generate(mixed_requests())] == first and engine._idle is not slots
    stream.close()


def test_a_row_that_does_not_fit_the_callers_slots_is_refused(engine):
    """Its tokens would go on in the next slot."""
    rows = [engine.row(i, request(max_new_tokens=limit), {}) for i, limit in enumerate((30, 3))]
    own = engine.new_slots(2, len(rows[1].ids) + 3)
    with pytest.raises(ValueError, match=f"does not fit a slot of {own.capacity} tokens"):
        next(engine.stream(rows, own))


@pytest.mark.parametrize("needs", ["a penalty", "a grammar"])
def test_steps_captured_without_a_mask_are_captured_again(engine, needs):
    """A graph has the tensors that were there when it was captured, as these stand-ins do; plain steps look them up."""

    class Odd:
        """Every other token."""

        def allowed(self):
            return torch.arange(engine.config.decoder.vocab_size) % 2 == 1

        def advance(self, id):
            pass

    def capture(n, kinds):
        then = {name: getattr(slots, name) for name in ("allowed_BV", "seen_BV")}

        def replay():
            now = {name: getattr(slots, name) for name in then}
            vars(slots).update(then)
            slots.step(n, kinds)
            vars(slots).update(now)

        slots.graphs[n, kinds] = SimpleNamespace(replay=replay), None
        return slots.graphs[n, kinds]

    plain, bound = request(max_new_tokens=12), request("is it red?", max_new_tokens=12)
    if needs == "a penalty":
        bound = dataclasses.replace(bound, sampling=Sampling(repetition_penalty=3.0))
    else:
        bound = dataclasses.replace(bound, grammar=Odd())
    expected = [a.token_ids for a in engine.generate([plain, bound])]
    assert expected[1] != engine.generate([plain, request("is it red?", max_new_tokens=12)])[1].token_ids
    engine._idle, slots = None, engine.new_slots(2, 256)
    slots.captured, slots._capture, engine._idle = True, capture, slots
    engine.generate([plain, plain])
    assert slots.graphs and [a.token_ids for a in engine.generate([plain, bound])] == expected
    assert engine._idle is slots


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph: needs a GPU")
def test_captured_steps_give_the_same_tokens(tiny_model, tiny_tokenizer):
    """On a GPU, float32: graphs replayed with tokens read a step late, and the same steps run plainly."""
    engine = Engine(copy.deepcopy(tiny_model).cuda(), tiny_tokenizer)
    captured = [a.token_ids for a in engine.generate(mixed_requests())]
    graphs, slots = len(engine._idle.graphs), engine._idle
    assert graphs > 1, "a batch that shrinks needs several"
    assert [a.token_ids for a in engine.generate(mixed_requests())] == captured
    assert engine._idle is slots and len(slots.graphs) == graphs, "the second batch captures nothing"
    slots._capture = lambda n, kinds: (SimpleNamespace(replay=lambda: slots.step(n, kinds)), None)
    slots.graphs.clear()
    assert [a.token_ids for a in engine.generate(mixed_requests())] == captured
