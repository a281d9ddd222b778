"""Hopper's copies of whole tiles: tensor maps, the tensor memory accelerator, and barriers in shared memory.

A tensor map is 128 bytes that nobody looks into but the accelerator; here they are a record of their fields. Loads
arrive as late as they can, that is when no thread can go on without, and stores read shared memory and write global
memory when somebody waits for it; or at once, if the schedule says so.
"""

import re
from dataclasses import dataclass

import numpy as np

from .block import Part, instruction

MAP = np.dtype({"names": ["global_address", "global_stride", "global_dim", "box_dim", "element_stride", "rank",
                          "elemtype", "swizzle_mode", "interleave_layout", "fill_mode", "size"],
                "formats": ["u8", ("u8", 4), ("u4", 5), ("u4", 5), ("u4", 5), "u4", "u1", "u1", "u1", "u1", "u4"],
                "itemsize": 128})  # fmt: skip
SIZES = {6: 2, 7: 4, 10: 2}  # elemtype -> bytes: f16, f32, bf16
SPANS = {0: 16, 1: 32, 2: 64, 3: 128}  # swizzle_mode -> bytes of a row that chunks of 16 bytes are shuffled in


@instruction(r"tensormap\.replace\.tile\.(\w+)\.shared::cta\.b1024\.b(32|64)")
def _replace(block, operands, field, bits):
    """Set a field of the map at an address, or one of its numbers."""
    where, *index, value = operands
    address, value = block.address(where), block.read(value, f"u{bits}")
    assert field in MAP.names

    def run(on):
        for thread in np.flatnonzero(on):
            at = int(address()[thread])
            block.shared.check(np.array([at]), 128, "tensormap.replace")
            record = block.shared.bytes[at : at + 128].view(MAP)
            number = np.broadcast_to(value, block.threads)[thread]
            if index:
                record[field][0, int(index[0], 0)] = number
            else:
                record[field] = number

    return run


class Maps(Part):
    """Tensor maps in global memory that were written and not yet acquired."""

    def reset(self) -> None:
        self.written: set[int] = set()

    def at(self, address: int):
        """The map at an address."""
        assert address not in self.written, "a tensor map is used that was written and not acquired"
        self.block.memory.check(np.array([address]), 128, "tensor map")
        return self.block.memory.bytes[address : address + 128].view(MAP)[0]


@instruction(
    r"tensormap\.cp_fenceproxy\.global\.shared::cta\.tensormap::generic\.release\.gpu\.sync\.aligned", needs=32
)
def _publish(block, operands):
    """A map from shared to global memory."""
    to, of, size = operands
    to, of, maps = block.address(to), block.address(of), block.part(Maps)
    assert int(size, 0) == 128

    def run(on):
        for thread in np.flatnonzero(on)[::32]:
            target, source = int(to()[thread]), int(of()[thread])
            block.memory.check(np.array([target]), 128, "cp_fenceproxy")
            block.memory.bytes[target : target + 128] = block.shared.bytes[source : source + 128]
            maps.written.add(target)

    return run


@instruction(r"fence\.proxy\.tensormap::generic\.acquire\.gpu")
def _acquire(block, operands):
    address, maps = block.address(operands[0]), block.part(Maps)
    return lambda on: maps.written.difference_update(address()[on].tolist())


@instruction(r"fence\.proxy\.async(?:\.shared::cta)?")
def _fence(block, operands):
    """What threads wrote is seen by the accelerator and the tensor cores."""

    def run(on):
        block.shared.unfenced[:] = False

    return run


# -- barriers in shared memory -----------------------------------------------------------------------------------------


@dataclass
class Barrier:
    """A phase is over when all have arrived and all bytes have."""

    count: int
    missing: int
    bytes: int = 0
    phase: int = 0


class Barriers(Part):
    """By address, and who waits."""

    def reset(self) -> None:
        self.all: dict[int, Barrier] = {}
        self.waiting: dict[int, list[np.ndarray]] = {}

    def at(self, address: int) -> Barrier:
        """The barrier at an address."""
        assert address in self.all, f"no barrier at {address} of shared memory"
        return self.all[address]

    def look(self, address: int) -> None:
        """Whether a phase is over now; then those who waited for it go on."""
        barrier = self.at(address)
        assert barrier.missing >= 0, f"more arrivals at barrier {address} than the {barrier.count} it is for"
        if barrier.missing or barrier.bytes:
            return
        barrier.phase, barrier.missing = barrier.phase + 1, barrier.count
        for threads in self.waiting.pop(address, []):
            self.block.waiting &= ~threads


