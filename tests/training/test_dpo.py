"""Preferences: TRL's losses and reward margins, step by step; one picture for both answers; the start in every way."""

import dataclasses
import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, read_config, tiny_config
from PIL import Image

from minillava.chat.tokenizer import load_tokenizer
from minillava.checkpoints.adapters import save_peft
from minillava.checkpoints.save import save_model
from minillava.config import DecoderConfig
from minillava.data.pairs import encode_pair
from minillava.data.table import scan
from minillava.errors import UserError
from minillava.llava import LLaVAModel
from minillava.processor import Processor
from minillava.recipe import DPOConfig, read_recipe
from minillava.synthetic.train_tokenizer import train_small_tokenizer
from minillava.training.build import make_run
from minillava.training.dpo_task import preference_loss
from minillava.training.pipeline import run_recipe
from minillava.training.progress import Log, read_log
from minillava.training.task import make_task
from minillava.training.trainer import Trainer

CPU = torch.device("cpu")
COLORS = ("red", "green", "blue", "black")
RECIPE = """
name = "preferences"
device = "cpu"
[model]
base = "{root}/base"
[[stage]]
name = "dpo"
task = "dpo"
data = [{{path = "{root}/pairs.json", images = "{root}"}}]
lr = {{projector = 1e-4, decoder = 1e-4}}
steps = 50
warmup = 0.0
schedule = "constant"
batch_size = 4
micro_batch = 4
dtype = "float32"
save_every = 0
"""
LORA = "stage.dpo.lora={decoder = {rank = 4, alpha = 8, dropout = 0.0}}"
ADAPTED = [LORA, "stage.dpo.lr={decoder = 1e-3}"]


def preference(number, rng):
    """A question about a picture, or about none, with a true and a false answer of unequal length; in all layouts."""
    color, other = rng.sample(COLORS, 2)
    good, bad = f"It is {color}." + " Yes." * rng.randrange(3), f"It is {other}." + " Sure." * rng.randrange(4)
    media = {"image": f"{color}.png"} if number % 5 else {}
    marker = "<image>\n" if media else ""
    if number % 3 == 0:  # LLaVA-NeXT's, whose prompt is marked when it is read
        return {"id": number, **media, "prompt": "Which?", "chosen": good, "rejected": bad}
    turns = [{"role": "user", "content": f"{marker}Which?"}]
    if number % 3 == 1:  # TRL's; one in two with an earlier turn, which is no answer to learn
        if number % 2:
            turns += [{"role": "assistant", "content": "Yes. Yes."}, {"role": "user", "content": "Sure?"}]
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (good, bad))
        return {"id": number, "images": list(media.values()), "prompt": turns, "chosen": chosen, "rejected": rejected}
    asked = [{"from": "human", "value": turns[0]["content"]}]  # LLaMA-Factory's
    chosen, rejected = ({"from": "gpt", "value": text} for text in (good, bad))
    return {"id": number, **media, "conversations": asked, "chosen": chosen, "rejected": rejected}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """40 preferences, the pictures that they are about, a checkpoint of a tiny model, and a recipe."""
    root = tmp_path_factory.mktemp("preferences")
    for color in COLORS:
        Image.new("RGB", (24, 16), color).save(root / f"{color}.png")
    rng = random.Random(0)
    (root / "pairs.json").write_text(json.dumps([preference(number, rng) for number in range(40)]))
    words = "USER: \nWhich? ASSISTANT: It is red. It is green. It is blue. It is black. Sure? Yes.</s>"
    train_small_tokenizer([words] * 3, root / "tokenizer", vocab_size=381)
    tokenizer = load_tokenizer(root / "tokenizer")
    decoder = DecoderConfig(tokenizer.vocab_size, 24, 40, 2, 2, 1, 12, max_positions=256)
    model = LLaVAModel(tiny_config(tokenizer, decoder, layers=2))
    model.init_weights(seed=0)
    save_model(model, root / "base", tokenizer)
    (root / "recipe.toml").write_text(RECIPE.format(root=root))
    return root


