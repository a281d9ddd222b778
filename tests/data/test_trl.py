"""What TRL's collator supervises on the same rows, where it is right: answers after a prompt, pictures unsupervised.

(On `messages` it supervises everything, each placeholder of a picture too, unless its template marks answers.)
"""

import io
from pathlib import Path

import pytest
from PIL import Image

import minillava
from minillava.checkpoints.checkpoint import Checkpoint
from minillava.config import IGNORE
from minillava.data.dataset import Dataset
from minillava.data.table import scan

datasets = pytest.importorskip("datasets")
pytest.importorskip("trl")
NANO = Path(minillava.__file__).parent / "nano"


def messages(*contents, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def test_the_same_tokens_are_supervised_as_by_trls_collator(tmp_path):
    transformers = pytest.importorskip("transformers")
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    rows = []
    for i, (question, answer) in enumerate(
        [("Which color is it?", "red"), ("What is it?", "A large red disc."), ("Is it?", "7")]
    ):
        file = io.BytesIO()
        Image.new("RGB", (30 + i, 20), "red").save(file, "PNG")
        picture = {"bytes": file.getvalue(), "path": None}
        rows.append({"images": [picture], "prompt": messages(question), "completion": messages(answer, first="gpt")})
    data = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    data.to_parquet(tmp_path / "rows.parquet")
    processor = transformers.AutoProcessor.from_pretrained(NANO)
    theirs = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)([data[i] for i in range(3)])

    checkpoint = Checkpoint.open(str(NANO))
    samples, report = scan(tmp_path / "rows.parquet", None)
    assert not report.problems
    ours = Dataset(samples, checkpoint.config, checkpoint.tokenizer(), 999)
    for i in range(3):
        real = theirs["attention_mask"][i].bool()
        assert ours[i].ids[0] == checkpoint.config.chat.bos_id  # which TRL leaves out where the template does
        assert ours[i].ids[1:] == theirs["input_ids"][i][real].tolist()
        assert ours[i].labels[1:] == theirs["labels"][i][real].tolist()
        assert any(label != IGNORE for label in ours[i].labels)

    whole = [{"images": data[0]["images"], "messages": data[0]["prompt"] + data[0]["completion"]}]
    labels = DataCollatorForVisionLanguageModeling(processor)(whole)["labels"][0]
    assert (labels == checkpoint.config.chat.image_token_id).sum() == ours[0].spans[0].tokens
