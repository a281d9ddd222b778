"""Scores of single answers, 0 to 1, by the rules of each benchmark's paper or official code. Pure functions of texts.

VQA: arXiv 1505.00468 and GT-Vision-Lab/VQA; TextVQA as LLaVA scores it (Facebook's MMF); ChartQA: arXiv 2203.10244;
ANLS: arXiv 1907.00490; ScienceQA, POPE and GQA as haotian-liu/LLaVA reads answers; MME: arXiv 2306.13394.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(DIGITS)}
NUMBERS["none"] = "0"
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# A full stop stays in front of a digit. The official pattern also means to keep one behind a digit, and does not.
PERIOD = re.compile(r"\.(?!\d)")
BETWEEN_DIGITS = re.compile(r"\d,\d")
_NOT = "ai are ca could did does do did had has have is might must need ought sha should was were wo would"
_HAVE = "could might must should would who not they we you what where"
_OTHER = (
    "he'd he's how'd how'll how's it'd it'll ma'am o'clock somebody'll somebody's someone'd someone'll someone's "
    "something'd something'll that's there'd there're there's they'd they'll they're 'twas what'll what're what's "
    "when's where'd where's who'd who'll who's why'll why're why's y'all you'd you'll you're"
)
_TWICE = (
    "couldn't've hadn't've mightn't've shouldn't've wouldn't've he'd've it'd've she'd've somebody'd've someone'd've "
    "something'd've there'd've they'd've we'd've who'd've you'd've"
)
PERIODS = 32  # the official code passes a flag where a count is wanted


def _contractions() -> dict[str, str]:
    """What is written without its apostrophe, or with one of two, -> with all; as the official table, oddities too."""
    ends = {"ai": "ain't", "ca": "can't", "sha": "shan't", "wo": "won't"}
    whole = [ends.get(word, f"{word}n't") for word in _NOT.split()]
    whole += [f"{word}'ve" for word in _HAVE.split()] + _OTHER.split()
    found = {form.replace("'", ""): form for form in whole}
    for form in _TWICE.split():
        first, middle, last = form.split("'")
        found[f"{first}{middle}'{last}"] = found[f"{first}'{middle}{last}"] = form
    for form, *short in (("y'all'll", "yall'll", "y'allll"), ("y'all'd've", "yall'd've", "y'alld've", "y'all'dve")):
        found |= dict.fromkeys(short, form)
    return found | {"somebody'd": "somebodyd", **dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")}


CONTRACTIONS = _contractions()


def without_punctuation(text: str) -> str:
    """A mark is taken out where it stands beside a blank, or the text has a number like 1,000; else it is a blank."""
    found, together = text, BETWEEN_DIGITS.search(text) is not None
    for mark in PUNCTUATION:
        found = found.replace(mark, "" if together or f"{mark} " in text or f" {mark}" in text else " ")
    return PERIOD.sub("", found, count=PERIODS)


def normalised(text: str) -> str:
    """An answer as VQA compares it: lower case, digits for number words, no articles, contractions with apostrophes."""
    text = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def textvqa_normalised(text: str) -> str:
    """An answer as TextVQA's evaluator compares it: commas and question marks go first, 's is a word."""
    return normalised(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def agreement(answer: str, given: Sequence[str]) -> float:
    """min(1, matches / 3), averaged over all ways to leave out one of the people who answered."""
    same = [other == answer for other in given]
    return sum(min(1.0, (sum(same) - mine) / 3) for mine in same) / len(same)


def vqa(answer: str, given: Sequence[str]) -> float:
    """VQA accuracy (VQAv2, OK-VQA, VizWiz). Where all people said the same, nothing is normalised, as there."""
    answer, *given = (re.sub(r"[\n\t]", " ", text).strip() for text in (answer, *given))
    if len(set(given)) > 1:
        answer, given = normalised(answer), [normalised(text) for text in given]
    return agreement(answer, given)


def textvqa(answer: str, given: Sequence[str]) -> float:
    """VQA accuracy with TextVQA's own normalisation, always."""
    return agreement(textvqa_normalised(answer), [textvqa_normalised(text) for text in given])


def gqa(answer: str, truth: str) -> float:
    """The same text, after case and stops at its end."""
    return float(answer.rstrip(".").lower() == truth)


def relaxed(answer: str, truth: str) -> float:
    """ChartQA: within 5 % of a number, otherwise the same text but for case."""
    found, wanted = _number(answer), _number(truth)
    if found is not None and wanted:
        return float(abs(found - wanted) / abs(wanted) <= 0.05)
    return float(answer.lower() == truth.lower())


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls(answer: str, given: Sequence[str], least: float = 0.5) -> float:
    """1 less the edit distance over the length of the longer text, to the nearest answer; 0 below `least`."""
    best = max(_similar(" ".join(answer.lower().split()), " ".join(text.lower().split())) for text in given)
    return best if best >= least else 0.0


def _similar(a: str, b: str) -> float:
    if not a and not b:
        return 1.0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return 1 - row[-1] / max(len(a), len(b))


def letter(answer: str, letters: str = "ABCDE") -> str:
    """The choice that an answer names: "B", "B. ..." or once "The answer is B."; "" where it names none."""
    if answer and answer in letters:
        return answer if len(answer) == 1 else ""
    if answer[:1] and answer[0] in letters and answer[1:3] == ". ":
        return answer[0]
    said = re.findall(r"The answer is ([A-Z]).", answer)
    return said[0] if len(said) == 1 and said[0] in letters else ""


def first_letter(answer: str, letters: str = "ABCD") -> str:
    """The choice that an answer names, as multiple choice is read elsewhere: "B", "(b)", "B.", "B: ..."."""
    found = re.match(r"\(?([A-Za-z])\b", answer.strip())
    return found[1].upper() if found and found[1].upper() in letters else ""


def pope(answer: str) -> str:
    """no where the first sentence has the word No, no or not; else yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def mme(answer: str) -> str:
    """yes, no or other, from the first four letters."""
    said = answer.lower().strip().replace(".", "")
    if len(said) == 1:
        return {"y": "yes", "n": "no"}.get(said, "other")
    return "yes" if "yes" in said[:4] else "no" if "no" in said[:4] else "other"
