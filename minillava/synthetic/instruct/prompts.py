"""What a language model is asked: LLaVA's three kinds of instruction data (arXiv 2304.08485, section 3).

The model has not seen the picture; it reads captions and boxes and shall write as if it had. Wording and examples are
our own: the authors never released theirs in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minillava.chat.messages import Message
from minillava.synthetic.instruct.scenes import Scene

READS = (
    "You are looking at one picture. What you see of it is written below: a few sentences by different people, then "
    "things in it with their corners [left, top, right, bottom] as shares of its width and height. Write as someone "
    "who sees the picture itself: never mention sentences, captions, boxes, corners or numbers of this kind, and "
    "say nothing that cannot be told from what you see. "
)
FORM = "Write every question on a line that begins with 'Question:' and its answer on one that begins with 'Answer:'."


@dataclass(frozen=True)
class Kind:
    """One kind of data: what is asked for, with an example."""

    task: str
    shown: tuple[str, str]  # a scene and a good reply
    turns: tuple[int, int]  # fewest and most questions of a reply; (0, 0): it is an answer alone


PARK = """A brown dog jumps for a red frisbee on a lawn.
Two kids watch their dog catch a frisbee in the park.
A dog in mid-air, with a bench and trees behind it.

dog: [0.412, 0.301, 0.655, 0.702]
frisbee: [0.640, 0.255, 0.733, 0.330]
person: [0.051, 0.322, 0.158, 0.811]
person: [0.173, 0.390, 0.262, 0.805]
bench: [0.760, 0.560, 0.980, 0.725]"""
KITCHEN = """A woman stirs a pot on a gas stove while a boy on a stool looks on.
A small kitchen where somebody is cooking soup.
Carrots and a knife lie on a board beside the stove.

person: [0.350, 0.105, 0.560, 0.930]
person: [0.585, 0.330, 0.720, 0.880]
oven: [0.120, 0.480, 0.420, 0.990]
carrot: [0.030, 0.450, 0.085, 0.480]
carrot: [0.045, 0.470, 0.102, 0.500]
knife: [0.020, 0.500, 0.110, 0.520]"""

KINDS = {
    "conversation": Kind(
        READS + "Write a conversation of three to six questions about the picture and your answers: what is there, how "
        "many, of which colour, where one thing is to another, what somebody does. Ask only what has a certain "
        "answer; the last questions may need some background knowledge. " + FORM,
        (
            PARK,
            "Question: What is the dog doing?\nAnswer: It is leaping off the ground to catch a red "
            "frisbee.\n\nQuestion: How many people are watching?\nAnswer: Two children are standing on the left "
            "and watching.\n\nQuestion: Where is the bench?\nAnswer: It stands on the right side, behind the "
            "dog.\n\nQuestion: Why is a lawn a good place for this game?\nAnswer: The ground is soft and open, "
            "so a dog can run and land without hurting itself, and the disc does not hit anything on its way.",
        ),
        (2, 10),
    ),
    "detail": Kind(
        READS
        + "Describe the picture in one rich paragraph of at least four sentences: the place, every thing of note, "
        "how many there are, where they stand to each other, what happens. Write the paragraph and nothing else.",
        (
            KITCHEN,
            "In a small kitchen a woman stands at a gas stove and stirs a pot of soup. Close to her on the "
            "right, a boy sits on a stool and follows what she does. On the left beside the stove there is a "
            "cutting board with two carrots and a knife, so the vegetables are probably about to go into the "
            "pot. The stove takes up much of the lower left, and the two people fill the middle of the room, "
            "which makes the scene look warm and a little crowded.",
        ),
        (0, 0),
    ),
    "complex": Kind(
        READS + "Write one question about the picture that takes thought to answer (why, what for, what may come next, "
        "what to take care of), without giving away in it what has to be seen, and an answer of several sentences "
        "that reasons step by step from what is in the picture. " + FORM,
        (
            KITCHEN,
            "Question: What should the adult take care of while the child is here?\nAnswer: The child is within "
            "reach of a lit stove and a hot pot, so splashes and the flame come first: the pot's handle belongs "
            "to the back, and the stool a little away. A knife lies on the board at the edge of the counter as "
            "well; putting it out of reach once the carrots are cut avoids a second danger. Giving the child "
            "something safe to do, such as washing vegetables, keeps curiosity away from both.",
        ),
        (1, 1),
    ),
}
DESCRIBE = (  # what asks for a description; arXiv 2304.08485 has such a list, with other words
    "What do you see in this picture? Tell me everything.",
    "Describe this picture in detail.",
    "Can you give a full account of what is shown here?",
    "Please go through the picture and describe all that is in it.",
    "Write a thorough description of the scene.",
    "What is going on in this photo? Leave nothing out.",
    "Walk me through this picture, from the main things to the small ones.",
    "Explain what this picture shows, with all details that matter.",
)
JUDGE = (
    "Two assistants answered a question about a picture. Decide which answer is better: first of all true to the "
    "picture, with nothing made up; then to the point and complete; a longer answer is not better for its length. "
    "Reply with one letter, A or B, and nothing else."
)


def messages_for(kind: str, scene: Scene) -> list[Message]:
    """The conversation that asks for data of a kind: the task, examples, the scene."""
    wanted = KINDS[kind]
    asked, reply = wanted.shown
    shown = [Message("user", asked), Message("assistant", reply)]
    return [Message("system", wanted.task), *shown, Message("user", str(scene))]


def judged(known: str, question: str, answers: Sequence[str]) -> list[Message]:
    """The conversation that asks which of two answers is better; `known` is what is written of the picture."""
    seen = f"What is in the picture:\n{known}\n\n" if known else ""
    text = f"{seen}Question: {question}\n\nAnswer A: {answers[0]}\n\nAnswer B: {answers[1]}"
    return [Message("system", JUDGE), Message("user", text)]
