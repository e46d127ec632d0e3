"""What prompts share is read once, and the answers are those of prompts that are read in full."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig

from memlayer.data.qa import Question, encode_prompts
from memlayer.decoders.attach import add_memory, memory_tables
from memlayer.evaluation import qa
from memlayer.evaluation.prefix import LEAST, common_prefix, read_prefix
from memlayer.layers.config import MemoryConfig

SHOTS = "Where is Oslo? In Norway. Where is Lima? In Peru. Where is Bonn? In Germany. Where is Rome? In Italy. "
QUESTIONS = [
    Question(f"{SHOTS}{text}", ("In Norway",), "f", "known", "seen")
    for text in (
        "Where is Oslo?",
        "Is Lima in Peru or is it in Chile, at number 7?",
        "Rome?",
        "Is Bonn a town in Peru?",
    )
]
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5)


@given(PROMPTS)
def test_the_common_prefix_is_that_of_a_loop_and_leaves_a_token_of_each(prompts):
    length = common_prefix(prompts)
    assert all(prompt[:length] == prompts[0][:length] and len(prompt) > length for prompt in prompts)
    longer = length + 1
    assert any(prompt[:longer] != prompts[0][:longer] or len(prompt) == longer for prompt in prompts)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def model_of(family, tokenizer):
    torch.manual_seed(0)
    ends = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512, "initializer_range": 0.2}
    llama = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama |= {"num_key_value_heads": 1, "initializer_range": 0.2}
    window = 8 if family == "sliding window" else None
    config = GPT2Config(**size, **ends) if family == "gpt2" else MistralConfig(**llama, **ends, sliding_window=window)
    model = AutoModelForCausalLM.from_config(config).eval()
    if family == "memory":
        add_memory(model, MemoryConfig(layers=[1], num_keys=8, num_heads=2, top_k=3))
        torch.nn.init.normal_(memory_tables(model)["model.memory.0"].weight)
    return model


@pytest.mark.parametrize("family", ["memory", "gpt2", "sliding window"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_those_of_prompts_read_in_full(family, batch_size, tokenizer, monkeypatch):
    model = model_of(family, tokenizer)
    found = []
    monkeypatch.setattr(qa, "read_prefix", lambda *args: found.append(read_prefix(*args)) or found[-1])
    shared = qa.answer_questions(model, tokenizer, QUESTIONS, batch_size=batch_size)
    assert (found[0] is None) == (family == "sliding window"), "whose cache forgets"
    monkeypatch.setattr(qa, "read_prefix", lambda *_: None)
    full = qa.answer_questions(model, tokenizer, QUESTIONS, batch_size=batch_size)
    assert [each.prediction for each in shared] == [each.prediction for each in full]
    assert len({each.prediction for each in full}) > 1
    # float32: sums are taken in another order
    assert [each.nll for each in shared] == pytest.approx([each.nll for each in full], rel=1e-4)


@pytest.mark.parametrize("fault", ["another answer", "no cache from outside"])
def test_a_model_that_says_something_else_behind_a_prefix_reads_every_prompt_in_full(fault, tokenizer, monkeypatch):
    model = model_of("gpt2", tokenizer)
    prompts = encode_prompts(tokenizer, [question.prompt for question in QUESTIONS])
    forward = model.forward

    def faulty(*args, past_key_values=None, **kwargs):
        if past_key_values is not None and fault == "no cache from outside":
            raise ValueError("position_ids are incorrect")
        found = forward(*args, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None:
            found.logits[..., 0] += 0.1
        return found

    with torch.no_grad():
        assert read_prefix(model, prompts) is not None
        monkeypatch.setattr(model, "forward", faulty)
        assert read_prefix(model, prompts) is None


def test_little_or_one_prompt_alone_is_not_worth_it(tokenizer):
    model = model_of("gpt2", tokenizer)
    long = list(range(LEAST + 1))
    assert read_prefix(model, [long]) is None
    assert read_prefix(model, [long[:-2] + [7, 8], long]) is None
    with torch.no_grad():
        assert read_prefix(model, [long + [7], long]).ids == long[:-1]


def test_the_model_reads_the_shared_tokens_once(tokenizer, monkeypatch):
    model = model_of("gpt2", tokenizer)
    lengths = []
    model.register_forward_pre_hook(
        lambda _module, args, kwargs: lengths.append(kwargs["input_ids"].shape[-1]), with_kwargs=True
    )
    qa.answer_questions(model, tokenizer, QUESTIONS, batch_size=4)
    prompts = encode_prompts(tokenizer, [question.prompt for question in QUESTIONS])
    first, one_in_full, *rest = lengths
    assert first == common_prefix(prompts) > LEAST
    assert one_in_full == min(map(len, prompts)), "to see that both ways say the same"
    assert max(rest) < min(map(len, prompts))
