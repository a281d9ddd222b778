"""Recipes, every number of them out of its range, and training data with one bad row, or none that can be read."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any, get_type_hints

from bad.contents import LFS, NO_JSON, PICTURES, Case, picture, zipped
from minillava import config, recipe
from minillava.recipe import interval_of

RECIPE = """
name = "tiny"
device = "cpu"
[model]
base = "nano"
[[stage]]
name = "tune"
data = [{ path = "data.json", images = "." }]
lr = { projector = 1e-3, decoder = 1e-4 }
steps = 1
batch_size = 1
max_tokens = 200
lora = { decoder = { rank = 2 } }
"""
PLACES = {  # where the fields of a class are in a recipe
    "Recipe": "",
    "StageConfig": "stage.tune.",
    "DataConfig": "stage.tune.data.0.",
    "DPOConfig": "stage.tune.dpo.",
    "LoRAConfig": "stage.tune.lora.decoder.",
    "VisionConfig": "model.vision.",
    "ProjectorConfig": "model.projector.",
    "RopeScaling": "model.decoder.rope_scaling.",
    "DecoderConfig": "model.decoder.",
    "ImageConfig": "model.image.",
    "LayoutConfig": "model.layout.",
    "ChatConfig": "model.chat.",
}


def recipes() -> Iterator[Case]:
    files = {"r.toml": RECIPE, "data.json": DATA, "a.png": picture()}

    def sets(name: str, named: str, *changes: str) -> Case:
        return Case(
            f"recipe {name}",
            ("train", "r.toml", *(f"--set={change}" for change in changes)),
            (named,),
            files,
        )

    for group, place in PLACES.items():
        hints = get_type_hints(getattr(recipe, group, None) or getattr(config, group), include_extras=True)
        for key, interval in ((key, found) for key, hint in hints.items() if (found := interval_of(hint))):
            low, high = (float(end) for end in interval[1:-1].split(","))
            outside = ["nan", "'many'", "true"]
            outside += [] if low == -float("inf") else [str(int(low) - 1)]
            outside += ["inf"] if interval.endswith(")") else [] if high == float("inf") else [str(int(high) + 1)]
            for value in outside:
                many = {"betas": "[{}, 0.5]", "grids": "[[{}, 1]]", "lr": "{{projector = {}}}"}.get(key, "{}")
                if key in ("mean", "std", "rotary_shares"):
                    many = "[{}, 1, 1]"
                elif key in ("select_layers", "eos_ids"):
                    many = "[{}]"
                yield sets(f"{group}.{key} {value}", key, f"{place}{key}={many.format(value)}")
    for change, named in {
        "sed=1": "'seed'",
        "stage.tune.step=1": "'steps'",
        "stage.tune.learning_rate=1e-3": "learning_rate",
        "model.bas='x'": "'base'",
        "model.vision.hidden=1": "'hidden_size'",
        "stage.tune.lora.decoder.r=4": "unknown key 'r'",
        "stage.tune.dpo.bta=1": "'beta'",
        "stage.tune.data.0.paths='x'": "'path'",
        "model.chat.templates='x'": "'template'",
        "model.layout.mrge='flat'": "'merge'",
        "model=7": "model",
        "stage=7": "stage",
        "stage.tune.data=7": "data",
        "stage.tune.data='data.json'": "data",
        "stage.tune.lr=1e-3": "lr",
        "stage.tune.lr.projectr=1e-3": "projectr",
        "stage.tune.name='a b'": "a b",
        "stage.tune.name=7": "name",
        "name=7": "name",
        "stage.tune.name='..'": "name",
        "stage.tune.schedule='cosin'": "'cosine'",
        "stage.tune.optimizer='adam'": "'adamw'",
        "stage.tune.dtype='fp16'": "dtype",
        "stage.tune.checkpointing='all'": "checkpointing",
        "stage.tune.compile='yes'": "compile",
        "stage.tune.steps=0": "steps or epochs",
        "stage.tune.epochs=1": "steps or epochs",
        "stage.tune.task='llave'": "'llava'",
        "stage.tune.lora.vision.rank=2": "lora.vision",
        "stage.tune.lora.decoder.targets=['qq']": "qq",
        "stage.tune.lora=true": "lora",
        "stage.tune.data.0.take='some'": "take",
        "stage.tune.data.0.take='first:0'": "take",
        "stage.tune.data.0.bad='drop'": "bad",
        "stage.tune.data.0.path='none.json'": "none.json",
        "stage.tune.data.0.images='none'": "none",
        "stage.tune.data=[]": "data",
        "model.base='nowhere'": "nowhere",
        "model.base=7": "base",
        "model.quantize='nf5'": "nf5",
        "model.adapter='nowhere'": "nowhere",
        "model.tokenizer='nowhere'": "tokenizer|nowhere",
        "model.vision_from='nowhere'": "vision_from",
        "model.decoder_from='nowhere'": "decoder_from",
        "device='gpu'": "gpu",
        "device=7": "device",
        "sinks=['tensorbord']": "'tensorboard'",
        "sinks='wandb'": "sinks",
        "out=7": "out",
        'out="a\\u0000b"': "out is",
        'name="a\\u0000b"': "name is",
        'model.base="a\\u0000b"': "base is",
        'stage.tune.data.0.path="a\\u0000b"': "data.0.path is",
        'stage.tune.data.0.images="a\\u0000b"': "data.0.images is",
        'stage.tune.data.0.fetch="a\\u0000b"': "data.0.fetch is",
        'stage.tune.eval_data=[{path="a\\u0000b"}]': "eval_data.0.path is",
        "stage.tune.betas=[0.9]": "betas",
        "stage.tune.betas=0.9": "betas",
        "stage.tune.row_tokens=100": "row_tokens",
        "stage.tune.chat.template='vicunna'": "'vicuna",
        "stage.tune.layout.merge='best'": "merge",
        "stage.tune.layout.grids=[[0, 1]]": "grids",
        "stage.tune.layout.grids=[1]": "grids",
        "model.layout.max_tiles=4": "max_tiles",
        "model.projector.layers=1": "projector",
        "model.image.fit='stretch'": "model.image",
        "model.decoder.hidden_size=96": "decoder",
        "model.decoder.num_heads=3": "heads|decoder",
        "stage.tune.eval_samples=9": "eval_samples",
        "stage.tune.max_tokens=8": "max_tokens",
        "model.vision.image_size=72": "model.vision",
        "seed=[1]": "seed",
        "stage.tune.data.0.fetch=7": "fetch",
    }.items():
        yield sets(change, named, change)
    for kind, text in {
        "empty": b"",
        "no TOML": b"a = ",
        "latin-1": b"name = '\xe9'",
        "bytes": bytes(range(256)),
        "JSON": b'{"name": "x"}',
        "pointer": LFS.encode(),
        "key twice": b"name = 'a'\nname = 'b'",
        "no stage": b"name = 'x'",
        "utf-16": RECIPE.encode("utf-16"),
        "stage a table": b"[stage]\nsteps = 1",
    }.items():
        yield Case(f"recipe file {kind}", ("train", "r.toml"), ("r.toml",), {"r.toml": text})
        yield Case(f"plan file {kind}", ("plan", "r.toml"), ("r.toml",), {"r.toml": text})
        yield Case(
            f"resume file {kind}",
            ("train", "--resume", "--out", "run"),
            ("run/recipe.toml",),
            {"run/recipe.toml": text},
        )
    for sets in (
        "seed=1",
        "stage.tune.lr.vision=1e-4",
        "stage.tune.batch_size=2",
        "stage.tune.steps=0",
        "model.base=x",
    ):
        words = ("train", "--resume", "--out", "run", "--set", sets)
        yield Case(
            f"resume with {sets}", words, (sets.partition("=")[0].split(".")[-1],), {**files, "run/recipe.toml": RECIPE}
        )
    for words, named in (
        (("nanno",), "'nano'"),
        (("none.toml",), "none.toml"),
        ((".",), "TOML"),
        (("r.toml", "--stage", "tun"), "'tune'"),
        (("r.toml", "--export"), "--out|runs/tiny"),
        (("r.toml", "--export", "--stage", "tun"), "'tune'|runs"),
        (("r.toml", "--inspect", "1", "--stage", "x"), "'tune'|x"),
        (("data.json",), "data.json"),
        (("r.toml", "--out", "data.json"), "data.json"),
        (("r.toml", "--out", "full"), "full"),
        (("r.toml", "--resume", "--out", "data.json"), "data.json"),
        (("r.toml", "--resume", "--inspect", "1", "--export"), "--"),
    ):
        yield Case(f"train {' '.join(words)}", ("train", *words), (named,), files | {"full/x.txt": "x"})


# ---- data ----


TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
DATA = [{"id": f"s{i}", "image": "a.png", "conversations": TURNS} for i in range(3)]


def turns(*values: Any) -> dict[str, Any]:
    return {"id": "bad", "image": "a.png", "conversations": list(values)}


ROWS: dict[str, Any] = {  # each in the place of the second row of DATA
    "a text": "row",
    "null": None,
    "a list": [1],
    "empty": {},
    "without turns": {"id": "bad", "image": "a.png"},
    "turns a text": turns() | {"conversations": "Hi"},
    "turns null": turns() | {"conversations": None},
    "no turns": turns(),
    "turn a text": turns("Hi", "there"),
    "turn null": turns(None, TURNS[1]),
    "turn empty": turns({}, TURNS[1]),
    "role unknown": turns({"from": "humen", "value": "<image>"}, TURNS[1]),
    "role null": turns({"from": None, "value": "<image>"}, TURNS[1]),
    "role a list": turns({"from": ["human"], "value": "<image>"}, TURNS[1]),
    "value null": turns(TURNS[0], {"from": "gpt", "value": None}),
    "value a number": turns(TURNS[0], {"from": "gpt", "value": 7}),
    "value a table": turns(TURNS[0], {"from": "gpt", "value": {"a": 1}}),
    "question alone": turns(TURNS[0]),
    "answer alone": turns(TURNS[1]),
    "two questions": turns(TURNS[0], TURNS[0]),
    "two answers": turns(TURNS[0], TURNS[1], TURNS[1]),
    "system last": turns(*TURNS, {"from": "system", "value": "x"}),
    "marker too many": turns({"from": "human", "value": "<image> <image>"}, TURNS[1]),
    "marker missing": turns({"from": "human", "value": "What?"}, TURNS[1]),
    "half a pair": turns(TURNS[0], {"from": "gpt", "value": "\ud800"}),
    "image missing": turns(*TURNS) | {"image": "none.png"},
    "image a number": turns(*TURNS) | {"image": 7},
    "image a table": turns(*TURNS) | {"image": {"a": 1}},
    "image null in a list": turns(*TURNS) | {"image": [None]},
    "image a folder": turns(*TURNS) | {"image": "."},
    "image a URL": turns(*TURNS) | {"image": "https://x.org/a.png"},
    "image damaged": turns(*TURNS) | {"image": "cut.png"},
    "image text": turns(*TURNS) | {"image": "text.jpg"},
    "image pointer": turns(*TURNS) | {"image": "pointer.jpg"},
    "image data: URL": turns(*TURNS) | {"image": "data:image/png;base64,????"},
    "image data: text": turns(*TURNS) | {"image": "data:text/plain,hello"},
    "image base64 damaged": turns(*TURNS) | {"image": base64.b64encode(picture()).decode()[:-3] + "*" * 300},
    "image base64 no picture": turns(*TURNS) | {"image": "iVBORw0KGgo" + base64.b64encode(b"x" * 3000).decode()[:3989]},
    "image bytes a text": turns(*TURNS) | {"image": {"bytes": "%%%", "path": None}},
    "image and images": turns(*TURNS) | {"images": ["b.png"]},
    "image with nul": turns(*TURNS) | {"image": "a\0.png"},
    "image name too long": turns(*TURNS) | {"image": "a" * 5000 + ".png"},
    "video missing": {"id": "bad", "video": "none.mp4", "conversations": TURNS},
    "video text": {"id": "bad", "video": "text.jpg", "conversations": TURNS},
    "messages": {
        "id": "bad",
        "messages": [{"role": "user", "content": [{"type": "audio"}]}, {"role": "assistant", "content": "x"}],
    },
    "part a number": {
        "id": "bad",
        "messages": [{"role": "user", "content": [7]}, {"role": "assistant", "content": "x"}],
    },
    "texts": {"id": "bad", "texts": [{"user": "x"}]},
    "texts a text": {"id": "bad", "texts": ["x"]},
    "prompt alone": {"id": "bad", "prompt": "x"},
    "completion null": {"id": "bad", "prompt": "x", "completion": None},
    "prompt a list": {"id": "bad", "prompt": [], "completion": "x"},
    "only system": {"id": "bad", "conversations": [{"from": "system", "value": "x"}]},
    "too long": turns({"from": "human", "value": "<image>" + "What? " * 400}, TURNS[1]),
}


def data() -> Iterator[Case]:
    more = {name: PICTURES[name] for name in ("cut.png", "text.jpg", "pointer.jpg")}
    files = {"r.toml": RECIPE, "a.png": picture(), **more}
    for name, row in ROWS.items():
        named = "'bad'|sample '?[01]'?"
        for how in (("--inspect", "1"), ()):
            rows = {"data.json": [DATA[0], row, DATA[2]]}
            yield Case(f"row {name} {' '.join(how)}", ("train", "r.toml", *how), ("data.json", named), files | rows)
    for kind, content in {
        **NO_JSON,
        "no rows": b"[]",
        "blank lines": b"\n\n\n",
        "a table": b'{"data": []}',
        "an open list": b"[{}, ",
        "lines, one bad": b'{"id": 1}\n{"id": \n',
    }.items():
        yield Case(f"data {kind}", ("train", "r.toml"), ("data.json",), files | {"data.json": content})
    for name, content in {
        "d.parquet": b"PAR1" + bytes(100) + b"PAR1",
        "e.parquet": b"PAR1",
        "f.parquet": b"",
        "g.arrow": b"ARROW1\0\0" + bytes(50),
        "h.tar": bytes(257) + b"ustar" + bytes(300),
        "i.zip": zipped({"a.json": b"[]"}),
        "j.jsonl.gz": b"\x1f\x8b\x08" + bytes(20),
        "k.csv": b"image,text\na.png,cat\n",
        "l.png": picture(),
        "m.jsonl": picture(),
        "n.parquet": LFS.encode(),
        "o.tar": b"",
        "p.json": zipped({"a": b"b"}),
    }.items():
        sets = f"--set=stage.tune.data.0.path='{name}'"
        yield Case(f"data {name}", ("train", "r.toml", sets), (name,), files | {"data.json": DATA, name: content})
    for name, content in {
        "i.zip": b"PK\x03\x04" + bytes(50),
        "e.zip": b"",
        "o.zip": zipped({"other.png": picture()}),
        "d.zip": zipped({"a.png": b"no picture"}),
    }.items():
        sets = f"--set=stage.tune.data.0.images='{name}'"
        yield Case(
            f"images {name}", ("train", "r.toml", sets), (f"{name}|a.png",), files | {"data.json": DATA, name: content}
        )
    yield Case(
        "images a picture",
        ("train", "r.toml", "--set=stage.tune.data.0.images='a.png'"),
        ("a.png",),
        files | {"data.json": DATA},
    )
    yield Case(
        "data a folder", ("train", "r.toml", "--set=stage.tune.data.0.path='d'"), ("d",), files | {"d/x.txt": "x"}
    )
    yield Case("data a pattern", ("train", "r.toml", "--set=stage.tune.data.0.path='*.jsonl'"), (r"\*.jsonl",), files)