def trainer_of(world, folder, *sets):
    recipe = read_recipe(world / "recipe.toml", list(sets), str(folder))
    (stage,) = recipe.stage
    run = make_run(recipe, folder, CPU)
    return Trainer(make_task(run, stage), stage, CPU, folder / "dpo", Log(folder / "log.jsonl"), False, recipe)


def steps(trainer, number):
    """Loss and rewards of each of so many steps."""
    return [trainer.train_step(micros) for _, micros in zip(range(number), trainer.task.batches(0, number))]


def padded(pairs):
    """What TRL's collator makes of pairs: all chosen, then all rejected, and each picture twice."""
    rows = [*pairs, *(pair.rejected for pair in pairs)]
    longest = max(len(row.ids) for row in rows)

    def filled(lists, value):
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in lists])

    masks = [[int(label >= 0) for label in row.labels] for row in rows]
    batch = {
        "input_ids": filled([row.ids for row in rows], 0),
        "attention_mask": filled([[1] * len(row.ids) for row in rows], 0),
        "completion_mask": filled(masks, 0),
    }
    pixels = [pair.pixels_NCHW for pair in pairs if pair.visuals]
    return batch | ({"pixel_values": torch.cat(pixels * 2)} if pixels else {})


@pytest.mark.parametrize(
    "kind,adapted,number",
    [
        ("sigmoid", False, 8),
        pytest.param("sigmoid", False, 50, marks=pytest.mark.slow),
        ("sigmoid", True, 50),
        ("hinge", True, 8),
        ("ipo", True, 8),
    ],
)
def test_fifty_steps_are_trls(world, tmp_path, kind, adapted, number):
    """50 losses and reward margins within 1e-5 of those of TRL's DPOTrainer, all weights or adapters trained; 8 of
    the rarer losses."""
    trl = pytest.importorskip("trl")
    import datasets
    import peft
    import transformers

    trainer = trainer_of(world, tmp_path, f"stage.dpo.dpo.loss={kind}", *(ADAPTED if adapted else []))
    task = trainer.task
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(world / "base", dtype=torch.float32)
    reference = None
    if adapted:
        started = {name: parameter.detach().clone() for name, parameter in trainer.trained.items()}
        save_peft(tmp_path / "adapter", started, task.stage.lora, str(world / "base"))
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True)
    else:
        theirs.model.vision_tower.requires_grad_(False)
        reference = transformers.LlavaForConditionalGeneration.from_pretrained(world / "base", dtype=torch.float32)
    drawn = [index for k in range(number) for row in task.order.rows(k) for index in row]
    rows = {"number": drawn, "images": [[]] * len(drawn)} | {
        key: [key] * len(drawn) for key in ("prompt", "chosen", "rejected")
    }
    args = trl.DPOConfig(
        str(tmp_path / "trl"), per_device_train_batch_size=4, max_steps=number, learning_rate=1e-3 if adapted else 1e-4,
        lr_scheduler_type="constant", logging_steps=1, report_to=[], remove_unused_columns=False, use_cpu=True,
        loss_type=[kind], bf16=False, gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, seed=0,
        max_length=None,
    )  # fmt: skip
    losses = []

    class Recorded(trl.DPOTrainer):
        def _get_train_sampler(self, *ignored):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def _compute_loss(self, *args):
            losses.append(super()._compute_loss(*args))
            return losses[-1]

    peer = Recorded(
        theirs, reference, args, lambda found: padded([task.dataset[row["number"]] for row in found]),
        datasets.Dataset.from_dict(rows), processing_class=transformers.AutoProcessor.from_pretrained(world / "base"),
    )  # fmt: skip
    peer.train()
    margins = [row["rewards/margins"] for row in peer.state.log_history if "rewards/margins" in row]
    ours = steps(trainer, number)
    assert len(losses) == len(margins) == len(ours) == number
    assert max(abs(a.item() - b["loss"]) for a, b in zip(losses, ours)) <= 1e-5
    assert max(abs(a - b["reward_margin"]) for a, b in zip(margins, ours)) <= 1e-5
    assert ours[-1]["reward_margin"] > 0.01 and ours[0]["reward_margin"] == 0  # something was learned


