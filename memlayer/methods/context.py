"""A term that teaches what the untouched model says when it has the lesson before it.

The model is asked each of a lesson's questions twice before anything moves: alone, and after the lesson's text. What it
says of each token of the answer in the second case is kept, and a step's loss is the divergence from it in the first:
KL(base with the lesson before it || model). Where cross entropy knows one token, this knows what else could stand
there, and it wants no more than the model itself can do once it is told. A model that does not answer rightly after
the lesson teaches the wrong thing: how often it does is told, and only right ones may be kept.

Source: after context distillation (arXiv:2112.00861, 2209.15189), which distils instructions and examples out of a
prompt, and Deep Context Distillation (2503.08727), which does it with documents into low-rank modules, there with the
teacher's hidden states as well. Ours: the lesson's own answer is the text that both are asked for, so nothing is
sampled, and any method's numbers are what moves. Distributions are kept as in ``replay``.

Left out: answers that the model writes itself, which job augment makes of a text.

Shapes: A tokens of an answer, C vocabulary, K tokens kept of a distribution, L tokens, B examples.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memlayer.data.qa import collate
from memlayer.evaluation.qa import evaluating
from memlayer.methods.ngram_regulariser import sequence_key
from memlayer.methods.replay import kl_of_kept
from memlayer.methods.terms import Term, unheard


@dataclass(frozen=True)
class InContext:
    """An example as it is taught, and after its lesson.

    Attributes:
        lesson: its id.
        alone, after: encoded, see ``data.qa.encode``; the answer is the same tokens in both.
        num_said: how many tokens of the answer are its words and not its end.
    """

    lesson: str
    alone: dict
    after: dict
    num_said: int

    def __post_init__(self):
        alone, after = (each["input_ids"][each["answer_start"] :] for each in (self.alone, self.after))
        if alone != after:
            raise ValueError(
                f"an answer of lesson {self.lesson!r} is tokens {alone} alone and {after} after the lesson: "
                "there is nothing to compare token by token"
            )


@dataclass(frozen=True)
class _Kept:
    """What the untouched model said of one answer: its likeliest tokens, and where in the sequence it begins."""

    log_p_AK: Tensor
    token_AK: Tensor
    answer_start: int
    is_right: bool


class Context(Term):
    """The divergence as a term.

    Args:
        examples: those that have a lesson to stand before them; others of a step have no such loss.
        pad_token_id: what fills a batch.
        weight: of the divergence.
        lesson_weight: of the step's own loss beside it; 0 teaches by the divergence alone.
        only_right: whether answers that the untouched model would not give after the lesson have no such loss.
        batch_size: examples at a time when it is asked.
        num_kept: K.

    Raises:
        ValueError: no examples.
    """

    def __init__(
        self,
        examples: Sequence[InContext],
        pad_token_id: int,
        weight: float = 1.0,
        lesson_weight: float = 1.0,
        only_right: bool = True,
        batch_size: int = 8,
        num_kept: int = 64,
    ):
        if not examples:
            raise ValueError("no example has its lesson's text to stand before it")
        self._in_context, self._pad_token_id, self._batch_size = list(examples), pad_token_id, batch_size
        self._weight, self.lesson_weight, self._only_right, self._num_kept = weight, lesson_weight, only_right, num_kept
        self._kept: dict[bytes, _Kept] = {}
        self._right: list[tuple[str, bool]] = []  # the lesson of each example, and whether its answer would be given

    @torch.no_grad()
    def begin(self, model: nn.Module, progress: Callable[[int], object] = unheard) -> None:
        """Keep what the untouched model says of every answer after the lesson."""
        device = next(model.parameters()).device
        with evaluating(model):
            for start in range(0, len(self._in_context), self._batch_size):
                some = self._in_context[start : start + self._batch_size]
                batch = collate([each.after for each in some], self._pad_token_id)
                ids_BL, there_BL = (batch[key].to(device) for key in ("input_ids", "attention_mask"))
                first = min(each.after["answer_start"] for each in some) - 1
                logits_BLC = model(input_ids=ids_BL, attention_mask=there_BL).logits[:, first:]
                for each, logits_LC in zip(some, logits_BLC):
                    self._keep(
                        each, logits_LC[each.after["answer_start"] - 1 - first : each.after["length"] - 1 - first]
                    )
                progress(len(some))

    def _keep(self, each: InContext, logits_AC: Tensor) -> None:
        answer = torch.tensor(each.after["input_ids"][each.after["answer_start"] :], device=logits_AC.device)
        # Greedy decoding gives the answer where each token of it is the likeliest behind those before it.
        is_right = bool((logits_AC.argmax(-1) == answer)[: each.num_said].all())
        self._right.append((each.lesson, is_right))
        top = logits_AC.float().log_softmax(-1).topk(min(self._num_kept, logits_AC.shape[-1]))
        kept = _Kept(top.values.cpu(), top.indices.int().cpu(), each.alone["answer_start"], is_right)
        # What two lessons teach in the same words is asked after the first of them.
        self._kept.setdefault(sequence_key(torch.tensor(each.alone["input_ids"])), kept)

    def found(self) -> dict[str, float]:
        """How many answers, and lessons with all of theirs, the untouched model gives after the lesson."""
        lessons: dict[str, bool] = {}
        for lesson, is_right in self._right:
            lessons[lesson] = lessons.get(lesson, True) and is_right
        return {
            "context_answers": len(self._right),
            "context_answers_right": sum(is_right for _, is_right in self._right),
            "context_lessons": len(lessons),
            "context_lessons_right": sum(lessons.values()),
        }

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor | None:
        """The weighted mean divergence over the tokens of the batch's answers, in nats; None where none counts.

        Args:
            batch: ``input_ids`` and ``attention_mask``.
            logits: of the last positions of the batch, or all.

        Raises:
            ValueError: an answer begins before the logits do.
        """
        ids_BL, there_BL = batch["input_ids"].cpu(), batch["attention_mask"].bool().cpu()
        left_out = ids_BL.shape[1] - logits.shape[1]
        found = []
        for row, (ids_L, there_L) in enumerate(zip(ids_BL, there_BL)):
            kept = self._kept.get(sequence_key(ids_L[there_L]))
            if kept is None or (self._only_right and not kept.is_right):
                continue
            first = int(there_L.nonzero()[0]) + kept.answer_start - 1 - left_out
            if first < 0:
                raise ValueError(f"the answer of sequence {row} begins {-first} positions before the logits do")
            now_AC = logits[row, first : first + len(kept.log_p_AK)]
            found.append(kl_of_kept(kept.log_p_AK.to(logits.device), kept.token_AK.long().to(logits.device), now_AC))
        return self._weight * torch.cat(found).mean() if found else None
