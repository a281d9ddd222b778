"""Values of files that Python reads and no number holds."""

import pytest

from minillava.config import VisionConfig
from minillava.errors import UserError
from minillava.schema import Fields, from_dict

HUGE = 10**400  # JSON and TOML may say so; a float cannot


@pytest.mark.parametrize("value", [HUGE, -HUGE, float("inf"), float("nan"), 0, True, "1"])
def test_what_is_no_positive_number_is_a_line(value):
    with pytest.raises(UserError, match=r"config\.json: eps is .*, expected a positive number"):
        Fields({"eps": value}, "config.json").number("eps")


@pytest.mark.parametrize("value", [HUGE, -HUGE, True, "1"])
def test_what_no_float_holds_is_a_line(value):
    with pytest.raises(UserError, match=r"norm_eps: expected a number"):
        from_dict(VisionConfig, {"norm_eps": value}, "config.json")
