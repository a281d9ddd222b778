"""What requests share: visual tokens of pictures, and keys and values of the prompts and answers that came before.

A picture is known by the hash of its prepared pixels and their layout. A prompt is known in blocks of BLOCK tokens,
each by the hash of all ids and pictures up to its end (chains of hashes as in vLLM, arXiv 2309.06180); they are copied
into the slot of a new request and out of it again, so that a decode step reads one piece of memory a row. Both have a
budget in bytes, and what was used least recently leaves first.
Letters: N blocks, L layers, S tokens of a block, G key/value heads, K head size, T tokens, D width.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from minillava.generation.request import Row
from minillava.layers.cache import KVCache
from minillava.media.visual import Visual

BLOCK = 32  # tokens: of a shared prefix fewer than so many are computed again


class Memory:
    """Pictures and prefixes of one model, for all requests of one `Scheduler`."""

    def __init__(self, placeholders: frozenset[int], cache: KVCache, prefix_bytes: int, picture_bytes: int):
        self.placeholders = placeholders
        self.prefixes = Prefixes(cache, prefix_bytes)
        self.pictures = Pictures(picture_bytes)

    def describe(self, row: Row) -> None:
        """Give a row the keys of its pictures and of the blocks of its prompt; before it enters, on any thread."""
        keys = {id(picture): picture_key(picture) for picture in row.pictures}
        row.picture_keys = [(keys[id(picture)], picture.span.tokens) for picture in row.pictures]
        row.block_keys = list(self.keys(row, row.ids))

    def keys(self, row: Row, ids: Sequence[int]) -> Iterator[bytes]:
        """A key for each whole block of `ids`, which begin with the row's prompt."""
        owners = iter([key for key, tokens in row.picture_keys for _ in range(tokens)])  # of each visual token
        key = b""
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            block = ids[start : start + BLOCK]
            seen = dict.fromkeys([next(owners, b"") for id in block if id in self.placeholders])
            key = blake2b(b"".join([key, array("q", block).tobytes(), *seen]), digest_size=16).digest()
            yield key


def picture_key(visual: Visual) -> bytes:
    """Equal for pictures that tower and projector cannot tell apart."""
    pixels = visual.pixels_NCHW.cpu().contiguous()
    found = blake2b(f"{visual.span} {visual.tags} {pixels.dtype} {tuple(pixels.shape)}".encode(), digest_size=16)
    found.update(pixels.view(torch.uint8).numpy().data)
    return found.digest()


class Pictures:
    """Visual tokens [T, D] by picture, up to `budget` bytes."""

    def __init__(self, budget: int):
        self.budget, self.held_bytes, self.hits = budget, 0, 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, key: bytes) -> Tensor | None:
        """What tower and projector made of this picture, if it is still there."""
        visual_TD = self._kept.get(key)
        if visual_TD is not None:
            self._kept.move_to_end(key)
            self.hits += 1
        return visual_TD

    def put(self, key: bytes, visual_TD: Tensor) -> None:
        """Keep it; those used least recently make room."""
        if key in self._kept or visual_TD.nbytes > self.budget:
            return
        visual_TD = visual_TD.clone() if visual_TD.nbytes < visual_TD.untyped_storage().nbytes() else visual_TD
        self._kept[key] = visual_TD
        self.held_bytes += visual_TD.nbytes
        while self.held_bytes > self.budget:
            self.held_bytes -= self._kept.popitem(last=False)[1].nbytes


class Prefixes:
    """Blocks of keys and values in one pool, up to `budget` bytes of it."""

    def __init__(self, cache: KVCache, budget: int):
        L, _, _, G, K = cache.k_LBSGK.shape
        self.blocks = budget // (2 * L * BLOCK * G * K * cache.k_LBSGK.element_size())
        self.device = cache.k_LBSGK.device
        # What a slot holds, and what the pool does, [N, L, S, G, K].
        self._pools = [(kept, kept.new_zeros(self.blocks, L, BLOCK, G, K)) for kept in (cache.k_LBSGK, cache.v_LBSGK)]
        self._places: OrderedDict[bytes, int] = OrderedDict()  # key: where in the pool
        self._free = list(range(self.blocks))

    def __len__(self) -> int:
        return len(self._places)

    def known(self, keys: Sequence[bytes]) -> int:
        """How many blocks from the first on are there."""
        return next((n for n, key in enumerate(keys) if key not in self._places), len(keys))

    def fill(self, slot: int, keys: Sequence[bytes]) -> None:
        """Copy these blocks, which are there, to the beginning of `slot`."""
        if not keys:
            return
        where_N = torch.tensor([self._places[key] for key in keys], device=self.device)
        self._touch(keys)
        for cache_LBSGK, pool_NLSGK in self._pools:
            room_LNSGK = cache_LBSGK[:, slot, : len(keys) * BLOCK].unflatten(1, (-1, BLOCK))
            room_LNSGK.copy_(pool_NLSGK[where_N].transpose(0, 1))

    def put(self, slot: int, keys: Sequence[bytes]) -> None:
        """Keep the blocks at the beginning of `slot` that are not there; those used least recently make room."""
        keys = keys[: self.blocks]
        self._touch(keys)
        new = [n for n, key in enumerate(keys) if key not in self._places]
        if not new:
            return
        places = [self._free.pop() if self._free else self._places.popitem(last=False)[1] for _ in new]
        where_N, from_N = (torch.tensor(numbers, device=self.device) for numbers in (places, new))
        for cache_LBSGK, pool_NLSGK in self._pools:
            blocks_LNSGK = cache_LBSGK[:, slot, : len(keys) * BLOCK].unflatten(1, (-1, BLOCK))
            pool_NLSGK.index_copy_(0, where_N, blocks_LNSGK.index_select(1, from_N).transpose(0, 1))
        for n, place in reversed(list(zip(new, places))):
            self._places[keys[n]] = place
        self._touch(keys)

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Used now; a block later than those behind it, so that it leaves after them."""
        for key in reversed(keys):
            if key in self._places:
                self._places.move_to_end(key)
