"""The command line: answers, --json, --chat, and every bad input as one line with exit status 2."""

import io
import json
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from helpers import ROOT, load_model
from PIL import Image

from minillava import LLaVA
from minillava.checkpoints.save import save_model
from minillava.cli import ask, run_command
from minillava.generation.conversation import Conversation
from minillava.generation.look import draw

FIELDS = [
    "text", "token_ids", "prompt_tokens", "image_tokens", "finish_reason",
    "load_s", "vision_s", "prefill_s", "decode_tok_per_s", "peak_bytes", "token_s", "bandwidth_share",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny_model, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_model(tiny_model, folder, tiny_tokenizer)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    Image.new("RGB", (20, 12), (200, 30, 30)).save(path)
    return path


def run(capsys, *arguments):
    """(exit status, stdout, stderr)."""
    status = run_command("ask", [str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refused(capsys, *arguments):
    """The one line of a bad input."""
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: "), (status, out, err)
    return err


# ---- answers ----


def test_json_is_one_line_with_all_fields(capsys, folder, picture):
    arguments = ["--model", folder, "--image", picture, "--image", picture, "--prompt", "what?", "--max-new-tokens", 6]
    status, out, _ = run(capsys, *arguments, "--json")
    assert status == 0 and out.count("\n") == 1
    answer = json.loads(out)
    assert list(answer) == FIELDS
    assert answer["image_tokens"] == 8 and len(answer["token_ids"]) <= 6
    assert answer["prompt_tokens"] > 8 + 3 and answer["finish_reason"] in ("stop", "length")
    assert answer["load_s"] > 0 and answer["vision_s"] > 0 and answer["prefill_s"] > 0
    assert answer["decode_tok_per_s"] > 0 and answer["peak_bytes"] > 50_000_000
    assert 0 < answer["token_s"] < 10 and answer["bandwidth_share"] >= 0

    model = LLaVA.from_pretrained(folder)
    expected = model.generate("what?", [picture, Image.open(picture)], max_new_tokens=6)
    assert answer["token_ids"] == expected.token_ids and answer["text"] == expected.text == str(expected)

    status, out, err = run(capsys, *arguments)
    assert status == 0 and out == answer["text"] + "\n"
    assert err.startswith("[load ") and "8 of them visual" in err and "tok/s" in err


def test_sampling_arguments_arrive(capsys, folder):
    def ask(*more):
        common = ["--model", folder, "--prompt", "what?", "--max-new-tokens", 12, "--json"]
        return json.loads(run(capsys, *common, *more)[1])["token_ids"]

    greedy, hot = ask(), ["--temperature", 2]
    assert ask(*hot, "--seed", 1) == ask(*hot, "--seed", 1) != ask(*hot, "--seed", 2)
    assert ask(*hot, "--top-k", 1) == greedy == ask(*hot, "--top-p", 1e-6) == ask(*hot, "--min-p", 1)
    api = LLaVA.from_pretrained(folder).generate("what?", max_new_tokens=12, repetition_penalty=20.0)
    assert ask("--repetition-penalty", 20) == api.token_ids != greedy


def test_stops_end_an_answer_and_a_turn(capsys, folder, monkeypatch):
    common = ["--model", folder, "--max-new-tokens", 12, "--json"]
    free = json.loads(run(capsys, *common, "--prompt", "what?")[1])["text"]
    stops = ["--stop", free[4:6], "--stop", "never"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("what?\n"))
    for more in (["--prompt", "what?"], ["--chat"]):
        cut = json.loads(run(capsys, *common, *stops, *more)[1])
        assert cut["text"] == free[: free.index(free[4:6])].strip() and cut["finish_reason"] == "stop"


def test_raw_is_the_whole_prompt(capsys, folder, picture):
    common = ["--model", folder, "--image", picture, "--raw", "--max-new-tokens", 3, "--json", "--prompt"]
    answer = json.loads(run(capsys, *common, " red<image> green")[1])
    assert answer["prompt_tokens"] == 1 + 1 + 4 + 1  # BOS, a word, the picture, a word
    assert "2 '<image>' in the text, but 1 pictures" in refused(capsys, *common, "<image> and <image>")
    assert "0 '<image>' in the text, but 1 pictures" in refused(capsys, *common, "none at all")


def test_a_look_is_drawn_over_each_picture(capsys, folder, picture, tmp_path):
    common = ["--model", folder, "--prompt", "what?", "--max-new-tokens", 12]
    out = tmp_path / "look.png"
    model = LLaVA.from_pretrained(folder)
    answer = model.generate("what?", [picture], max_new_tokens=12)
    word = answer.text[2:5]
    status, text, err = run(capsys, *common, "--image", picture, "--look", word, "--out", out)
    assert status == 0 and text == f"{answer.text}\n" and f"{out}: attention of {word!r}" in err
    looks = model.look("what?", [picture], answer, word)
    assert Image.open(out).tobytes() == draw(looks)[0].tobytes() != Image.open(picture).tobytes()
    at = answer.text.index(word)
    assert torch.equal(model.look("what?", picture, answer, (at, at + 3))[0].weights_T, looks[0].weights_T)
    two = ["--image", picture, "--image", picture]
    word = str(model.generate("what?", [picture] * 2, max_new_tokens=12))[:3]
    assert run(capsys, *common, *two, "--look", word, "--out", out)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"look.png", "look-1.png", "look-2.png"}
    status, _, err = run(capsys, *common, "--image", picture, "--look", "nowhere", "--out", out)
    assert status == 2 and err.endswith("error: the answer has no 'nowhere'\n")


def test_chat_keeps_pictures_and_turns(capsys, folder, picture, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\nwhy?\n"))
    common = ["--model", folder, "--image", picture, "--chat", "--max-new-tokens", 4, "--json"]
    status, out, _ = run(capsys, *common, "--prompt", "what?")
    first, second = (json.loads(line) for line in out.splitlines())
    assert status == 0 and first["image_tokens"] == second["image_tokens"] == 4
    assert second["prompt_tokens"] > first["prompt_tokens"] + len(first["token_ids"])


def test_a_chat_takes_commands_and_survives_a_bad_turn(capsys, folder, picture, monkeypatch):
    long = "why " * 300
    lines = ["what?", "/image nowhere.png", f"/image {picture}", "and this?", long, "<image> no", "/imgae x", "/image",
             "/reset", "what?", "/help", "/exit", "never asked"]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    words = ["--model", folder, "--image", picture, "--chat", "--max-new-tokens", 4, "--json"]
    status, out, err = run(capsys, *words)
    first, both, again = (json.loads(line) for line in out.splitlines())
    assert status == 0 and (first["image_tokens"], both["image_tokens"]) == (4, 8)
    assert again["token_ids"] == first["token_ids"] and again["image_tokens"] == 4
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 5 and "no such image file" in errors[0] and "shorten" in errors[1] and "/help" in errors[3]
    assert "/reset " in err


def test_a_chat_survives_what_is_no_question(capsys, folder, picture, tmp_path, monkeypatch):
    """Bytes that are no text, markers without pictures, folders and damaged files as pictures, a lack of memory."""
    (tmp_path / "cut.png").write_bytes(Path(picture).read_bytes()[:60])
    bad = [b"what \xff?", b"\xc3", b"<image><image> both?", b"/image " + bytes(tmp_path),
           b"/image " + bytes(tmp_path / "cut.png"), b"/image a\0b", b"/image " + b"n" * 999, b"/image \xff.png",
           b"too much?"]  # fmt: skip
    lines = [b"what?", *bad, b"/reset", b"what?"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines)), encoding="utf-8"))
    asked = Conversation.ask

    def ask_unless_too_much(self, question, *how):
        if question == "too much?":
            raise MemoryError
        return asked(self, question, *how)

    monkeypatch.setattr(Conversation, "ask", ask_unless_too_much)
    words = ["--model", folder, "--image", picture, "--chat", "--max-new-tokens", 4, "--json"]
    status, out, err = run(capsys, *words)
    first, again = (json.loads(line) for line in out.splitlines())
    assert status == 0 and again["token_ids"] == first["token_ids"]
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(bad) and "byte 0xff behind" in errors[0] and "not enough memory" in errors[-1], err