def test_the_start_in_every_way_is_one(world, tmp_path):
    """Kept beside the model or cached, with adapters or without: the same losses; micro-batches change nothing."""
    for name, sets in {"full": [], "lora": [LORA]}.items():  # with lora the projector is trained in full beside it
        fast = ["stage.dpo.lr={projector = 1e-2, decoder = 1e-2}", *sets]
        ways = {"kept": [], "cached": ["stage.dpo.dpo.cached=true"], "split": ["stage.dpo.micro_batch=1"]}
        found = {
            way: steps(trainer_of(world, tmp_path / f"{name}-{way}", *fast, *more), 6) for way, more in ways.items()
        }
        assert found["kept"][-1]["reward_margin"] > 0.5
        for way in ("cached", "split"):
            for mine, kept in zip(found[way], found["kept"], strict=True):
                assert mine.keys() == kept.keys()
                assert all(mine[key] == pytest.approx(kept[key], abs=2e-4) for key in mine), (name, way)


def test_a_pair_that_was_unusable_when_the_start_was_cached_is_replaced(world, tmp_path):
    dataset = trainer_of(world, tmp_path, "stage.dpo.dpo={cached = true}").task.dataset
    index = 3
    dataset.start_N2[index] = math.nan
    batch = dataset.batch([index, index + 1], 0)
    assert [lost for lost, why in batch.lost] == [index] and "log-probabilities were cached" in batch.lost[0][1]
    assert batch.pairs == 2 and batch.start_P2.isfinite().all()


def test_a_picture_is_seen_once_for_both_answers(world, tmp_path):
    task = trainer_of(world, tmp_path).task
    pairs = [task.dataset[number] for number in range(6)]
    batch, model = task.dataset.pack(pairs), task.model
    assert len(batch.pixels_NCHW) == sum(len(pair.visuals) for pair in pairs) == 4  # 0 and 5 are text alone
    views = []
    model.vision.register_forward_hook(lambda module, args, output: views.append(len(args[0])))
    with torch.no_grad():
        together = task.log_probs(model, batch)
        assert views == [4]
        for number, pair in enumerate(pairs):
            for side, row in enumerate((pair, pair.rejected)):
                pixels = pair.pixels_NCHW
                logits_TV = model(torch.tensor(row.ids), pixels).double().log_softmax(-1)
                wanted = [(t - 1, label) for t, label in enumerate(row.labels) if label >= 0]
                alone = sum(logits_TV[t, label].item() for t, label in wanted)
                assert together[number, side].item() == pytest.approx(alone, abs=1e-4)


def test_only_the_last_answer_is_compared_with_its_end(world):
    samples, report = scan(world / "pairs.json", world)
    assert len(samples) == 40 and not report.problems
    tokenizer = load_tokenizer(world / "tokenizer")
    processor = Processor(read_config(world / "base"), tokenizer)
    for sample in samples:
        pair = encode_pair(sample, processor, 256)
        for row, text in ((pair, sample.messages[-1].text), (pair.rejected, sample.rejected)):
            learned = [label for label in row.labels if label >= 0]
            assert tokenizer.decode(learned, skip_special=False).strip() == f"{text}</s>"


def test_losses_of_pairs():
    """Each loss by hand, and the chosen answer's mean loss a token beside it."""
    now, start, lengths = torch.tensor([[-4.0, -9.0]]), torch.tensor([[-5.0, -6.0]]), torch.tensor([[4, 2]])
    gain = 0.2 * (1.0 - -3.0)
    expected = {
        "sigmoid": math.log1p(math.exp(-gain)),
        "hinge": 1 - gain,
        "ipo": (1 / 4 - -3 / 2 - 1 / 0.4) ** 2,
    }
    for kind, value in expected.items():
        for weight in (0.0, 0.5):
            loss = preference_loss(DPOConfig(0.2, kind, weight), now, start, lengths)
            assert loss.item() == pytest.approx(value + weight * 4 / 4, rel=1e-6)


