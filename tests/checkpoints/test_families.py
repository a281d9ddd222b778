"""The registry: what one table writes the same table reads, for every family, and no two towers are taken for one."""

import dataclasses

import pytest

from minillava.checkpoints.config_json import write_config
from minillava.checkpoints.config_keys import write_keys
from minillava.checkpoints.config_parts import read_decoder, read_vision
from minillava.checkpoints.families import DECODERS, TOWERS, tower_type
from minillava.config import ModelConfig
from minillava.errors import UserError


@pytest.mark.parametrize("kind", list(DECODERS))
def test_a_decoder_of_every_family_is_read_as_it_was_written(kind):
    sizes = dict(hidden_size=96, intermediate_size=80, num_attention_heads=6, num_key_value_heads=2, head_dim=8)
    decoder = read_decoder({"model_type": kind, "tie_word_embeddings": True, **sizes}, "x")
    assert (decoder.hidden_size, decoder.num_kv_heads, decoder.head_dim, decoder.tie_embeddings) == (96, 2, 8, True)
    text = write_config(dataclasses.replace(ModelConfig(), decoder=decoder), "bfloat16")["config.json"]["text_config"]
    assert text["model_type"] == kind and sizes.items() <= text.items() and read_decoder(text, "x") == decoder
    for name, value in DECODERS[kind].decides.items():
        other = dataclasses.replace(decoder, **{name: not value})
        with pytest.raises(UserError, match="has no foreign name"):
            write_config(dataclasses.replace(ModelConfig(), decoder=other), "bfloat16")


@pytest.mark.parametrize("kind", [kind for kind, family in TOWERS.items() if family.whole == "llava"])
def test_a_tower_of_every_family_is_read_as_it_was_written(kind):
    vision = read_vision({"model_type": kind, "hidden_size": 96, "image_size": 64}, "x", [-2], False)
    assert tower_type(vision) == kind and vision.hidden_size == 96 and vision.image_size == 64
    config = dataclasses.replace(ModelConfig(), vision=vision)
    tower = write_config(config, "bfloat16")["config.json"]["vision_config"]
    assert tower["model_type"] == kind and read_vision(tower, "x", [-2], False) == vision
    assert write_keys(TOWERS[kind].keys, config).items() <= tower.items()


def test_no_two_towers_decide_the_same():
    decided = [tuple(sorted(family.decides.items())) for family in TOWERS.values()]
    assert len(set(decided)) == len(decided)
