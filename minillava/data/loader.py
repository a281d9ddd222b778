"""Batches for training: in a fixed order, prepared ahead, with unreadable samples replaced and counted.

What batch number k holds depends on the seed and on k alone, not on workers or on where a run was resumed, so the
state of the data is the number of the next step and the `Tally`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from minillava.data.batch import Batch
from minillava.data.dataset import Dataset, ignore_interrupts
from minillava.data.packing import Order
from minillava.errors import UserError

MAX_LOST = 0.01  # share of the samples that may be unusable
EARLY_LOST, EARLY_COUNT = 0.02, 20  # share of the draws that stops a run sooner, once so many samples are lost: at a
# true 1 % that is 3.7 standard deviations away, while a disk that fails is found after a few batches


@dataclass
class Tally:
    """What the data cost so far. Part of a run's checkpoint."""

    count: int  # samples in the data
    drawn: int = 0
    lost_draws: int = 0
    lost: dict[int, str] = field(default_factory=dict)  # index -> why, each sample once
    cut_rows: int = 0
    cut_tokens: int = 0

    def add(self, batch: Batch) -> None:
        """Raises UserError once over 1 % of the samples were lost (one always may be), or EARLY_LOST of the draws."""
        self.drawn += batch.samples + len(batch.lost)
        self.lost_draws += len(batch.lost)
        self.lost.update(batch.lost)
        self.cut_rows += batch.cut_rows
        self.cut_tokens += batch.cut_tokens
        of_data = len(self.lost) > max(1, MAX_LOST * self.count)
        of_draws = len(self.lost) >= EARLY_COUNT and self.lost_draws > EARLY_LOST * self.drawn
        if batch.lost and (of_data or of_draws):
            raise UserError(
                f"{batch.lost[-1][1]} (so far {len(self.lost)} of {self.count} samples could not be used, in "
                f"{self.lost_draws} of {self.drawn} draws: more than {MAX_LOST:.0%}, so the run stops)"
            )

    def __str__(self) -> str:
        return (
            f"{self.drawn:,} samples drawn, {len(self.lost):,} different ones unusable and replaced, "
            f"{self.cut_rows:,} cut (by {self.cut_tokens:,} tokens)"
        )

    def state(self) -> dict[str, Any]:
        return {**vars(self), "lost": {str(index): why for index, why in self.lost.items()}}

    def load(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.lost = {int(index): why for index, why in state["lost"].items()}


def background_thread() -> ThreadPoolExecutor:
    """One thread in which PyTorch starts no threads of its own.

    OpenMP counts those of all its teams; once they outnumber the cores, none waits awake for the next operation, and
    the small ones of the main thread take twice as long (Muon's step on two cores: 35 ms, with a second team 75).
    """

    def alone() -> None:
        torch.get_num_threads()  # the first question in a thread sets its number to that of the process
        torch.set_num_threads(1)

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(1, thread_name_prefix="loader", initializer=alone)
    pool.submit(int).result()
    torch.set_num_threads(threads)  # a count for each thread in OpenMP, but one for all in MKL
    return pool


class Loader:
    """Iterates over the batches of steps start to stop (exclusive), prepared ahead of their use.

    `workers` = 0 prepares them in one thread of this process: best on few cores and for small images, and nothing is
    copied. With more, that many processes do. With `ahead` = 0 each is made when it is asked for: the same batches.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        start: int,
        stop: int,
        workers: int = 0,
        ahead: int = 2,
        pin: bool = False,
        tally: Tally | None = None,
    ):
        self.dataset, self.order, self.start, self.stop = dataset, order, start, stop
        self.workers, self.ahead, self.pin = workers, ahead, pin
        self.tally = tally or Tally(len(dataset))

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Batch]:
        if self.workers:
            batches = self._from_processes()
        else:
            batches = self._from_thread() if self.ahead else (self[step] for step in range(self.start, self.stop))
        with contextlib.closing(batches):
            for batch in batches:
                if isinstance(batch, UserError):
                    raise batch
                self.tally.add(batch)
                yield batch

    def __getitem__(self, step: int) -> Batch | UserError:
        """Batch number `step`. An error is a value here: torch would wrap a raised one into a page of traceback."""
        try:
            rows = self.order.rows(step)
            batch = self.dataset.batch([index for row in rows for index in row], self.order.position(step)[0])
        except UserError as error:
            return error
        batch.rows = len(rows)
        return batch

    def _from_thread(self) -> Generator[Batch | UserError, None, None]:
        pool = background_thread()
        pending: deque[Future[Batch | UserError]] = deque()
        steps = iter(range(self.start, self.stop))
        try:
            while True:
                for step in itertools.islice(steps, 1 + self.ahead - len(pending)):
                    pending.append(pool.submit(self.__getitem__, step))
                if not pending:
                    return
                batch = pending.popleft().result()
                yield batch.pin_memory() if self.pin and isinstance(batch, Batch) else batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _from_processes(self) -> Generator[Batch | UserError, None, None]:
        loader: Any = torch.utils.data.DataLoader(
            self,  # type: ignore[arg-type]  # a map from steps to batches
            batch_size=None,
            sampler=range(self.start, self.stop),
            num_workers=self.workers,
            prefetch_factor=self.ahead,
            pin_memory=self.pin,
            worker_init_fn=ignore_interrupts,
        )
        yield from loader
