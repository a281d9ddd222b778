"""Bad inputs to every command are refused in one line that names the thing and the remedy: bad_inputs.py has them."""

import collections

import bad_inputs
import pytest
from bad_inputs import cases, judge, run, run_rows


def test_there_are_at_least_400_and_no_two_have_one_name():
    names = collections.Counter(case.name for case in cases())
    assert len(names) >= 400 and max(names.values()) == 1, names.most_common(3)


@pytest.mark.parametrize("case", cases()[::29], ids=lambda case: case.name)
def test_a_bad_input_is_refused_in_one_line(case):
    assert not run(case)


def test_each_bad_row_of_jobs_has_an_error_in_its_place():
    assert not {name: message for name, message in run_rows().items() if message}


@pytest.mark.slow
def test_all_bad_inputs_are_refused_in_one_line():
    wrong = {case.name: message for case in cases() if (message := run(case))}
    assert not wrong


@pytest.mark.parametrize(
    ("line", "lacks"),
    [
        ("error: a.png: no such image file; check the path", ""),
        ("error: b.png: no such image file; check the path", "does not name 'a.png'"),
        ("error: a.png: no such image file", "no remedy"),
        ("error: : a.png; check the path", "holds 'error: :'"),
        ("error: a.png: expected tuple; correct it", "holds 'tuple'"),
        ("error: a.png: KeyError: 'x'; correct it", "holds 'KeyError'"),
        (f"error: a.png: {'ab' * 150} is missing; add it", "holds 'abab"),
    ],
)
def test_what_a_line_lacks(line, lacks):
    assert judge(line, ["a.png"]).startswith(lacks) and bool(judge(line, ["a.png"])) == bool(lacks)


def test_the_script_counts_what_it_finds(capsys):
    assert bad_inputs.script("command 'serv'") == 0
    assert capsys.readouterr().out.startswith("1 bad inputs, 0 not refused")
