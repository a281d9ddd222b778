"""The prompt layouts that LLaVAs were trained with, after conversation.py of LLaVA and LLaVA-NeXT: a table, no code."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """A prompt layout. {text} is the message, {system} the system text, {images} the picture markers alone."""

    first: str  # the first user turn, up to where the model starts writing
    user: str  # every later one
    answer: str  # what the model writes, its stop included: all of it is supervised, and nothing else
    system: str = ""
    tokens: tuple[str, ...] = ()  # special tokens that the layout writes: the vocabulary must have them; last the stop
    around: tuple[str, ...] = ()  # what goes in front of a picture's marker and behind it, and no line break
    stop_strings: tuple[str, ...] = ()  # where the stop is text and no token
    one_turn: bool = False  # a picture and its caption, no conversation


_POLITE = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)
_VICUNA = Template(
    system=_POLITE.format(who="user"),
    first="{system} USER: {text} ASSISTANT:",
    user="USER: {text} ASSISTANT:",
    answer=" {text}</s>",
    tokens=("</s>",),
)
_LLAMA_2 = Template(
    system="You are a helpful language and vision assistant. You are able to understand the visual content that "
    "the user provides, and assist the user with a variety of tasks using natural language.",
    first="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{text} [/INST]",
    user="<s>[INST] {text} [/INST]",
    answer=" {text} </s>",
    tokens=("<s>", "</s>"),
)
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
_LLAMA_3 = _HEADER.format("user") + "{text}<|eot_id|>" + _HEADER.format("assistant")


def _chatml(system: str, between: str = "\n") -> Template:
    """ChatML; `between` turns. It opens every turn but the first, so that no answer is taught to end with it."""
    turn = "<|im_start|>user\n{text}<|im_end|>" + between + "<|im_start|>assistant\n"
    return Template(
        system=system,
        first="<|im_start|>system\n{system}<|im_end|>" + between + turn,
        user=between + turn,
        answer="{text}<|im_end|>",
        tokens=("<|im_start|>", "<|im_end|>"),
    )


# The original trains v0 on "### Human: q\n### Assistant: a\n### " and asks it "###Human: q###Assistant:". Here both
# are the latter, with loss on the answer and the "###" that stops it (there also on headers, which nobody samples).
TEMPLATES: dict[str, Template] = {
    "vicuna_v1": _VICUNA,
    "llava_v1": Template(**{**vars(_VICUNA), "system": _POLITE.format(who="human")}),
    # What llava-1.5-hf's own chat template writes: Vicuna's turns without the system text. The nano model uses it.
    "vicuna_short": Template(**{**vars(_VICUNA), "system": "", "first": _VICUNA.user}),
    "llava_v0": Template(
        system=_POLITE.format(who="human"),
        first="{system}###Human: {text}###Assistant:",
        user="Human: {text}###Assistant:",
        answer=" {text}###",
        stop_strings=("###",),
    ),
    "llava_llama_2": _LLAMA_2,
    # LLaVA-NeXT with Mistral; its code writes earlier answers as Llama-2's template does.
    "mistral_instruct": Template(
        first="[INST] {text} [/INST]", user="[INST] {text} [/INST]", answer=" {text} </s>", tokens=("</s>",)
    ),
    # LLaVA-NeXT and NeXT-Video with Yi: ChatML without line breaks between turns.
    "chatml_direct": _chatml("Answer the questions.", between=""),
    "qwen_1_5": _chatml("You are a helpful assistant."),
    "llama_3": Template(
        system=_LLAMA_2.system,
        first=_HEADER.format("system") + "{system}<|eot_id|>" + _LLAMA_3,
        user=_LLAMA_3,
        answer="{text}<|eot_id|>",
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    # Qwen2.5-VL's, with its default system text.
    "onevision_1_5": dataclasses.replace(
        _chatml("You are a helpful assistant."), around=("<|vision_start|>", "<|vision_end|>")
    ),
    "plain": Template(first="{images}", user="", answer="{text}\n", one_turn=True),
}
