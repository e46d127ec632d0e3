"""The context term: a step is held to what the untouched model says of the answer after the lesson."""

import pytest
import tiny
import torch
from torch.nn import functional as F

from memlayer.data.qa import collate
from memlayer.methods.context import Context, InContext


def example(ids, answer):
    return {"input_ids": ids + answer, "answer_start": len(ids), "length": len(ids) + len(answer)}


def pair(prompt, answer, before=(7, 8, 9), lesson="one", said=None):
    alone, after = example(list(prompt), list(answer)), example([*before, *prompt], list(answer))
    return InContext(lesson, alone, after, len(answer) - 1 if said is None else said)


PAIRS = [pair((10, 11, 12), (20, 21, 2)), pair((13, 14), (30, 2), lesson="two"), pair((15, 16, 17, 18), (22, 2))]


def term_of(pairs=PAIRS, **settings):
    """The term over an untouched model, and another model."""
    base, other = tiny.decoder(), tiny.decoder(seed=1)
    term = Context(pairs, tiny.PAD, batch_size=2, **{"only_right": False, **settings})
    term.begin(base)
    return term, base, other


def by_hand(base, model, pairs=PAIRS):
    """KL of whole distributions, one sequence at a time without padding, over all tokens of the answers."""
    found = []
    for each in pairs:
        logs = []
        for of, told in ((base, each.after), (model, each.alone)):
            ids = torch.tensor([told["input_ids"]])
            logs.append(of(input_ids=ids).logits[0, told["answer_start"] - 1 : -1].log_softmax(-1))
        found.append(F.kl_div(logs[1], logs[0].detach(), log_target=True, reduction="none").sum(-1))
    return torch.cat(found).mean()


def told(pairs=PAIRS, side="right"):
    batch = collate([each.alone for each in pairs], tiny.PAD, "answer")
    if side == "left":
        rows = zip(batch["input_ids"], batch["attention_mask"].sum(1), strict=True)
        batch["input_ids"] = torch.stack([row.roll(len(row) - int(length)) for row, length in rows])
        batch["attention_mask"] = batch["attention_mask"].flip(1)
    return batch


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("left_out", [0, 1])  # positions that a trainer has no logits made of
def test_the_loss_is_the_divergence_of_whole_distributions_and_so_is_its_gradient(side, left_out):
    term, base, other = term_of(num_kept=tiny.VOCAB, weight=0.7)
    batch = told(side=side)
    loss = term.loss(other, batch, other(**tiny.inputs(batch)).logits[:, left_out:])
    torch.testing.assert_close(loss, 0.7 * by_hand(base, other), rtol=1e-4, atol=1e-6)  # float32
    ours = torch.autograd.grad(loss, list(other.parameters()))
    theirs = torch.autograd.grad(0.7 * by_hand(base, other), list(other.parameters()))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_of_the_likeliest_tokens_alone_it_is_no_more_than_the_whole():
    term, base, other = term_of(num_kept=5)
    batch = told()
    loss = term.loss(other, batch, other(**tiny.inputs(batch)).logits)
    assert 0 < loss <= by_hand(base, other)


def test_a_model_that_says_what_the_base_says_in_context_has_no_loss():
    same = [InContext("one", each.alone, each.alone, each.num_said) for each in PAIRS]
    term, base, _ = term_of(same)
    batch = told()
    assert term.loss(base, batch, base(**tiny.inputs(batch)).logits).item() == pytest.approx(0, abs=1e-6)


def test_whether_the_base_is_right_is_whether_greedy_decoding_gives_the_answer():
    base = tiny.decoder()
    right = []
    for prompt in ((10, 11, 12), (13, 14)):
        asked = torch.tensor([[7, 8, 9, *prompt]])
        said = base.generate(
            asked, attention_mask=torch.ones_like(asked), max_new_tokens=3, do_sample=False, eos_token_id=-1
        )
        right.append(pair(prompt, said[0, asked.shape[1] :].tolist(), lesson="right", said=3))
    wrong_end = InContext("ends otherwise", right[0].alone, right[0].after, 3)
    answer = right[1].alone["input_ids"][2:]
    other = pair((13, 14), [(answer[0] + 1) % 40 + 4, *answer[1:]], lesson="right", said=3)
    term, _, model = term_of([*right, wrong_end, other], only_right=True)
    assert term.found() == {
        "context_answers": 4,
        "context_answers_right": 3,
        "context_lessons": 2,
        "context_lessons_right": 1,
    }
    batch = told([other])
    assert term.loss(model, batch, model(**tiny.inputs(batch)).logits) is None, "only right ones are kept"
    batch = told([right[0], other])
    half, alone = (term.loss(model, some, model(**tiny.inputs(some)).logits) for some in (batch, told([right[0]])))
    torch.testing.assert_close(half, alone, rtol=1e-4, atol=1e-6)


def test_an_end_that_the_base_would_not_write_does_not_make_an_answer_wrong():
    base = tiny.decoder()
    asked = torch.tensor([[7, 8, 9, 10, 11]])
    said = int(base(input_ids=asked).logits[0, -1].argmax())
    for num_said, is_right in ((1, 1), (2, 0)):
        term, *_ = term_of([pair((10, 11), (said, 2), said=num_said)])
        assert term.found()["context_answers_right"] == is_right


def test_sequences_without_a_lesson_before_them_have_no_such_loss():
    term, _, other = term_of()
    batch = told([pair((40, 41), (42, 2))])
    assert term.loss(other, batch, other(**tiny.inputs(batch)).logits) is None


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="no example has its lesson's text"):
        Context([], tiny.PAD)
    with pytest.raises(ValueError, match=r"an answer of lesson 'x' is tokens \[3\] alone and \[4\] after the lesson"):
        InContext("x", example([1, 2], [3]), example([5, 1, 2], [4]), 1)
    term, _, other = term_of()
    batch = told()
    with pytest.raises(ValueError, match="the answer of sequence 1 begins 1 positions before the logits do"):
        term.loss(other, batch, other(**tiny.inputs(batch)).logits[:, 2:])
