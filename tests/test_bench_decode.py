"""The bench of answers, rehearsed at a tiny shape beside transformers."""

import json

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
