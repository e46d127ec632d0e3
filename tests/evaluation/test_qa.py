"""Batched generation gives each question, in its own place, the answer it would get alone."""

import copy
from dataclasses import replace

import pytest
import torch
from encoded import encode_answer, encode_prompt
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from memlayer.data.qa import Example, Question
from memlayer.data.tokenizer import train_tokenizer
from memlayer.evaluation.qa import answer_nll, answer_questions, check_answers, generate

CITIES = ("Paris", "New York", "Łódź", "Rio de Janeiro")
PEOPLE = (
    "Ada Byron",
    "Bo",
    "Cy of the Long Hill by the Sea",
    "Dee Dee Ono",
    "Eve",
    "Finn Ó Briain",
    "Gus",
    "Hal",
)
QUESTIONS = [
    Question(prompt.format(person), (CITIES[index % 4], "nowhere"), f"born|{person}", "known", wording)
    for index, person in enumerate(PEOPLE)
    for prompt, wording in [("Where was {} born?", "seen"), ("{} was born in the city of", "unseen")]
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    text = [f"{question.prompt} {question.answers[0]}" for question in QUESTIONS]
    return train_tokenizer(text, 340, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def llama(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def gpt2(tokenizer):
    """A family with learned absolute positions, which padding on the left would shift."""
    torch.manual_seed(0)
    size = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size, **ends))


@pytest.fixture(scope="module")
def overfit(llama, tokenizer):
    """The Llama trained on these very questions, through the loss that answer_nll reports."""
    optimizer = torch.optim.AdamW(llama.parameters(), lr=3e-3)
    prompts = [encode_prompt(tokenizer, question.prompt) for question in QUESTIONS]
    answers = [encode_answer(tokenizer, question.prompt, question.answers[0]) for question in QUESTIONS]
    for _ in range(80):
        optimizer.zero_grad()
        answer_nll(llama, prompts, answers).mean().backward()
        optimizer.step()
    return llama


def test_an_overfit_model_answers_everything_it_was_trained_on(overfit, tokenizer):
    answered = answer_questions(overfit, tokenizer, QUESTIONS)
    assert [each.prediction for each in answered] == [question.answers[0] for question in QUESTIONS]
    assert all(each.exact_match and each.f1 == 1.0 and each.nll < 0.1 for each in answered)


def test_order_is_kept_whatever_the_batch_size(overfit, tokenizer):
    for batch_size in (1, 3, 256):
        answered = answer_questions(overfit, tokenizer, QUESTIONS, batch_size=batch_size)
        assert [each.question for each in answered] == QUESTIONS
        assert all(each.exact_match for each in answered)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_batched_answers_equal_answers_one_by_one(family, tokenizer, request):
    model = request.getfixturevalue(family)
    batched = answer_questions(model, tokenizer, QUESTIONS, max_new_tokens=24)
    alone = [answer_questions(model, tokenizer, [question], max_new_tokens=24)[0] for question in QUESTIONS]
    assert [each.prediction for each in batched] == [each.prediction for each in alone]
    # float32: padding changes the order of sums, no more
    assert [each.nll for each in batched] == pytest.approx([each.nll for each in alone], rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_equals_taking_the_likeliest_token_by_hand(family, tokenizer, request):
    model = request.getfixturevalue(family).eval()
    prompts = [encode_prompt(tokenizer, question.prompt) for question in QUESTIONS[:4]]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + 6 and (len(ids) == len(prompt) or ids[-1] != tokenizer.eos_token_id):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip())
    assert generate(model, tokenizer, prompts, max_new_tokens=6) == expected


def test_generation_ends_at_every_end_token_of_the_model(llama, tokenizer):
    """Chat models have one for the end of a turn beside the tokenizer's."""
    model, prompt = copy.deepcopy(llama), encode_prompt(tokenizer, QUESTIONS[0].prompt)
    ids = list(prompt)
    for _ in range(6):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    stop = next(token for token in ids[len(prompt) :] if token != ids[len(prompt)])
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, stop]
    written = ids[len(prompt) : ids.index(stop, len(prompt)) + 1]
    assert generate(model, tokenizer, [prompt], max_new_tokens=6) == [tokenizer.decode(written).strip()]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nll_is_the_mean_over_answer_tokens_in_nats(family, tokenizer, request):
    model = request.getfixturevalue(family).eval()
    for answered in answer_questions(model, tokenizer, QUESTIONS):
        prompt = encode_prompt(tokenizer, answered.question.prompt)
        answer = encode_answer(tokenizer, answered.question.prompt, answered.question.answers[0])
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 :].double()
        by_hand = [-logits[i].log_softmax(0)[token].item() for i, token in enumerate(answer)]
        assert answer[-1] == tokenizer.eos_token_id
        assert answered.nll == pytest.approx(sum(by_hand) / len(answer), rel=1e-4)  # float32


def test_the_model_is_left_as_found(llama, tokenizer):
    llama.train()
    llama.model.layers[0].eval()
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    answer_questions(llama, tokenizer, QUESTIONS[:2])
    assert llama.training
    assert not llama.model.layers[0].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
    llama(torch.tensor([[1, 5, 6]])).logits.sum().backward()
    llama.zero_grad()


