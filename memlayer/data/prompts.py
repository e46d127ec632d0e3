"""How a model is asked: what stands around a question, and where an answer ends.

Teaching and asking go through the same prompts. The default leaves questions and statements as they are, and lets an
answer end with the tokenizer's end token: right for a decoder that was pretrained on them. A language model of the
world wants a frame that says "here comes a question", and ends an answer as its text does, with a new line; a chat
model wants its own template.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from memlayer.data.qa import Example, Question

STYLES = ("plain", "few_shot", "chat")
QUESTION = "{question}"
LESSON = "{lesson}"  # in what stands before a question that is asked after a lesson
ANSWER = "x"  # stands for any answer where a chat template is asked what follows one
# Asked before a question of the style few_shot, where no others are named.
BUILTIN_SHOTS = (
    ("What is the largest planet of the solar system?", "Jupiter"),
    ("In which country is the river Po?", "Italy"),
    ("Who painted The Night Watch?", "Rembrandt"),
    ("Which language is spoken in Brazil?", "Portuguese"),
)

Asked = TypeVar("Asked", Example, Question)


@dataclass(frozen=True)
class Prompts:
    """One way to ask.

    Args:
        style: "plain", the question in its frame; "few_shot", after others that are answered; "chat", as a user's
            message in the tokenizer's chat template.
        frame: text around a question, which stands for ``{question}`` in it.
        end: what ends an answer; nothing is the tokenizer's end token. A chat template has its own.
        shots: questions and answers of the style few_shot.

    Raises:
        ValueError: another style, a frame without ``{question}``, shots or an end that the style has no use for, or
            few_shot without shots.
    """

    style: str = "plain"
    frame: str = QUESTION
    end: str = ""
    shots: Sequence[tuple[str, str]] = ()

    def __post_init__(self):
        if self.style not in STYLES:
            raise ValueError(f"the style of prompts is {self.style!r}, must be one of {', '.join(STYLES)}")
        if self.frame.count(QUESTION) != 1:
            raise ValueError(f"the frame of prompts is {self.frame!r}, must hold {QUESTION} once")
        if bool(self.shots) != (self.style == "few_shot"):
            raise ValueError(f"prompts of style {self.style!r} have {len(self.shots)} answered questions before each")
        if self.style == "few_shot" and not self.end:
            raise ValueError("prompts of style 'few_shot' need an end: what parts an answer from the next question")
        if self.style == "chat" and self.end:
            raise ValueError(f"the end of prompts is {self.end!r}: in style 'chat' the template has its own")

    def apply(self, asked: Asked, tokenizer) -> Asked:
        """An example or a question as the model reads it.

        Raises:
            ValueError: the style is chat, and the tokenizer has no chat template, or one that changes answers.
        """
        if isinstance(asked, Example) and asked.is_text:
            return asked
        if not asked.is_question:
            return replace(asked, end=self.end)
        if self.style == "chat":
            prompt, end = self._chat(asked.prompt, tokenizer)
            return replace(asked, prompt=prompt, joint="", end=end)
        before = "".join(f"{self._framed(question)} {answer}{self.end}" for question, answer in self.shots)
        joint = asked.joint if self.frame == QUESTION else " "
        return replace(asked, prompt=before + self._framed(asked.prompt), joint=joint, end=self.end)

    def _framed(self, question: str) -> str:
        return self.frame.replace(QUESTION, question)

    def _chat(self, question: str, tokenizer) -> tuple[str, str]:
        """The prompt of a chat, and what ends the answer to it."""
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("prompts of style 'chat' need a tokenizer with a chat template, this one has none")
        asked = [{"role": "user", "content": self._framed(question)}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        answered = [*asked, {"role": "assistant", "content": ANSWER}]
        whole = tokenizer.apply_chat_template(answered, tokenize=False)
        if not whole.startswith(prompt + ANSWER):
            raise ValueError("the chat template puts something between its prompt and an answer: it cannot be taught")
        return prompt, whole[len(prompt + ANSWER) :].strip()