def test_what_generation_config_asks_for_is_done_or_named(capsys, folder, tmp_path):
    shutil.copytree(folder, copy := tmp_path / "copy")
    path = copy / "generation_config.json"
    given = json.loads(path.read_text()) if path.is_file() else {}
    given |= {"do_sample": True, "temperature": 0.7, "repetition_penalty": 50.0, "num_beams": 4, "typical_p": 1.0}
    path.write_text(json.dumps(given))
    words = ["--prompt", "what is this?", "--max-new-tokens", 16, "--json"]
    _, out, err = run(capsys, "--model", copy, *words)
    assert "note: " in err and "samples (temperature 0.7)" in err and "not applied: num_beams 4\n" in err
    plain = json.loads(run(capsys, "--model", folder, *words)[1])["token_ids"]
    assert json.loads(out)["token_ids"] != plain


def test_no_arguments_ask_about_a_drawn_scene(capsys, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ask, "NANO", folder)
    status, out, err = run(capsys)
    path = tmp_path / "runs" / "demo.png"
    assert status == 0 and f"picture:  {path}\n" in out and "question: " in out and "\nanswer:   " in out
    assert Image.open(path).size[0] > 16 and err.startswith("[load ")


# ---- bad input ----


def png_bomb(path):
    """A valid header of 30,000 x 30,000 pixels, and next to nothing behind it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_bad_pictures(capsys, folder, tmp_path):
    jpeg = tmp_path / "cut.jpg"
    Image.effect_noise((200, 200), 60).save(jpeg, quality=90)
    jpeg.write_bytes(jpeg.read_bytes()[:3000])
    text = tmp_path / "text.png"
    text.write_text("I am no picture\n")
    bomb = tmp_path / "bomb.png"
    png_bomb(bomb)
    ask = ["--model", folder, "--prompt", "what?", "--image"]
    assert "no such image file" in refused(capsys, *ask, tmp_path / "missing.png")
    for path, reason in ((jpeg, "damaged"), (text, "not an image"), (bomb, "pixels")):
        line = refused(capsys, *ask, path)
        assert str(path) in line and reason in line


def test_bad_checkpoints(capsys, folder, tmp_path):
    assert "no such folder" in refused(capsys, "--model", tmp_path / "nowhere", "--prompt", "what?")
    cut = tmp_path / "cut"
    cut.mkdir()
    for path in folder.iterdir():
        data = path.read_bytes()
        (cut / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    assert "model.safetensors" in refused(capsys, "--model", cut, "--prompt", "what?")


def test_a_prompt_longer_than_the_context(capsys, folder):
    assert "context of 200" in refused(capsys, "--model", folder, "--prompt", "what? " * 300)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--promt", "what?"], "--promt"),
        (["--max-new-tokens", "many"], "--max-new-tokens is 'many'; use a whole number"),
        (["--prompt", "what?", "--temperature", "-1"], "--temperature is -1; use 0 or more"),
        (["--prompt", "what?", "--min-p", "1.5"], "--min-p is 1.5"),
        (["--prompt", "what?", "--repetition-penalty", "0"], "--repetition-penalty is 0; use more than 0"),
        (["--prompt", "what?", "--stop", ""], "--stop is empty"),
        (["--prompt", "what?", "--dtype", "float31"], "did you mean 'float32'"),
        (["--prompt", "what?", "--device", "gpu"], "device 'gpu' is unknown"),
        (["--prompt", "what?", "--device", "cuda:99"], "is not there"),
        (["--prompt", "what?", "--video", "clip.mp4"], "no such video file or folder of frames"),
        (["--prompt", "what?", "--video", __file__], "a video that cannot be decoded"),
        (["--prompt", "what?", "--frames", "0"], "--frames is 0; use 1 or more"),
        (["--prompt", "what?", "--frames", "9999"], "9999 frames of a video do not fit the context"),
        (["--video", "clip.mp4"], "--video needs a question"),
        (["--prompt", "what?", "--quantize", "nf5"], "type 'nf5' is unknown"),
        (["--raw"], "--raw takes the whole prompt"),
        (["--image", __file__], "needs a question"),
        (["--prompt", "what?", "--look", "red"], "--look takes --image and --prompt"),
        (["--prompt", "what?", "--image", __file__, "--look", "red", "--out", "look.txt"], "look.txt: pictures end in"),
        (["--prompt", "what?", "--out", "look.png"], "--out is where --look WORD draws"),
    ],
)
def test_bad_arguments(capsys, folder, arguments, reason):
    assert reason in refused(capsys, "--model", folder, *arguments)


def test_ctrl_c_is_no_traceback(capsys, folder, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ask.Run, "once", interrupt)
    status, _, err = run(capsys, "--model", folder, "--prompt", "what?")
    assert status == 130 and err == "\ninterrupted\n"


# ---- the public class ----


def test_public_class(folder, tiny_model, tmp_path):
    model = LLaVA.from_pretrained(folder, dtype="bf16", device="cpu")
    assert model.model.decoder.embed.weight.dtype == torch.bfloat16
    assert model.model.decoder.blocks[0].attn.qkv, "16-bit weights are fused when they are loaded"
    model.save_pretrained(tmp_path / "fused")
    again = load_model(tmp_path / "fused", torch.bfloat16)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(again.parameters(), tiny_model.parameters()))
    assert LLaVA.from_pretrained(folder).model.decoder.embed.weight.dtype == torch.float32

    model = LLaVA.from_pretrained(folder)
    ids_T = torch.arange(4, 14)
    with torch.no_grad():
        assert torch.equal(model(ids_T), tiny_model(ids_T))
        assert model(ids_T, labels=ids_T).ndim == 0
    model.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), tiny_model.parameters()))


def test_importing_the_package_and_asking_for_help_is_light():
    """Neither torch nor PIL nor numpy: both take a tenth of a second, not three."""
    program = (
        "import sys, minillava, runpy; sys.argv = ['generate.py', '--help']\n"
        "try: runpy.run_path('generate.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'numpy', 'PIL', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--max-new-tokens" in done.stdout


def test_an_answer_imports_neither_compiler_nor_plotting(folder):
    """The first token of a cold process is a matter of imports: torch's compiler alone would cost a second."""
    program = (
        "import sys, runpy; sys.argv = ['generate.py', '--model', sys.argv[1], '--prompt', 'what?', '--json']\n"
        "try: runpy.run_path('generate.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch._dynamo', 'torch._inductor', 'transformers', 'matplotlib', 'huggingface_hub', 'av', 'sympy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["finish_reason"], done.stderr


def test_the_model_that_ships_says_what_it_knows(capsys, folder, picture, monkeypatch, tmp_path):
    """Asked about somebody's picture, once and on stderr; another model says nothing of it."""
    monkeypatch.chdir(tmp_path)
    note = "knows drawn scenes of a few coloured shapes"
    arguments = ["--prompt", "what is it?", "--image", picture, "--max-new-tokens", 1, "--device", "cpu"]
    status, out, err = run(capsys, *arguments)
    assert status == 0 and err.count(note) == 1 and note not in out
    assert note not in run(capsys, "--model", folder, *arguments)[2]
    assert note not in run(capsys, "--prompt", "hello", "--max-new-tokens", 1, "--device", "cpu")[2]