def test_interrupted_is_uninterrupted(world, tmp_path):
    """The start is that of the stage, not of the checkpoint that a run goes on from."""
    sets = ["stage.dpo.steps=6", "stage.dpo.eval_samples=6", "stage.dpo.save_every=3",
            "stage.dpo.lr={projector = 1e-2, decoder = 1e-2}"]  # fmt: skip
    whole = run_recipe(read_recipe(world / "recipe.toml", sets, str(tmp_path / "whole")))
    stopping = Trainer.train_step

    def stop(self, micros):
        if self.step == 4:
            raise RuntimeError
        return stopping(self, micros)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(Trainer, "train_step", stop)
        run_recipe(read_recipe(world / "recipe.toml", sets, str(tmp_path / "stopped")))
    resumed = run_recipe(read_recipe(world / "recipe.toml", sets, str(tmp_path / "stopped")), resume=True)
    assert resumed == whole
    assert whole["dpo"].keys() == {"eval_loss", "reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy"}
    logs = [[row for row in read_log(tmp_path / name / "log.jsonl") if "loss" in row] for name in ("whole", "stopped")]
    assert [[row["loss"], row["reward_margin"]] for row in logs[0]] == [
        [row["loss"], row["reward_margin"]] for row in logs[1]
    ]


def test_two_ranks_are_one(world, tmp_path):
    """Losses and margins of two ranks that share the model, whatever of the pictures each of them draws."""
    rates = "stage.dpo.lr={projector = 1e-3, decoder = 1e-3}"
    ways = {"full": [rates], "lora": [rates, LORA], "cached": [rates, "stage.dpo.dpo.cached=true"]}
    common = ["stage.dpo.steps=5", "stage.dpo.micro_batch=1", "stage.dpo.batch_size=3"]
    jobs = [
        {"recipe": str(world / "recipe.toml"), "sets": [*common, *sets], "out": str(tmp_path / name)}
        for name, sets in ways.items()
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "ranks.py"), str(tmp_path / "jobs.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for name, sets in ways.items():
        alone = steps(trainer_of(world, tmp_path / f"{name}-1", *common, *sets), 5)
        rows = [row for row in read_log(tmp_path / name / "log.jsonl") if "loss" in row]
        for row, mine in zip(rows, alone, strict=True):
            for key in ("loss", "reward_margin", "reward_chosen", "grad_norm"):
                assert row[key] == pytest.approx(mine[key], abs=2e-5), (name, key)


def test_what_cannot_be_compared_is_refused(world, tmp_path):
    row = {"id": 7, "prompt": "Which?", "chosen": "It is red.", "rejected": "It is blue."}
    prompt = [{"role": "user", "content": "Which?"}]
    wrong = {
        "are the same": {"rejected": "It is red."},
        "'rejected' must be an answer": {"rejected": None},
        "different conversations": {"prompt": None, "chosen": [*prompt, {"role": "assistant", "content": "It."}],
                                    "rejected": [{"role": "user", "content": "Why?"},
                                                 {"role": "assistant", "content": "Yes."}]},
        "'prompt' must be": {"prompt": 3},
    }  # fmt: skip
    for message, changed in wrong.items():
        (tmp_path / "wrong.json").write_text(json.dumps([row | changed]))
        samples, report = scan(tmp_path / "wrong.json", None)
        assert not samples and message in report.problems[0], report.problems
    (tmp_path / "right.json").write_text(json.dumps([row]))
    (sample,) = scan(tmp_path / "right.json", None)[0]
    processor = Processor(read_config(world / "base"), load_tokenizer(world / "tokenizer"))
    whole = len(encode_pair(sample, processor, 256).ids)
    with pytest.raises(UserError, match="has no token to learn"):
        encode_pair(sample, processor, whole // 2)
    with pytest.raises(UserError, match="has no chosen and rejected answer"):
        encode_pair(dataclasses.replace(sample, rejected=None), processor, 256)
    dropout = LORA.replace("dropout = 0.0", "dropout = 0.1")
    with pytest.raises(UserError, match="set it to 0"):
        trainer_of(world, tmp_path / "run", dropout)
