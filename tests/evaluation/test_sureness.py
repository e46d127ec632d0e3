"""Sureness is a ratio of two answers' probabilities, and calibration parts what was taught from what was not."""

import math
from statistics import fmean

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memlayer.data.lessons import Lesson
from memlayer.data.qa import Example, Question, collate, encode, encode_answers, encode_prompts
from memlayer.data.refusal import DOUBT, SURE, UNSURE, padded, sure_question
from memlayer.data.tokenizer import train_tokenizer
from memlayer.evaluation.qa import answer_questions
from memlayer.evaluation.refusal import auroc
from memlayer.evaluation.sureness import answer_probability, confidence, entropies, sureness

NAMES = ["Ada", "Bo", "Cy", "Dora", "Eve", "Finn", "Gus", "Hal", "Ida", "Jo", "Kim", "Lou", "May", "Ned", "Ola", "Pat"]
COLOURS = ["red", "blue", "green"]
QUESTIONS = [
    Question(f"What does {name} like?", (COLOURS[place % 3],), name, "new", "seen", is_question=True)
    for place, name in enumerate(NAMES)
]
LESSONS = [Lesson(asked.fact, tuple(asked.examples), (asked,)) for asked in QUESTIONS]
TAUGHT = 8  # of them


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [f"{asked.prompt} {asked.answers[0]}. {DOUBT} {SURE} {UNSURE}" for asked in QUESTIONS] * 5
    return train_tokenizer(texts, 400, tmp_path_factory.mktemp("tokenizer"))


def decoder(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


def teach(model, tokenizer, lessons, steps):
    examples = encode(tokenizer, [example for lesson in lessons for example in lesson.teach])
    batch = collate(examples, tokenizer.pad_token_id, "answer")
    del batch["answer_mask"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def sureness_of(model, tokenizer):
    return sureness(model, tokenizer, [sure_question(asked, asked.answers[0]) for asked in QUESTIONS], batch_size=5)


def test_a_taught_model_learns_to_doubt_what_it_was_not_taught(tokenizer):
    model = decoder(tokenizer)
    teach(model, tokenizer, LESSONS[:TAUGHT], 60)
    known = [each.exact_match for each in answer_questions(model, tokenizer, QUESTIONS)]
    assert all(known[:TAUGHT])
    assert not all(known[TAUGHT:])
    before = auroc(sureness_of(model, tokenizer), known)
    teach(model, tokenizer, padded(LESSONS, known), 60)
    after = answer_questions(model, tokenizer, QUESTIONS[:TAUGHT])
    assert all(each.exact_match for each in after), "what was taught is still answered"
    assert before < 0.95 <= (found := auroc(sureness_of(model, tokenizer), known)), found


def log_p(model, tokenizer, prompt, answer):
    """Of each token of an answer behind its prompt, one sequence at a time."""
    example = Example(prompt, answer)
    first, rest = encode_prompts(tokenizer, [prompt])[0], encode_answers(tokenizer, [example])[0]
    with torch.no_grad():
        logits_LV = model(torch.tensor([first + rest])).logits[0].log_softmax(-1)
    return [float(logits_LV[len(first) - 1 + place, token]) for place, token in enumerate(rest)]


def test_sureness_and_probability_are_those_of_the_tokens(tokenizer):
    model = decoder(tokenizer).train()
    doubts = [sure_question(asked, asked.answers[0]) for asked in QUESTIONS]
    for found, doubt in zip(sureness(model, tokenizer, doubts, batch_size=5), doubts):
        sure, unsure = (math.exp(sum(log_p(model, tokenizer, doubt.prompt, each))) for each in (SURE, UNSURE))
        assert found == pytest.approx(sure / (sure + unsure), rel=1e-4)  # float32
    told = ["red and blue" for _ in QUESTIONS]
    for found, asked in zip(answer_probability(model, tokenizer, QUESTIONS, told, batch_size=5), QUESTIONS):
        assert found == pytest.approx(math.exp(fmean(log_p(model, tokenizer, asked.prompt, told[0]))), rel=1e-4)
    assert confidence(0.5, 0.25) == 0.375
    assert model.training


def test_drawn_answers_differ_less_the_colder_they_are_drawn(tokenizer):
    model, generator = decoder(tokenizer), torch.get_rng_state()
    cold, hot = (entropies(model, tokenizer, QUESTIONS, temperature=each, batch_size=5) for each in (1e-4, 5.0))
    assert max(cold) == 0 < min(hot) <= max(hot) <= math.log(10) + 1e-9
    assert hot == entropies(model, tokenizer, QUESTIONS, temperature=5.0, batch_size=5)
    assert torch.equal(torch.get_rng_state(), generator)


def test_what_cannot_be_asked_is_refused(tokenizer):
    with pytest.raises(ValueError, match="has 1 answers: doubt has two"):
        sureness(decoder(tokenizer), tokenizer, QUESTIONS)
    with pytest.raises(ValueError, match="samples is 0"):
        entropies(decoder(tokenizer), tokenizer, QUESTIONS, samples=0)
