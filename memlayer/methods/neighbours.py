"""Hidden states at the answers of lessons, and the token that follows each: what nearest.py and hebbian.py answer with.

The states are those that go into the output head. Wherever the model is about to say something in a state near to one
that is kept, the logits are changed, by the rule of the method; everywhere else they stay to the last bit. Nothing is
trained and the model's numbers stay: the change is a hook on the output head, which can be taken off.

It trades memory for steps: 4 D bytes for each token of each wording of each answer, searched in full at every position.
A lesson is found in another wording only as far as the model's own states are alike.

Shapes: T positions, D width, C vocabulary, M states kept, K neighbours.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from memlayer.data.lessons import Lesson
from memlayer.data.qa import Question, collate
from memlayer.evaluation.qa import evaluating
from memlayer.files import reading, writing
from memlayer.methods.terms import unheard

FILE = "neighbours.safetensors"
BATCH = 16  # examples read at a time


@dataclass(frozen=True)
class Kept:
    """States and what follows them.

    Attributes:
        states_MD: float32, what goes into the output head.
        tokens_M: int64, the next token.
    """

    states_MD: Tensor
    tokens_M: Tensor

    def to(self, device: torch.device) -> "Kept":
        """The same on a device."""
        here = self.states_MD.device == device
        return self if here else Kept(self.states_MD.to(device), self.tokens_M.to(device))

    @cached_property
    def mean_D(self) -> Tensor:
        """What the states have in common; in a language model that is most of them."""
        return self.states_MD.mean(0)

    @cached_property
    def unit_MD(self) -> Tensor:
        """The states less their mean, at length 1."""
        return F.normalize(self.states_MD - self.mean_D, dim=-1)

    def nearest(self, states_TD: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The most similar states, by the cosine of what is left without their mean, nearest first.

        Returns:
            similarity_TK and place_TK, of ``number`` states or of all if there are fewer.
        """
        similarity_TM = F.normalize(states_TD.float() - self.mean_D, dim=-1) @ self.unit_MD.T
        found = similarity_TM.topk(min(number, len(self.tokens_M)), dim=-1)
        return found.values, found.indices


def states_of(model: nn.Module, examples: Sequence[dict], progress: Callable[[int], object] = unheard) -> Kept:
    """The states in which a model is about to say the answers' tokens, the answers being told it.

    Args:
        examples: as ``data.qa.encode`` returns them; of a text every token but the first is kept.
        progress: called after each batch with the number of examples it held.

    Raises:
        ValueError: a state is not finite.
    """
    states, tokens = [], []
    head = model.get_output_embeddings()
    heard: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _module, inputs: heard.append(inputs[0]))
    try:
        with evaluating(model), torch.no_grad():
            for start in range(0, len(examples), BATCH):
                found = collate(examples[start : start + BATCH], pad_token_id=0)
                ids_BL, mask_BL = (found[key].to(model.device) for key in ("input_ids", "attention_mask"))
                model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False)
                predicts_BL = found["answer_mask"].bool()
                states.append(heard.pop()[predicts_BL.to(model.device)].float().cpu())
                tokens.append(found["input_ids"].roll(-1, dims=1)[predicts_BL])
                progress(len(ids_BL))
    finally:
        handle.remove()
    kept = Kept(torch.cat(states), torch.cat(tokens))
    if wrong := int((~kept.states_MD.isfinite().all(1)).sum()):
        raise ValueError(f"{wrong} of {len(kept.tokens_M)} states are not finite: nothing is kept")
    return kept


class NeighbourStore(ABC):
    """States beside a model, whose output head answers with them; a ``Store`` but for its rule.

    Args:
        kept: states and tokens.
        alpha: how strongly they answer; 0 leaves every logit as it is.
        num_neighbours: K, the nearest states that count.
        min_similarity: least cosine of the nearest one; below it the model answers alone.
        temperature: how much less a neighbour counts for each step of cosine.
    """

    def __init__(self, kept: Kept, alpha: float, num_neighbours: int, min_similarity: float, temperature: float):
        self.kept, self.alpha = kept, alpha
        self.num_neighbours, self.min_similarity, self.temperature = num_neighbours, min_similarity, temperature

    @classmethod
    def of(
        cls,
        model: nn.Module,
        lessons: Sequence[Lesson],
        encoded: Sequence[Sequence[dict]],
        settings,
        progress: Callable[[int], object] = unheard,
    ) -> Self:
        """Read the lessons once, and keep the states at their answers."""
        return cls._with(states_of(model, list(chain(*encoded)), progress), settings)

    @classmethod
    def _with(cls, kept: Kept, settings) -> Self:
        return cls(kept, settings.alpha, settings.num_neighbours, settings.min_similarity, settings.temperature)

    @classmethod
    def read(cls, folder: Path, settings) -> Self:
        """The states that ``save`` wrote."""
        with reading(path := folder / FILE):
            found = load_file(path)
        return cls._with(Kept(found["states"], found["tokens"]), settings)

    def save(self, folder: Path) -> None:
        """Write states and tokens in one file."""
        folder.mkdir(parents=True, exist_ok=True)
        with writing(path := folder / FILE):
            save_file({"states": self.kept.states_MD.cpu(), "tokens": self.kept.tokens_M.cpu()}, path)

    def ask(self, question: Question, fits: Callable[[Question], bool]) -> Question:
        """The question itself."""
        return question

    def attach(self, model: nn.Module) -> Callable[[], None]:
        """Have the output head answer with what is kept; returns what takes that off again.

        Raises:
            ValueError: the states are of another width, or a token is none of the model's.
        """
        head = model.get_output_embeddings()
        (num_tokens, width), most = head.weight.shape, int(self.kept.tokens_M.max())
        if self.kept.states_MD.shape[1] != width or most >= num_tokens:
            raise ValueError(
                f"the states that are kept have width {self.kept.states_MD.shape[1]} and tokens up to {most}, the "
                f"model's head has width {width} and {num_tokens} tokens"
            )
        return head.register_forward_hook(lambda _head, inputs, logits: self._answer(head, inputs[0], logits)).remove

    def _answer(self, head: nn.Module, states: Tensor, logits: Tensor) -> Tensor:
        self.kept = self.kept.to(states.device)
        similarity_TK, place_TK = self.kept.nearest(states.flatten(0, -2), self.num_neighbours)
        near_T = similarity_TK[:, 0] >= self.min_similarity
        if not near_T.any():
            return logits
        logits_TC = logits.flatten(0, -2).clone()
        found = (logits_TC[near_T].float(), states.flatten(0, -2)[near_T].float(), similarity_TK[near_T])
        logits_TC[near_T] = self.rule(head, *found, place_TK[near_T]).to(logits.dtype)
        return logits_TC.view(logits.shape)

    @abstractmethod
    def rule(
        self, head: nn.Module, logits_TC: Tensor, states_TD: Tensor, similarity_TK: Tensor, place_TK: Tensor
    ) -> Tensor:
        """What the logits become at positions that have a neighbour near enough, float32.

        Args:
            head: the output head.
            logits_TC: what it says there, float32.
            states_TD: what goes into it, float32.
            similarity_TK, place_TK: of the neighbours, nearest first, and where they are in ``kept``.
        """
