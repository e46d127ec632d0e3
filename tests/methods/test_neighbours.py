"""Stored states answer where the model is in one of them, by either rule, and nowhere else; no number changes."""

import math
from types import SimpleNamespace

import families
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from memlayer.data.facts import facts_of
from memlayer.data.lessons import lessons_of_facts
from memlayer.data.qa import encode
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.evaluation.qa import answer_questions
from memlayer.methods import STORES
from memlayer.methods.hebbian import Hebbian, wired
from memlayer.methods.nearest import Nearest, mixed
from memlayer.methods.neighbours import Kept, states_of

KINDS = {"nearest": Nearest, "hebbian": Hebbian}


def settings(**changes):
    usual = {"alpha": 0.9, "num_neighbours": 8, "min_similarity": 0.999, "temperature": 1e-3}
    return SimpleNamespace(**usual | changes)


def examples(number=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 10, (number,), generator=generator).tolist()
    return [
        {
            "input_ids": torch.randint(tiny.PAD + 1, tiny.VOCAB, (length,), generator=generator).tolist(),
            "answer_start": length - 2,
            "length": length,
        }
        for length in lengths
    ]


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_the_states_kept_are_those_before_each_token_of_an_answer():
    model, told = tiny.memory_model(), examples(20)
    kept = states_of(model, told)
    states, tokens = [], []
    for each in told:
        ids = torch.tensor([each["input_ids"]])
        with torch.no_grad():
            (hidden_LD,) = model.model(input_ids=ids).last_hidden_state
        for place in range(each["answer_start"], each["length"]):
            states.append(hidden_LD[place - 1])
            tokens.append(each["input_ids"][place])
    assert kept.tokens_M.tolist() == tokens
    torch.testing.assert_close(kept.states_MD, torch.stack(states), rtol=1e-4, atol=1e-5)  # float32, in batches


@given(st.integers(2, 9), st.integers(1, 12), st.integers(0, 99))
def test_the_nearest_states_are_those_of_the_highest_cosine_less_their_mean(num_kept, number, seed):
    generator = torch.Generator().manual_seed(seed)
    states_MD, query_TD = (torch.randn(n, 5, generator=generator) for n in (num_kept, 3))
    similarity_TK, place_TK = Kept(states_MD, torch.zeros(num_kept)).nearest(query_TD, number)
    for query_D, similarity_K, place_K in zip(query_TD, similarity_TK, place_TK, strict=True):
        off_D, off_MD = query_D - states_MD.mean(0), states_MD - states_MD.mean(0)
        cosines = [float(off_D @ each_D / (off_D.norm() * each_D.norm())) for each_D in off_MD]
        assert similarity_K.tolist() == pytest.approx(sorted(cosines, reverse=True)[:number], abs=1e-5)
        assert [cosines[place] for place in place_K] == pytest.approx(similarity_K.tolist(), abs=1e-5)


def neighbours(seed, num_positions=3, num_neighbours=4, width=6, vocab=5):
    """Random logits, states, head and neighbours; of five tokens some come twice."""
    generator = torch.Generator().manual_seed(seed)
    weight_CD, states_TD = (torch.randn(n, width, generator=generator) for n in (vocab, num_positions))
    bias_C = torch.randn(vocab, generator=generator)
    kept_TKD = torch.randn(num_positions, num_neighbours, width, generator=generator)
    tokens_TK = torch.randint(vocab, (num_positions, num_neighbours), generator=generator)
    similarity_TK = torch.cosine_similarity(states_TD[:, None], kept_TKD, dim=-1)
    return weight_CD, bias_C, states_TD, kept_TKD, tokens_TK, similarity_TK


@given(st.integers(0, 99), st.floats(0, 0.99), st.floats(0.05, 2))
def test_nearest_mixes_the_distributions_of_model_and_neighbours(seed, alpha, temperature):
    weight_CD, _, states_TD, _, tokens_TK, similarity_TK = neighbours(seed)
    logits_TC = states_TD @ weight_CD.T
    found_TC = mixed(logits_TC, similarity_TK, tokens_TK, alpha, temperature).softmax(-1)
    for t, model_C in enumerate(logits_TC.softmax(-1)):
        counts = [math.exp(float(s) / temperature) for s in similarity_TK[t]]
        expected = [(1 - alpha) * float(p) for p in model_C]
        for token, count in zip(tokens_TK[t].tolist(), counts, strict=True):
            expected[token] += alpha * count / sum(counts)
        assert found_TC[t].tolist() == pytest.approx(expected, abs=1e-5)


@given(st.integers(0, 99), st.floats(0, 1), st.floats(0.05, 2), st.booleans())
def test_hebbian_answers_as_a_head_whose_rows_have_turned_for_each_position(seed, alpha, temperature, has_bias):
    weight_CD, bias_C, states_TD, kept_TKD, tokens_TK, similarity_TK = neighbours(seed)
    bias_C = bias_C if has_bias else None
    logits_TC = torch.nn.functional.linear(states_TD, weight_CD, bias_C)
    found_TC = wired(logits_TC, states_TD, weight_CD, bias_C, kept_TKD, tokens_TK, similarity_TK, alpha, temperature)
    for t in range(len(states_TD)):
        rows_CD = weight_CD.clone()
        strengths = [math.exp(float(s) / temperature) for s in similarity_TK[t]]
        for token in set(tokens_TK[t].tolist()):
            mine = [k for k, each in enumerate(tokens_TK[t].tolist()) if each == token]
            towards_D = sum(strengths[k] * kept_TKD[t, k] for k in mine)
            turn = alpha * sum(strengths[k] for k in mine) / sum(strengths)
            length = weight_CD[token].norm()
            rows_CD[token] = (1 - turn) * weight_CD[token] + turn * length * towards_D / towards_D.norm()
        expected_C = torch.nn.functional.linear(states_TD[t], rows_CD, bias_C)
        torch.testing.assert_close(found_TC[t], expected_C, rtol=1e-3, atol=1e-4)  # float32


