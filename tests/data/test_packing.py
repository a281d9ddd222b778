"""Rows of a token budget: every sample once, little left empty, and the same rows however a run gets to them."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.train_made import text_tokens
from minillava.data.packing import Order, pack_rows
from minillava.errors import UserError


def like_llava(count, seed=0):
    """Lengths as in LLaVA-1.5's 665K: 576 visual tokens, about 45 of the template, and a text; all cut at 2048."""
    return np.array([min(text + 621 * seen, 2048) for text, seen in text_tokens(count, seed)])


@pytest.mark.parametrize("row_tokens", [4096, 8192, 16384, 32768])
def test_little_of_a_row_is_empty_on_lengths_like_llavas(row_tokens):
    lengths = like_llava(20_000)
    order = Order(len(lengths), 16, row_tokens=row_tokens, lengths=lengths)
    rows = order.epoch(0)[1]
    assert sum(lengths) / ((len(rows) - 1) * row_tokens) >= 0.97
    assert order.empty() == pytest.approx(1 - sum(lengths) / ((len(rows) - 1) * row_tokens))
    assert order.empty() < 0.005  # what is measured is a tenth of that, but for the last row


def test_every_sample_is_in_one_row_and_no_row_is_too_long():
    rng = np.random.default_rng(1)
    for trial in range(200):
        lengths = rng.integers(1, 100, rng.integers(1, 300)).tolist()
        rows = pack_rows(lengths, 100 + trial)
        assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= 100 + trial for row in rows)


def test_a_row_takes_the_best_set():
    """Against every subset of what is behind the first."""
    rng = np.random.default_rng(2)
    for _ in range(60):
        lengths = rng.integers(5, 60, 9).tolist()
        first = pack_rows(lengths, 120)[0]
        sets = (set(s) for n in range(9) for s in itertools.combinations(range(1, 9), n))
        sums = (lengths[0] + sum(lengths[i] for i in s) for s in sets)
        assert 0 in first and sum(lengths[i] for i in first) == max(n for n in sums if n <= 120)
    with pytest.raises(UserError, match="a sample of 121 tokens does not fit a row of 120; raise row_tokens"):
        pack_rows([7, 121], 120)


def test_every_epoch_is_another_permutation():
    order = Order(10, 4, seed=3)
    assert order.num_steps(1) == 3 and order.num_steps(2.5) == 8 and order.num_steps(0.1) == 1
    epochs = [[list(itertools.chain(*order.rows(step))) for step in range(3 * e, 3 * e + 3)] for e in range(3)]
    assert all(sorted(itertools.chain(*epoch)) == list(range(10)) for epoch in epochs)
    assert [len(batch) for batch in epochs[0]] == [4, 4, 2]
    assert epochs[0] != epochs[1] != epochs[2]
    assert Order(10, 4, seed=3).rows(7) == [[i] for i in epochs[2][1]]  # straight to a step, as after a resume
    assert Order(10, 4, seed=4).rows(0) != order.rows(0)
    assert order.position(7) == (2, 1)
    with pytest.raises(UserError, match="batches of 4 from 0 samples"):
        Order(0, 4)


@pytest.mark.parametrize("row_tokens", [0, 5000])
@pytest.mark.parametrize(("ranks", "micro"), [(1, 0), (1, 2), (2, 1), (4, 2), (3, 2)])
def test_ranks_and_micro_batches_share_out_one_order(row_tokens, ranks, micro):
    """The same rows in every step, each once, whoever takes them; and straight to any of them."""
    lengths = like_llava(401)
    common = {"batch_size": 8, "seed": 5, "row_tokens": row_tokens, "lengths": lengths}
    whole = Order(401, **common)
    shares = [Order(401, micro=micro, rank=rank, ranks=ranks, **common) for rank in range(ranks)]
    parts = shares[0].parts
    steps = whole.num_steps(3)
    assert parts == -(-8 // ((micro or 8) * ranks))
    seen = []
    for step in range(steps):
        taken = [row for k in range(step * parts, (step + 1) * parts) for share in shares for row in share.rows(k)]
        assert sorted(taken) == sorted(whole.rows(step))
        assert all(share.position(step * parts + parts - 1) == whole.position(step) for share in shares)
        seen += itertools.chain(*taken)
    for epoch in range(3):
        assert sorted(seen[401 * epoch : 401 * (epoch + 1)]) == list(range(401))
    fresh = Order(401, micro=micro, rank=ranks - 1, ranks=ranks, **common)
    assert fresh.rows((steps - 2) * parts) == shares[-1].rows((steps - 2) * parts)
