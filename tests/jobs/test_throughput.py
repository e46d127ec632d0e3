"""Arithmetic is counted as by hand, and the clock runs for training alone."""

import time

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from memlayer.decoders.attach import add_memory
from memlayer.jobs.throughput import Clock, flops_per_token, matmul_rate, peak_memory
from memlayer.layers.config import MemoryConfig

VOCAB, D, INNER, L = 100, 16, 24, 32
HEADS_OF_MEMORY, N_KEYS, TOP_K, KEY_WIDTH, V = 2, 8, 3, 8, 16


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_arithmetic_of_a_token_is_that_of_all_products_three_times(attention):
    sizes = {"vocab_size": VOCAB, "hidden_size": D, "intermediate_size": INNER, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    of_attention = 2 * (2 * D * D + 2 * D * D // 2) + 2 * 2 * L * D  # projections, scores and sums over all L
    of_block, of_head = 2 * 3 * D * INNER, 2 * D * VOCAB
    assert flops_per_token(model, L) == 3 * (2 * (of_attention + of_block) + of_head)
    add_memory(
        model,
        MemoryConfig(
            layers=[1], num_keys=N_KEYS, num_heads=HEADS_OF_MEMORY, top_k=TOP_K, key_width=KEY_WIDTH, value_width=V
        ),
    )
    projections = 2 * D * (HEADS_OF_MEMORY * KEY_WIDTH + 2 * V)
    reads = 2 * HEADS_OF_MEMORY * TOP_K * V
    searched = 2 * HEADS_OF_MEMORY * N_KEYS * KEY_WIDTH  # both halves; forward alone
    whole = 3 * (2 * of_attention + of_block + projections + reads + of_head) + searched
    assert flops_per_token(model, L) == whole
    assert model.training


def test_the_search_for_the_ceiling_draws_from_no_generator_of_a_training():
    torch.manual_seed(0)
    assert matmul_rate(torch.device("cpu"), torch.float32) > 1e8
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


def test_the_clock_counts_steps_and_leaves_out_what_is_no_training():
    clock = Clock()
    clock.start()
    time.sleep(0.02)
    assert clock.stop()
    time.sleep(0.2)
    assert not clock.stop()
    clock.count(0.01)
    steps, seconds, waited = clock.lap()
    assert (steps, waited) == (1, 0.01)
    assert 0.02 <= seconds < 0.2
    assert clock.lap() == (0, 0.0, 0.0)


def test_the_most_memory_is_that_of_this_process_in_bytes():
    held = torch.ones(30_000_000)
    assert held.nbytes < peak_memory(torch.device("cpu")) < 2**36