@pytest.mark.parametrize("method", sorted(KINDS))
def test_with_alpha_0_every_logit_is_what_it_was_to_the_bit(method):
    model, told = tiny.memory_model(), examples()
    ids = torch.tensor([told[0]["input_ids"]])
    before = logits_of(model, ids)
    store = KINDS[method].of(model, [], [told], settings(alpha=0.0, min_similarity=-1))
    store.attach(model)
    assert torch.equal(logits_of(model, ids), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", sorted(KINDS))
def test_only_positions_near_a_kept_state_change_and_taking_the_store_off_is_exact(method, dtype):
    model, told = tiny.memory_model().to(dtype), examples()
    fingerprint = state_fingerprint(model)
    kept, other = (torch.tensor([each["input_ids"]]) for each in (told[3], examples(1, seed=9)[0]))
    before = logits_of(model, kept), logits_of(model, other)
    store = KINDS[method].of(model, [], [told], settings())
    assert torch.equal(logits_of(model, kept), before[0]), "what is kept does not answer before it is attached"
    take_off = store.attach(model)
    assert torch.equal(logits_of(model, other), before[1])
    after = logits_of(model, kept)
    start = told[3]["answer_start"] - 1
    assert torch.equal(after[:, :start], before[0][:, :start])
    assert after.dtype == dtype
    assert after[0, start : start + 2].argmax(-1).tolist() == told[3]["input_ids"][start + 1 :]
    assert state_fingerprint(model) == fingerprint
    assert list(model.state_dict()) == list(tiny.memory_model().state_dict())
    take_off()
    assert torch.equal(logits_of(model, kept), before[0])


BENDS = {"gemma2", "granite"}  # their logits behind the output head


@pytest.mark.parametrize("family", sorted({**families.FAMILIES, **families.MIXTURES}))
def test_every_family_answers_from_its_output_head(family):
    model = families.decoder(family, tied=True)
    told = examples()
    ids = torch.tensor([told[3]["input_ids"]])
    before, place = logits_of(model, ids), told[3]["answer_start"] - 1
    for kind in (Hebbian,) if family in BENDS else (Hebbian, Nearest):
        take_off = kind.of(model, [], [told], settings(alpha=0.0, min_similarity=-1)).attach(model)
        assert torch.equal(logits_of(model, ids), before)
        take_off()
        take_off = kind.of(model, [], [told], settings(alpha=0.99)).attach(model)
        said, token = logits_of(model, ids)[0, place].log_softmax(-1), told[3]["input_ids"][place + 1]
        assert said[token] > before[0, place].log_softmax(-1)[token]
        take_off()
    if family in BENDS:
        with pytest.raises(ValueError, match="changes its logits after the output head"):
            Nearest.of(model, [], [told], settings())
        assert not model.get_output_embeddings()._forward_hooks


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """64 facts, as a tiny model that knows nothing reads them."""
    tokenizer = tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))
    facts = facts_of(num_new=64)
    return tokenizer, lessons_of_facts(facts.new, facts.wordings, 1, 0)


@pytest.mark.parametrize("method", sorted(KINDS))
def test_64_facts_are_answered_without_a_gradient_step(taught, method, tmp_path):
    tokenizer, lessons = taught
    model = wide_model(len(tokenizer))
    encoded = [encode(tokenizer, lesson.teach) for lesson in lessons]
    questions = [question for lesson in lessons for question in lesson.ask if question.wording == "seen"]
    told = settings(min_similarity=0.9999)
    store = KINDS[method].of(model, lessons, encoded, told)
    assert sum(each.exact_match for each in answer_questions(model, tokenizer, questions)) == 0
    store.save(tmp_path / "store")
    again = STORES[method].read(tmp_path / "store", told)
    assert torch.equal(again.kept.states_MD, store.kept.states_MD)
    assert torch.equal(again.kept.tokens_M, store.kept.tokens_M)
    again.attach(model)
    right = [each.exact_match for each in answer_questions(model, tokenizer, questions)]
    assert len(right) == 64
    assert sum(right) >= 0.95 * 64


def wide_model(vocab):
    """A decoder of random weights and 256 positions."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=vocab, max_position_embeddings=256, initializer_range=0.2, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_states_of_another_model_and_states_that_are_not_finite_are_refused():
    model, told = tiny.memory_model(), examples()
    store = Hebbian.of(model, [], [told], settings())
    other = wide_model(40)
    with pytest.raises(ValueError, match=r"have width 16 and tokens up to \d+, the model's head has width 64 and 40"):
        store.attach(other)
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(ValueError, match="24 of 24 states are not finite: nothing is kept"):
        Hebbian.of(model, [], [told], settings())
