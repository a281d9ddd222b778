"""Every format and layout in gives the samples that LLaVA's JSON gives; what cannot be used is a line that says why."""

import base64
import dataclasses
import http.server
import io
import json
import pickle
import tarfile
import threading

import pytest
from helpers import talk, tiny_config
from PIL import Image

from minillava.config import DecoderConfig
from minillava.data import hub
from minillava.data.dataset import encode_sample
from minillava.data.mixture import read_data
from minillava.data.table import scan
from minillava.errors import UserError
from minillava.processor import Processor
from minillava.recipe import DataConfig, read_recipe
from minillava.training.pipeline import inspect_recipe, run_recipe

datasets = pytest.importorskip("datasets")
pq = pytest.importorskip("pyarrow.parquet")
COLORS = ["red", "green", "blue", "white", "black"]


def png(color):
    file = io.BytesIO()
    Image.new("RGB", (20, 12), color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def world(tmp_path):
    """images/ with a picture of each color, and the samples about them as LLaVA's JSON; the last has no picture."""
    (tmp_path / "images").mkdir()
    rows = []
    for color in COLORS:
        (tmp_path / "images" / f"{color}.png").write_bytes(png(color))
        turns = talk("<image>\nWhich color?", color) + talk("Sure?", "Yes.")
        rows.append({"id": color, "image": f"{color}.png", "conversations": turns})
    rows.append({"id": "text", "conversations": talk("Hi", "Hello")})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.fixture
def numbers(tiny_tokenizer):
    """Ids, labels and pixels of samples."""
    decoder = DecoderConfig(tiny_tokenizer.vocab_size, 32, 64, 1, 2, 2, 16)
    processor = Processor(tiny_config(tiny_tokenizer, decoder), tiny_tokenizer)

    def encode(samples):
        examples = [encode_sample(sample, processor, 999) for sample in samples]
        return [(e.ids, e.labels, None if e.pixels_NCHW is None else e.pixels_NCHW.tolist()) for e in examples]

    return encode


def chat(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def picture(color):
    return {"bytes": png(color), "path": None}


def in_parts(color):
    """TRL's parts, with the keys that `from_list` fills in."""
    text = lambda words: {"type": "text", "text": words}  # noqa: E731
    return chat([{"type": "image", "text": None}, text("Which color?")], [text(color)], [text("Sure?")], [text("Yes.")])


LAYOUTS = {
    "OneVision": lambda c: {"image": picture(c), "data_source": "drawn",
                            "conversations": talk("<image>\nWhich color?", c) + talk("Sure?", "Yes.")},
    "FineVision": lambda c: {"images": [picture(c)], "source": "drawn", "relevance_min": 4,
                             "texts": [{"user": "Which color?", "assistant": c},
                                       {"user": "Sure?", "assistant": "Yes."}]},
    "TRL": lambda c: {"images": [picture(c)], "messages": in_parts(c)},
    "TRL, strings": lambda c: {"images": [picture(c)], "messages": chat("Which color?", c, "Sure?", "Yes.")},
    "LLaMA-Factory": lambda c: {"images": [picture(c)], "messages": chat("<image>\nWhich color?", c, "Sure?", "Yes.")},
    "null beside": lambda c: {"image": None, "images": [picture(c)], "conversations": None, "videos": None,
                              "messages": [{"from": None, "value": None} | turn
                                           for turn in chat("<image>\nWhich color?", c, "Sure?", "Yes.")]},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["parquet", "arrow", "folder"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_what_datasets_writes_is_the_same_as_llavas_json(world, numbers, layout, kind):
    rows = [LAYOUTS[layout](color) | {"id": color} for color in COLORS]
    data = datasets.Dataset.from_list(rows)
    key = "image" if "image" in rows[0] and rows[0]["image"] else "images"
    feature = datasets.Image() if key == "image" else datasets.List(datasets.Image())
    data = data.cast_column(key, feature)
    path = world / "rows"
    if kind == "parquet":
        data.to_parquet(path)  # the name says nothing
    else:
        data.save_to_disk(path)
    found, _ = scan(path if kind != "arrow" else next(path.glob("*.arrow")), None)
    expected, _ = scan(world / "data.json", world / "images")
    assert numbers(found) == numbers(expected[: len(COLORS)])
    assert [sample.id for sample in found] == COLORS


def test_pictures_in_every_form(world, numbers):
    """Bytes cannot be in JSON; all else can: base64, data: URLs, names, absolute files, parts that bring their own."""
    packed = base64.b64encode(png("red")).decode()
    ways = [
        packed, f"data:image/png;base64,{packed}", "red.png", str(world / "images/red.png"),
        {"bytes": None, "path": "red.png"}, {"bytes": packed}, {"path": str(world / "images/red.png"), "bytes": None},
        {"url": f"data:image/png;base64,{packed}"},
    ]  # fmt: skip
    turns = talk("<image>\nWhich color?", "red") + talk("Sure?", "Yes.")
    rows = [{"image": way, "conversations": turns} for way in ways]
    for key, value in (("image_url", {"url": ways[1]}), ("image", ways[2]), ("image_url", ways[1])):
        parts = [{"type": key, key: value}, {"type": "text", "text": "Which color?"}]
        rows.append({"messages": chat(parts, "red", "Sure?", "Yes.")})
    (world / "ways.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found, report = scan(world / "ways.jsonl", world / "images")
    assert not report.problems
    assert numbers(found) == numbers(scan(world / "data.json", world / "images")[0][:1]) * len(rows)


def test_order_of_pictures_and_text_is_kept(world):
    """Markers in strings and parts beside columns; parts that bring their picture between those that do not."""
    own = {"type": "image", "image": "blue.png"}
    parts = [{"type": "text", "text": "A"}, {"type": "image"}, own, {"type": "image"}, {"type": "text", "text": "B"}]
    row = {"images": ["red.png", "green.png"], "messages": chat(parts, [{"type": "text", "text": t} for t in "xy"])}
    (world / "order.jsonl").write_text(json.dumps(row))
    (sample,), _ = scan(world / "order.jsonl", world / "images")
    assert [m.name for m in sample.images] == ["red.png", "blue.png", "green.png"]
    assert [m.text for m in sample.messages] == ["A<image>\n<image>\n<image>\nB", "xy"]


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_webdataset(world, numbers):
    rows = json.loads((world / "data.json").read_text())
    members = []
    for i, row in enumerate(rows):
        members.append((f"a/{i}.JSON", json.dumps(row).encode()))
        if "image" in row:
            members.append((f"a/{i}.png", png(row["id"])))
    tar(world / "shard", members)
    assert numbers(scan(world / "shard", None)[0]) == numbers(scan(world / "data.json", world / "images")[0])
    tar(world / "two.tar", [("1.5.jpg", png("red")), ("1.6.jpg", png("blue")), ("1.txt", b"A pair.")])
    (pair,), _ = scan(world / "two.tar", None)  # webdataset splits at the first dot: one sample
    assert [m.text for m in pair.messages] == ["<image>\n<image>", "A pair."]
    assert [m.image().getpixel((0, 0))[0] for m in pair.images] == [255, 0]


def test_numbered_pictures_of_a_tar_are_in_the_order_of_their_numbers(world):
    """Not 0, 1, 10, 11, 2, ...; and a caption that is null is none."""
    shades = [f"#{i:02x}0000" for i in range(12)]
    members = [(f"a.{i}.png", png(shade)) for i, shade in enumerate(shades)]
    tar(world / "many.tar", [*members, ("a.json", b'{"caption": null}'), ("a.txt", b"Darker first.")])
    (sample,), _ = scan(world / "many.tar", None)
    assert [m.image().getpixel((0, 0))[0] for m in sample.images] == [*range(12)]
    assert sample.messages[-1].text == "Darker first."


def test_a_tar_that_is_gone_costs_its_samples(world):
    """A loader process opens it anew."""
    tar(world / "gone.tar", [("a.png", png("red")), ("a.txt", b"Red.")])
    rows = pickle.loads(pickle.dumps(scan(world / "gone.tar", None)[0].sources[0].rows))
    (world / "gone.tar").unlink()
    with pytest.raises(UserError, match=r"gone.tar: no such file"):
        rows[0]


@pytest.mark.parametrize("stream", [False, True])
def test_the_hub(world, numbers, monkeypatch, stream):
    """A data set's train split by id, a folder and a pattern; the hub is a folder here."""
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    data = datasets.Dataset.from_list([LAYOUTS["OneVision"](color) | {"id": color} for color in COLORS])
    home = world / "hub/datasets/me/colors"
    for name in ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "more/a.parquet"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        data.select(range(2 if "test" in name else 5)).to_parquet(home / name)
    monkeypatch.setattr(hub, "filesystem", lambda place: DirFileSystem(str(world / "hub"), LocalFileSystem()))
    monkeypatch.setattr(hub, "fetched", lambda name: str(world / "hub" / name))
    expected = numbers(scan(world / "data.json", world / "images")[0][:5])
    for source, count in (("me/colors", 5), ("hf://datasets/me/colors/more", 5),
                          ("hf://datasets/me/colors/data/te*.parquet", 2)):  # fmt: skip
        assert numbers(scan(source, None, stream=stream)[0]) == expected[:count]
    with pytest.raises(UserError, match=r"hf://datasets/me/colors/none: no parquet"):
        scan("hf://datasets/me/colors/none", None, stream=stream)
    for folder, rows in (("train", 5), ("test", 2)):  # as the hub's own conversion to parquet has splits
        (world / "hub/datasets/me/other/default" / folder).mkdir(parents=True)
        data.select(range(rows)).to_parquet(world / "hub/datasets/me/other/default" / folder / "0000.parquet")
    assert numbers(scan("me/other", None, stream=stream)[0]) == expected
    (world / "hub/datasets/me/texts").mkdir()
    (world / "hub/datasets/me/texts/a.jsonl").write_text(json.dumps({"conversations": talk("Hi", "Hello")}))
    (world / "hub/datasets/me/texts/dataset_infos.json").write_text("{}")
    if stream:
        with pytest.raises(UserError, match=r"a.jsonl: only parquet is read over the network; leave stream out"):
            scan("me/texts", None, stream=True)
    else:
        assert len(scan("me/texts", None)[0]) == 1


def test_urls_are_fetched_once_and_only_when_asked_for(world, numbers):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(503 if len(asked) == 1 else 200)
            self.end_headers()
            if len(asked) > 1:
                self.wfile.write(png("red"))

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    row = json.loads((world / "data.json").read_text())[0]
    row["image"] = f"http://127.0.0.1:{server.server_port}/red.png"
    (world / "urls.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match="is a URL; set fetch"):
        read_data([DataConfig(str(world / "urls.json"))])
    found = read_data([DataConfig(str(world / "urls.json"), fetch=str(world / "cache"))])
    assert not asked
    expected = numbers(scan(world / "data.json", world / "images")[0][:1])
    assert numbers(found) == numbers(found) == expected and len(asked) == 2  # one was told to come again
    server.shutdown()


BAD = {
    "JSON column": (dict(messages=chat(3, "ok")), "must be a string, got a whole number; .*007"),
    "JSON part": (dict(messages=chat([{"type": "text", "text": 7}], "ok")), "got a whole number; .*007"),
    "neither": (dict(image={"bytes": None, "path": None}, conversations=talk("<image>", "x")), "neither bytes nor"),
    "path alone": (dict(image={"bytes": None, "path": "/gone/a.png"}, conversations=talk("<image>", "x")),
                   "kept paths and no bytes .*to_parquet does"),
    "unknown part": (dict(messages=chat([{"type": "audio"}], "x")), "part of type 'audio'; use text, image"),
    "both": (dict(image="red.png", images=["blue.png"], conversations=talk("<image>", "x")), "has both 'image'"),
    "no base64": (dict(image="data:image/png;base64,@@@", conversations=talk("<image>", "x")), "is not base64"),
    "too many": (dict(images=["red.png"], messages=chat([{"type": "image"}] * 2, "x")), "2 <image> in the text but 1"),
    "answer in prompt": (dict(prompt=chat("a", "b", "c"), completion=chat("x")), "'prompt' has an answer in it"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_bad_rows(world, case):
    row, words = BAD[case]
    (world / "bad.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match=rf"bad.json: sample '0' \(number 0\): .*{words}") as caught:
        read_data([DataConfig(str(world / "bad.json"), str(world / "images"))])
    assert "\n" not in str(caught.value)


def test_json_columns_of_map(world):
    """Text that `map` turned into numbers is refused, and parts and texts beside it are read."""
    rows = [chat("3", "ok"), chat([{"type": "text", "text": "hi"}], "x")]
    data = datasets.Dataset.from_list([{"i": 0}, {"i": 1}]).map(lambda row: {"messages": rows[row["i"]]})
    data.to_parquet(world / "map.parquet")
    found, report = scan(world / "map.parquet", None)
    assert [[m.text for m in sample.messages] for sample in found] == [["hi", "x"]]
    assert len(report.problems) == 1 and "got a whole number" in report.problems[0]


def test_bad_samples_are_skipped_up_to_a_share(world, capsys):
    rows = json.loads((world / "data.json").read_text())
    (world / "some.json").write_text(
        json.dumps([*rows, {"id": "bad", "image": "gone.png", **rows[0]} | {"image": "x"}])
    )
    some = DataConfig(str(world / "some.json"), str(world / "images"))
    with pytest.raises(UserError, match="image x is missing"):
        read_data([some])
    with pytest.raises(UserError, match=r"image x is missing.*: 1 of 7 cannot be used, more than max_bad 0.1"):
        read_data([dataclasses.replace(some, bad="skip", max_bad=0.1)])
    assert len(read_data([dataclasses.replace(some, bad="skip", max_bad=0.15)])) == 6
    assert "1 of 7 (14.29%) are skipped, the first: " in capsys.readouterr().out


@pytest.mark.parametrize("content,words", [(b"PAR1 nonsense", "damaged file"), (b"ARROW1 nonsense", "damaged file"),
                                           (b"\x1f\x8b packed", "packed with gzip; unpack it"),
                                           (b"\0" * 257 + b"ustar" + b"\0" * 300, "as a tar|no samples")])  # fmt: skip
def test_damaged_files(tmp_path, content, words):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        scan(tmp_path / "x", None)
    assert "\n" not in str(caught.value)


def test_a_damaged_page_is_one_line_that_names_the_file(world):
    """While the data is read through, and later, when it costs a sample."""
    datasets.Dataset.from_list([{"conversations": talk("Hi" * 99, str(i))} for i in range(999)]).to_parquet(
        world / "x.parquet"
    )
    found, _ = scan(world / "x.parquet", None)
    data = bytearray((world / "x.parquet").read_bytes())
    data[4:-2000] = b"\xff" * len(data[4:-2000])
    (world / "x.parquet").write_bytes(data)
    for read in (lambda: scan(world / "x.parquet", None), lambda: found[0]):
        with pytest.raises(UserError, match=r"x.parquet: a damaged file \(.*; fetch it again") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_bytes_of_pictures_are_not_read_to_check_them(world, monkeypatch):
    """Where the statistics say that there are some; where a row has none all are read."""
    rows = [LAYOUTS["FineVision"](color) for color in COLORS]
    datasets.Dataset.from_list(rows).to_parquet(world / "all.parquet")
    found, _ = scan(world / "all.parquet", None)
    assert [list(row["images"][0]) for row in found.sources[0].rows.walk()] == [["path", "bytes"]] * 5
    assert not any(png(color) == row["images"][0]["bytes"] for color, row in zip(COLORS, found.sources[0].rows.walk()))
    rows[2]["images"][0]["bytes"] = None
    datasets.Dataset.from_list(rows).to_parquet(world / "some.parquet")
    assert len(scan(world / "some.parquet", None)[1].problems) == 1


RECIPE = """
name = "rows"
device = "cpu"
[model]
tokenizer = "data"
vision = {hidden_size = 16, intermediate_size = 32, num_layers = 2, num_heads = 2, image_size = 16, patch_size = 8}
decoder = {hidden_size = 16, intermediate_size = 32, num_layers = 1, num_heads = 2, num_kv_heads = 1, head_dim = 8}
[[stage]]
name = "finetune"
lr = {projector = 1e-2, decoder = 1e-2}
epochs = 6
batch_size = 8
eval_samples = 8
"""


def test_parquet_of_the_hubs_layouts_trains_and_inspect_refuses_what_the_run_refuses(world, capsys):
    for layout in ("OneVision", "FineVision"):
        rows = [LAYOUTS[layout](COLORS[i % 5]) | {"id": str(i)} for i in range(40)]
        datasets.Dataset.from_list(rows).to_parquet(world / f"{layout}.parquet", batch_size=10)
    (world / "recipe.toml").write_text(RECIPE)
    paths = ", ".join(f"{{path = '{world}/{layout}.parquet'}}" for layout in ("OneVision", "FineVision"))
    recipe = read_recipe(world / "recipe.toml", [f"stage.finetune.data=[{paths}]"], str(world / "run"))
    inspect_recipe(recipe, 1)
    assert "40 samples, 40 images" in capsys.readouterr().out
    results = run_recipe(recipe)
    log = [json.loads(line) for line in (world / "run/log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 6 * 9 and losses[-1] < 0.5 * losses[0]
    assert len(results["finetune"]) == 3  # the loss of all that was held out, and of each file

    rows[27]["texts"][1]["assistant"] = "Yes</s>."
    datasets.Dataset.from_list(rows).to_parquet(world / "FineVision.parquet")
    for start in (lambda r: inspect_recipe(r, 1), run_recipe):
        with pytest.raises(UserError, match=r"sample '27' \(number 27\): a text holds '</s>'"):
            start(dataclasses.replace(recipe, out=str(world / "other")))