def test_progress_counts_every_question(llama, tokenizer):
    seen = []
    answer_questions(llama, tokenizer, QUESTIONS, batch_size=5, progress=seen.append)
    assert sum(seen) == len(QUESTIONS)
    assert max(seen) == 5


def test_a_long_answer_of_one_question_leaves_no_room_to_the_others(llama, tokenizer):
    """What a question is asked beside does not change what is made of it."""
    rambling = replace(QUESTIONS[0], answers=("of the Long Hill by the Sea " * 5,), fact="long")
    together = answer_questions(llama, tokenizer, [*QUESTIONS, rambling])
    assert together[:-1] == answer_questions(llama, tokenizer, QUESTIONS)


def test_no_questions_give_no_answers(llama, tokenizer):
    assert answer_questions(llama, tokenizer, []) == []


def test_what_cannot_be_scored_is_refused(llama, tokenizer):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        answer_questions(llama, tokenizer, QUESTIONS, batch_size=0)
    longest = max(len(encode_answer(tokenizer, "Where?", answer)) for answer in CITIES)
    for too_few in (0, longest - 1):
        refusal = f"max_new_tokens is {too_few}: the longest answer, of fact 'born.+', takes {longest} tokens"
        with pytest.raises(ValueError, match=refusal):
            answer_questions(llama, tokenizer, QUESTIONS, max_new_tokens=too_few)
    assert len(answer_questions(llama, tokenizer, QUESTIONS[:4], max_new_tokens=longest)) == 4
    with pytest.raises(ValueError, match=r"'Who\?' has no answer"):
        answer_questions(llama, tokenizer, [Question("Who?", (), "x", "new", "seen")])


def test_answers_that_the_tokenizer_does_not_give_back_are_refused(llama, tokenizer):
    """They would be taught, or asked for, and never be right."""

    class Forgetful:
        """Drops digits as it decodes."""

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, *texts, **rest):
            return tokenizer(*texts, **rest)

        def decode(self, ids, **rest):
            return "".join(letter for letter in tokenizer.decode(ids, **rest) if not letter.isdigit())

    example, question = Example("How tall?", "12 metres"), Question("How tall?", ("12 metres",), "h|x", "new", "seen")
    with pytest.raises(ValueError, match=r"gives answer '12 metres' of 'How tall\?' back as 'metres'"):
        check_answers(Forgetful(), [Example("Who?", "Bo"), example])
    with pytest.raises(ValueError, match=r"gives answer '12 metres' of fact 'h\|x' back as 'metres'"):
        answer_questions(llama, Forgetful(), [*QUESTIONS, question])
    either = Question("How tall?", ("12 metres", "tall"), "h|x", "new", "seen")
    assert len(answer_questions(llama, Forgetful(), [either])) == 1, "an alias is given back"
    check_answers(tokenizer, [example])


LONG = "the old quarter behind the second harbour wall of the northern free city of Lindau on the lake"


def test_a_long_answer_that_is_known_by_heart_is_right(llama, tokenizer):
    """An answer has as many tokens as it needs, whatever their number."""
    model = copy.deepcopy(llama)
    question = Question("Where is Shop Ada?", ("Lindau", LONG), "city|Shop Ada", "new", "seen")
    answer = encode_answer(tokenizer, question.prompt, LONG)
    assert len(answer) > 40
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        answer_nll(model, [encode_prompt(tokenizer, question.prompt)], [answer]).mean().backward()
        optimizer.step()
    (answered,) = answer_questions(model, tokenizer, [question])
    assert (answered.prediction, answered.exact_match) == (LONG, True)


def test_near_the_last_position_answers_do_not_depend_on_the_batch(gpt2, tokenizer):
    """GPT-2 has no position after its last: a prediction that goes on ends there, and only its own."""
    prompts = [f"{word} Bo Gus Hal" * number for word, number in (("a", 1), ("bc", 7), ("bc", 8), ("d", 8))]
    questions = [Question(prompt, (LONG, "Rio"), prompt, "new", "seen") for prompt in prompts]
    lengths = [len(encode_prompt(tokenizer, prompt)) for prompt in prompts]
    needed = len(encode_answer(tokenizer, prompts[0], LONG))
    model = GPT2LMHeadModel(GPT2Config(**gpt2.config.to_diff_dict() | {"n_positions": max(lengths) + needed}))
    together = answer_questions(model, tokenizer, questions)
    alone = [answer_questions(model, tokenizer, [question])[0] for question in questions]
    assert [each.prediction for each in together] == [each.prediction for each in alone]
    short = GPT2LMHeadModel(GPT2Config(**gpt2.config.to_diff_dict() | {"n_positions": max(lengths) + needed - 1}))
    refusal = rf"takes {max(lengths) + needed} tokens with its answer, the model has {max(lengths) + needed - 1} pos"
    with pytest.raises(ValueError, match=refusal):
        answer_questions(short, tokenizer, questions)