@instruction(r"mbarrier\.init\.shared(?:::cta)?\.b64")
def _init(block, operands):
    address, count, barriers = block.address(operands[0]), int(operands[1]), block.part(Barriers)

    def run(on):
        for at in address()[on].tolist():
            block.shared.check(np.array([at]), 8, "mbarrier.init")
            barriers.all[at] = Barrier(count, count)

    return run


@instruction(r"mbarrier\.inval\.shared(?:::cta)?\.b64")
def _invalidate(block, operands):
    address, barriers = block.address(operands[0]), block.part(Barriers)

    def run(on):
        for at in address()[on].tolist():
            barriers.at(at)
            assert at not in barriers.waiting, "a barrier ends for which somebody waits"
            del barriers.all[at]

    return run


@instruction(r"mbarrier\.arrive(\.expect_tx)?\.shared(?:::cta)?\.b64")
def _arrive(block, operands, expects):
    """Once, and more bytes are to come; or as often as the last operand says."""
    nobody, where, *number = operands
    assert nobody == "_", "states of barriers are not known"
    address, number, barriers = block.address(where), int(number[0], 0) if number else 1, block.part(Barriers)

    def run(on):
        for at in address()[on].tolist():
            barrier = barriers.at(at)
            barrier.bytes += number if expects else 0
            barrier.missing -= 1 if expects else number
            barriers.look(at)

    return run


@instruction(r"mbarrier\.try_wait\.parity\.shared(?:::cta)?\.b64")
def _wait(block, operands):
    """True once the phase of that parity is over: until then threads do not come back."""
    out, where, parity = operands
    put, address, parity = block.write(out, "pred"), block.address(where), block.read(parity, "u32")
    barriers = block.part(Barriers)

    def run(on):
        stay, places, wanted = np.zeros(block.threads, bool), address(), np.broadcast_to(parity & 1, block.threads)
        for at in np.unique(places[on]).tolist():
            phase = barriers.at(at).phase & 1
            late = on & (places == at) & (wanted == phase)
            if late.any():
                barriers.waiting.setdefault(at, []).append(late)
                stay |= late
        block.waiting |= stay
        put(True, on & ~stay)
        return stay

    return run


# -- the accelerator ---------------------------------------------------------------------------------------------------


