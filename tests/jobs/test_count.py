"""Background counts are what the pretraining text reads, document by document."""

import math
from dataclasses import asdict

import torch
from commands import checkpoint

from memlayer.data.facts import facts_of
from memlayer.data.qa import collate, encode, pretraining_examples
from memlayer.decoders import files
from memlayer.decoders.attach import record_reads
from memlayer.jobs.config import load_config
from memlayer.slots.counts import COUNTS_FILE, load_counts

__all__ = ["checkpoint"]  # a fixture
TABLE, NUM_SLOTS = "model.memory.0", 64


def test_counts_leave_padding_out_and_a_document_is_that_many_sequences_in_a_row(checkpoint):
    config = load_config(checkpoint / "config.yaml")
    facts = facts_of(**asdict(config.data))
    model, tokenizer = files.load(checkpoint)
    encoded = encode(tokenizer, pretraining_examples(facts.known, facts.wordings))
    reads_N, document_frequency_N = (torch.zeros(NUM_SLOTS, dtype=torch.int64) for _ in range(2))
    per_document = config.count.sequences_per_document
    for first in range(0, len(encoded), per_document):
        seen = []
        for sequence in encoded[first : first + per_document]:  # alone, so that nothing is padded
            batch = collate([sequence], tokenizer.pad_token_id)
            with torch.no_grad(), record_reads(model) as reads:
                model(input_ids=batch["input_ids"])
            seen.append(reads.slots(batch["attention_mask"])[TABLE].flatten())
        reads_N += torch.cat(seen).bincount(minlength=NUM_SLOTS)
        document_frequency_N[torch.cat(seen).unique()] += 1
    counts = load_counts(checkpoint / COUNTS_FILE, {TABLE: NUM_SLOTS})[TABLE]
    assert counts.num_documents == math.ceil(len(encoded) / per_document)
    assert counts.document.startswith(f"{per_document} consecutive sequences")
    assert len(encoded) % per_document, "the last document is a shorter one"
    assert torch.equal(counts.reads_N, reads_N)
    assert torch.equal(counts.document_frequency_N, document_frequency_N)
