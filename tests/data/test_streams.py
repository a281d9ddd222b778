"""100,000 rows of parquet: bounded memory, a shuffle by seed that reads each row group once, ranks, resuming."""

import io
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from helpers import talk, tiny_config
from PIL import Image

from minillava.config import DecoderConfig
from minillava.data import columns
from minillava.data.dataset import Dataset
from minillava.data.loader import Loader
from minillava.data.packing import Order
from minillava.data.table import order_of_groups, scan

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

WALK = """
import gc, json, sys, psutil
import numpy as np
from minillava.data import columns
from minillava.data.packing import Order
from minillava.data.table import order_of_groups, scan
columns.CACHE_BYTES = 24 << 20
process = psutil.Process()
before = process.memory_info().rss
samples, _ = scan(sys.argv[1], None)
scanned = process.memory_info().rss
order = Order(len(samples), 1000, 3, **order_of_groups(samples))
seen, sizes, at = np.zeros(len(samples), int), [], []
for step in range(order.steps_in(0)):
    for (index,) in order.rows(step):
        sample = samples[index]
        seen[index] += sample.messages[1].text == str(index) and len(sample.images[0].source) == 2000
        at.append(index)
    sizes.append(process.memory_info().rss)
print(json.dumps([int(seen.min()), int(seen.max()), scanned - before, max(sizes[5:]) - min(sizes[5:]), at[:9000:9]]))
"""


def write(path, count, group, picture=lambda i: b"\xff" * 2000):
    """Rows whose answer is their number, as OneVision-Data has them."""
    schema = None
    writer = None
    for first in range(0, count, group):
        rows = [
            {"image": {"bytes": picture(i), "path": None}, "conversations": talk("<image>\nWhich?", str(i))}
            for i in range(first, min(first + group, count))
        ]
        table = pa.Table.from_pylist(rows, schema)
        writer, schema = writer or pq.ParquetWriter(path, table.schema, compression="none"), table.schema
        writer.write_table(table)
    writer.close()


@pytest.mark.slow
def test_a_hundred_thousand_rows_in_bounded_memory(tmp_path):
    """200 MB of rows; what is kept of the rows after the check, and what walking through them adds."""
    pytest.importorskip("psutil")
    write(tmp_path / "rows.parquet", 100_000, 500, lambda i: (b"%d " % i * 2000)[:2000])
    out = subprocess.run(
        [sys.executable, "-c", WALK, str(tmp_path / "rows.parquet")], capture_output=True, text=True, check=True
    ).stdout
    least, most, kept, growth, drawn = json.loads(out.splitlines()[-1])
    assert least == most == 1  # each row once, with its own text and picture
    assert kept < 120e6 and growth < 50e6, (kept, growth)
    assert len({number // 500 for number in drawn}) > 10 and np.corrcoef(drawn, range(1000))[0, 1] < 0.9  # shuffled


@pytest.fixture
def stream(tmp_path, tiny_tokenizer, monkeypatch):
    """1,200 rows in groups of 50, of which four fit into memory; a function that opens them anew."""

    def picture(i):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (i % 256, i // 256, 7)).save(file, "PNG")
        return file.getvalue()

    write(tmp_path / "a.parquet", 700, 50, picture)
    write(tmp_path / "b.parquet", 500, 50, picture)
    decoder = DecoderConfig(tiny_tokenizer.vocab_size, 32, 64, 1, 2, 2, 16)
    config = tiny_config(tiny_tokenizer, decoder)

    def opened():
        samples, report = scan(str(tmp_path / "*.parquet"), None)
        assert not report.problems
        groups = order_of_groups(samples) | {"window": 4}
        return Dataset(samples, config, tiny_tokenizer, 999), groups

    return opened


def ids_of(batches):
    return [(batch.ids_T.tolist(), float(batch.pixels_NCHW.sum())) for batch in batches]


def test_killed_and_resumed_equals_uninterrupted(stream):
    """Also in processes, and with everything opened anew; over the end of an epoch."""
    data, groups = stream()
    order = Order(len(data), 64, 5, **groups)
    whole = ids_of(Loader(data, order, 0, 25))
    for workers, at in ((0, 7), (2, 13)):
        again, groups = stream()
        assert ids_of(Loader(again, Order(len(again), 64, 5, **groups), at, 25, workers)) == whole[at:]
    assert ids_of(Loader(data, Order(len(data), 64, 6, **groups), 0, 2)) != whole[:2]


def test_two_ranks_see_each_sample_once(stream):
    data, groups = stream()
    seen: Counter[int] = Counter()
    for rank in range(2):
        order = Order(len(data), 64, 5, micro=16, rank=rank, ranks=2, **groups)
        mine = [i for k in range(order.steps_in(0) * order.parts) for row in order.rows(k) for i in row]
        seen.update(mine)
    assert len(seen) == 1200 and set(seen.values()) == {1}


def test_each_group_is_read_about_once(stream, monkeypatch):
    """No more than a window at its border is read twice, with room for two windows' groups."""
    data, groups = stream()
    reads: Counter[object] = Counter()
    get = columns.GroupCache.get

    def counted(self, key, read):
        return get(self, key, lambda: (reads.update([key]), read())[1])

    monkeypatch.setattr(columns.GroupCache, "get", counted)
    monkeypatch.setattr(columns, "CACHE_BYTES", 2 * 4 * data.samples.sources[0].rows.group_bytes() * 3 // 2)
    order = Order(len(data), 64, 5, **groups)
    for k in range(order.steps_in(0)):
        for (index,) in order.rows(k):
            data.samples[index]
    assert len(reads) == 24 and reads.total() <= 24 + 4
