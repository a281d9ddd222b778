"""The benches of answers, rehearsed at a tiny shape: beside transformers, and many at once."""

import json

from bench import serve
from bench.decode import main


def test_every_peer_answers_and_is_told(tmp_path):
    assert main(["--device", "cpu", "--shape", "tiny", "--rounds", "1", "--tokens", "3", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [row["batch"] for row in rows] == [1, 2]
    told = (tmp_path / "decode.md").read_text()
    for row in rows:
        assert {"ours bf16", "ours NF4", "transformers bf16"} <= row["peers"].keys()
        for peer, times in row["peers"].items():
            assert times["decode_tok_per_s"] > 0 and f"| {peer} | {times['decode_tok_per_s']:.1f} |" in told


def test_many_requests_at_once_are_measured_beside_the_same_alone(tmp_path):
    assert serve.main(["--shape", "tiny", "--slots", "3", "--new", "4", "--alone", "1", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "serve.json").read_text())
    assert all(report[crowd]["tok_per_s"] > 0 for crowd in ("own", "shared")) and report["remembered_s"] > 0
    assert f"| at once, one picture | {report['shared']['crowd_s']:.1f} |" in (tmp_path / "serve.md").read_text()
