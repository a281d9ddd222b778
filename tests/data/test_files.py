"""Image stores: threads, forked and spawned processes, damaged zips."""

import io
import multiprocessing
import os
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import stored
from PIL import Image

from minillava.data.files import Folder, Zip, open_store
from minillava.errors import UserError

NAMES = [f"{number}.png" for number in range(60)]


def png(number):
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (number, 2 * number, 255 - number)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for number, name in enumerate(NAMES):
            file.writestr(name, png(number))
    return tmp_path / "images.zip"


def reds(store, times=5):
    """The first channel of every picture, read in a scattered order."""
    order = [(i * 37) % len(NAMES) for i in range(len(NAMES))] * times
    return {number for number in order if stored(NAMES[number], store).image().getpixel((0, 0))[0] == number}


def send_reds(store, pipe):
    pipe.send(reds(store))


def test_threads_share_a_zip(archive):
    store = Zip(archive)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: reds(store), range(16)))
    assert all(result == set(range(len(NAMES))) for result in results)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_share_a_zip(archive, method):
    """Two children and the parent read at once; with one shared file offset they would read each other's bytes."""
    store = Zip(archive)
    context = multiprocessing.get_context(method)
    pipes = [context.Pipe(False) for _ in range(2)]
    children = [context.Process(target=send_reds, args=(store, sender)) for _, sender in pipes]
    for child in children:
        child.start()
    assert reds(store) == set(range(len(NAMES)))
    for (receiver, _), child in zip(pipes, children):
        assert receiver.poll(300) and receiver.recv() == set(range(len(NAMES)))
        child.join(60)
        assert child.exitcode == 0


def test_a_pickled_zip_opens_again(archive):
    assert reds(pickle.loads(pickle.dumps(Zip(archive))), 1) == set(range(len(NAMES)))


def test_folder_and_zip_know_what_they_have(archive, tmp_path):
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "sub" / "a.png").write_bytes(png(7))
    folder = open_store(tmp_path / "folder")
    assert isinstance(folder, Folder) and isinstance(open_store(archive), Zip)
    assert folder.has("sub/a.png") and folder.has(os.fspath(tmp_path / "folder" / "sub" / "a.png"))
    assert not folder.has("a.png") and not folder.has("no/a.png") and not folder.has("")
    assert open_store(archive).has("7.png") and not open_store(archive).has("sub/7.png")


def test_damaged_zip_entries_are_one_line(archive):
    store = Zip(archive)
    entry = store._archive().getinfo("5.png")
    data = bytearray(archive.read_bytes())
    data[entry.header_offset + 45] ^= 0xFF
    archive.write_bytes(data)
    with pytest.raises(UserError, match=r"^5\.png: cannot be unpacked from .*; make the zip again$"):
        stored("5.png", Zip(archive)).image()
    with pytest.raises(UserError, match=r"^gone\.png: not in .*images\.zip; check the name$"):
        store.get("gone.png")


def test_what_a_zip_entry_unpacks_to_is_bounded(archive, monkeypatch):
    monkeypatch.setattr("minillava.data.files.MAX_FILE_BYTES", 10)
    with pytest.raises(UserError, match="bytes unpacked; scale the image down"):
        stored("5.png", Zip(archive)).image()
