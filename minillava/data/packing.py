"""Which samples share a row of so many tokens, and in which order rows come.

LLaVA's `group_by_modality_length` draws samples of one kind and similar length into a batch, because its batches are
padded to the longest and a text beside pictures would wait for them. Nothing here is padded: rows are packed end to end
and positions restart at every sample, so any mix costs what its tokens cost, and batches keep the mix of the data
(LLaVA's last batch of an epoch is the only mixed one). What unequal lengths still cost is memory, for the longest
micro-batch, and time, while other ranks wait for the fullest: rows of one token budget settle both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from minillava.errors import UserError

POOL = 64  # samples that a row chooses from, at least


def pack_rows(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Each row takes the first sample that is left and, of those behind it, the set that comes nearest to the budget.

    Which sums a set of samples reaches is a subset-sum table, kept as bits of an integer. Returns the samples of each
    row as indices into `lengths`, nearly in their order. Raises UserError for a sample that is longer than the budget.
    """
    longest = max(lengths)
    if longest > budget:
        raise UserError(f"a sample of {longest:,} tokens does not fit a row of {budget:,}; raise row_tokens")
    rows: list[list[int]] = []
    pool: list[int] = []
    coming, pooled = 0, 0  # the next sample for the pool, and the tokens in it
    while coming < len(lengths) or pool:
        while coming < len(lengths) and (len(pool) < POOL or pooled < 4 * budget):
            pool.append(coming)
            pooled += lengths[coming]
            coming += 1
        room = budget - lengths[pool[0]]
        within = (1 << (room + 1)) - 1
        sums = [1]  # after each sample: bit n is set if some of those so far are n tokens together
        for i in pool[1:]:
            sums.append(sums[-1] | (sums[-1] << lengths[i]) & within)
            if sums[-1] >> room:
                break
        total = sums[-1].bit_length() - 1
        row = [pool[0]]
        for at in range(len(sums) - 1, 0, -1):
            if not sums[at - 1] >> total & 1:  # not reached without it
                row.append(pool.pop(at))
                total -= lengths[row[-1]]
        del pool[0]
        pooled -= sum(lengths[i] for i in row)
        rows.append(sorted(row))
    return rows


@dataclass(frozen=True)
class Order:
    """Which samples micro-batch number k of a rank holds; nothing but k has to be known to go on there.

    Every epoch is a permutation keyed by (seed, epoch), cut into rows: one sample each, or as many as fit into
    `row_tokens`. A step takes `batch_size` rows and deals them to the ranks, `micro` at a time, so each rank has
    `parts` micro-batches a step. The last step of an epoch takes what is left over; some of its parts may be empty.
    """

    count: int  # samples
    batch_size: int  # rows a step, of all ranks together
    seed: int = 0
    micro: int = 0  # rows a micro-batch; 0: all of a batch
    rank: int = 0
    ranks: int = 1
    row_tokens: int = 0
    lengths: np.ndarray | None = None  # of all samples, in tokens; needed where row_tokens is set
    groups: np.ndarray | None = None  # of all samples: those of a number are read together (row groups of parquet)
    window: int = 1  # groups whose samples are mixed, where there are groups
    _epoch: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)
    _steps: dict[int, int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch_size < 1:
            raise UserError(
                f"cannot make batches of {self.batch_size} from {self.count} samples; give at least 1 of each"
            )

    @property
    def parts(self) -> int:
        """Micro-batches of a rank in a step."""
        return -(-self.batch_size // ((self.micro or self.batch_size) * self.ranks))

    def steps_in(self, epoch: int) -> int:
        if not self.row_tokens:
            return -(-self.count // self.batch_size)
        if epoch not in self._steps:
            self._steps[epoch] = -(-(len(self.epoch(epoch)[1]) - 1) // self.batch_size)
        return self._steps[epoch]

    def num_steps(self, epochs: float) -> int:
        """Steps of so many epochs; of a broken one, its first share of steps."""
        whole = int(epochs)
        rest = epochs - whole
        steps = sum(map(self.steps_in, range(whole)))
        return steps + (-int(-rest * self.steps_in(whole) // 1) if rest > 1e-9 else 0)

    def position(self, k: int) -> tuple[int, int]:
        """(epoch, steps of it that came before) of micro-batch k."""
        step = k // self.parts
        if not self.row_tokens:
            return divmod(step, self.steps_in(0))
        epoch = 0
        while step >= self.steps_in(epoch):
            step -= self.steps_in(epoch)
            epoch += 1
        return epoch, step

    def rows(self, k: int) -> list[list[int]]:
        """The samples of each row of micro-batch k."""
        epoch, step = self.position(k)
        order, starts = self.epoch(epoch)
        micro = self.micro or self.batch_size
        first = ((k % self.parts) * self.ranks + self.rank) * micro
        last = min(first + micro, self.batch_size, len(starts) - 1 - step * self.batch_size)
        at = step * self.batch_size
        return [order[starts[at + row] : starts[at + row + 1]].tolist() for row in range(first, last)]

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """All samples of an epoch in their order, and where each row begins (and the last ends)."""
        if epoch not in self._epoch:
            order, starts = self._shuffled(np.random.default_rng([self.seed, epoch])), np.arange(self.count + 1)
            if self.row_tokens:
                assert self.lengths is not None
                rows = pack_rows(self.lengths[order].tolist(), self.row_tokens)
                order, starts = np.concatenate([order[row] for row in rows]), np.cumsum([0, *map(len, rows)])
            self._epoch.clear()
            self._epoch[epoch] = order, starts
        return self._epoch[epoch]

    def _shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """All samples in any order; of groups, in any order too, `window` are mixed, and in memory, at a time."""
        if self.groups is None:
            order = np.arange(self.count)
            rng.shuffle(order)
            return order
        places = rng.permutation(int(self.groups.max()) + 1) // self.window
        return np.lexsort((rng.random(self.count), places[self.groups]))

    def empty(self, epoch: int = 0) -> float:
        """Share of the rows' budget that no token uses in an epoch."""
        assert self.lengths is not None
        rows = len(self.epoch(epoch)[1]) - 1
        return 1 - float(self.lengths.sum()) / (rows * self.row_tokens)