@dataclass
class Box:
    """A tile [rows, columns] of a tensor: its numbers' addresses in global and shared memory, and which exist."""

    size: int  # bytes of a number
    far: np.ndarray
    near: np.ndarray
    inside: np.ndarray

    @staticmethod
    def of(record, column: int, row: int, address: int) -> "Box":
        """The tile of a tensor map from (row, column) on, at an address of shared memory."""
        assert int(record["elemtype"]) in SIZES, f"tensor maps of type {record['elemtype']} are not known"
        size, stride = SIZES[int(record["elemtype"])], int(record["global_stride"][0])
        columns, rows = (int(n) for n in record["box_dim"][:2])
        span = SPANS[int(record["swizzle_mode"])]
        assert record["rank"] == 1, "only tensors of two dimensions are known"
        assert not record["interleave_layout"] and not record["fill_mode"] and (record["element_stride"][:2] == 1).all()
        assert not (record["global_address"] % 16 or stride % 16 or columns * size % 16), "16 bytes are the unit"
        assert columns <= 256 and rows <= 256 and not address % 128
        assert span == 16 or columns * size <= span, "the tile is wider than what is shuffled"
        r, c = np.arange(rows)[:, None], np.arange(columns)[None, :]
        inside = (row + r >= 0) & (row + r < record["global_dim"][1])
        inside = inside & (column + c >= 0) & (column + c < record["global_dim"][0])
        near = address + (r * columns + c) * size
        near = near ^ (near >> 7 & (span // 16 - 1)) << 4
        far = int(record["global_address"]) + (row + r) * stride + (column + c) * size
        return Box(size, np.where(inside, far, 0), near, inside)

    @property
    def kind(self) -> str:
        return f"u{8 * self.size}"


@dataclass
class Store:
    """A tile on its way to global memory."""

    block: object
    box: Box
    adds: bool
    numbers: np.ndarray | None = None

    def read(self) -> None:
        """Take the numbers from shared memory, which may change from then on."""
        if self.numbers is None:
            shared, at = self.block.shared, self.box.near
            shared.check(at.reshape(-1), self.box.size, "store of a tile")
            assert not shared.unfenced[at // 16].any(), "a tile is stored that threads wrote before a fence.proxy.async"
            self.numbers = shared.view(self.box.kind)[at // self.box.size]

    def write(self) -> None:
        """Put them into global memory, or add them to what is there."""
        self.read()
        memory, at = self.block.memory, self.box.far[self.box.inside]
        memory.check(at, self.box.size, "store of a tile")
        if self.adds:
            memory.view("f32")[at // 4] += self.numbers[self.box.inside].view(np.float32)
        else:
            memory.view(self.box.kind)[at // self.box.size] = self.numbers[self.box.inside]


class Tiles(Part):
    """Loads on their way; stores of each thread in groups, the last of which is open."""

    def reset(self) -> None:
        self.loads: list = []
        self.stores: dict[int, list[list[Store]]] = {}

    def hurry(self) -> bool:
        """One load arrives."""
        if not self.loads:
            return False
        self.loads.pop(self.block.schedule.choose(len(self.loads)))()
        return True

    def finish(self) -> None:
        """Stores arrive, waited for or not; a load may not outlive the memory that it is for."""
        assert not self.loads, "a program ends while tiles are on their way to it"
        for thread in self.stores:
            self.wait(thread, -1, reads=False)

    def wait(self, thread: int, pending: int, reads: bool) -> None:
        """All but the last `pending` closed groups have been read, or are done."""
        groups = self.stores.get(thread, [[]])
        due = max(len(groups) - 1 - pending, 0)
        for store in (store for group in groups[:due] for store in group):
            store.read() if reads else store.write()
        if not reads:
            del groups[:due]


def _tile(block, text: str):
    """[map, {column, row}] -> a function (thread, address in shared memory) that gives the box."""
    found = re.fullmatch(r"\[\s*([%\w]+)\s*,\s*\{([^}]*)\}\s*\]", text)
    map_, maps = block.read(found[1], "u64"), block.part(Maps)
    column, row = (block.read(name.strip(), "s32") for name in found[2].split(","))

    def box(thread, address):
        places = (int(np.broadcast_to(x, block.threads)[thread]) for x in (column, row))
        return Box.of(maps.at(int(map_[thread])), *places, address)

    return box


@instruction(r"cp\.async\.bulk\.tensor\.2d\.shared::(?:cta|cluster)\.global\.mbarrier::complete_tx::bytes")
def _load_tile(block, operands):
    """A tile with zeros where the tensor ends; its bytes count for a barrier."""
    to, tile, bell = operands
    to, box, bell = block.address(to), _tile(block, tile), block.address(bell)
    tiles, barriers = block.part(Tiles), block.part(Barriers)

    def run(on):
        for thread in np.flatnonzero(on):
            at, found = int(bell()[thread]), box(thread, int(to()[thread]))
            barriers.at(at)

            def arrive(at=at, box=found):
                block.shared.check(box.near.reshape(-1), box.size, "load of a tile")
                block.memory.check(box.far[box.inside], box.size, "load of a tile")
                numbers = block.memory.view(box.kind)[box.far // box.size]
                block.shared.view(box.kind)[box.near // box.size] = np.where(box.inside, numbers, 0)
                block.shared.unfenced[box.near // 16] = False
                barriers.at(at).bytes -= box.near.size * box.size
                barriers.look(at)

            if block.schedule.at_once():
                arrive()
            else:
                tiles.loads.append(arrive)

    return run


@instruction(r"cp\.(async|reduce\.async)\.bulk\.tensor\.2d\.global\.shared::cta(\.add)?\.bulk_group")
def _store_tile(block, operands, name, adds):
    tile, of = operands
    box, of, tiles = _tile(block, tile), block.address(of), block.part(Tiles)
    assert bool(adds) == (name == "reduce.async")

    def run(on):
        for thread in np.flatnonzero(on):
            store = Store(block, box(thread, int(of()[thread])), bool(adds))
            assert not adds or store.box.size == 4, "sums are known in fp32"
            tiles.stores.setdefault(int(thread), [[]])[-1].append(store)
            if block.schedule.at_once():
                store.read()

    return run


@instruction(r"cp\.async\.bulk\.commit_group")
def _close_group(block, operands):
    tiles = block.part(Tiles)

    def run(on):
        for thread in np.flatnonzero(on).tolist():
            if thread in tiles.stores:
                tiles.stores[thread].append([])

    return run


@instruction(r"cp\.async\.bulk\.wait_group(\.read)?")
def _wait_for_groups(block, operands, reads):
    tiles, pending = block.part(Tiles), int(operands[0])

    def run(on):
        for thread in np.flatnonzero(on).tolist():
            tiles.wait(thread, pending, bool(reads))

    return run
