"""python examples/learn_in_your_own_loop.py --checkpoint runs/pretrain --output runs/own_loop

Teaches built-in new facts in a plain torch loop, saves what changed as a patch, and takes it back. The
checkpoint is one that ``python train.py configs/pretrain.yaml`` wrote.
"""

import argparse
from pathlib import Path

import torch

from memlayer.data.facts import BUILTIN_FACTS, BUILTIN_WORDINGS, load_facts, load_wordings
from memlayer.data.qa import collate, encode, teaching_examples
from memlayer.decoders import files
from memlayer.decoders.attach import memory_tables
from memlayer.decoders.fingerprint import product_key_fingerprints, state_fingerprint
from memlayer.methods.sparse_memory import SparseMemoryFinetuner
from memlayer.slots.counts import load_counts

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", type=Path, default=Path("runs/pretrain"), help="default: %(default)s")
parser.add_argument("--output", type=Path, default=Path("runs/own_loop"), help="default: %(default)s")
parser.add_argument("--num-facts", type=int, default=5, help="default: %(default)s")
options = parser.parse_args()

wordings = load_wordings(BUILTIN_WORDINGS)
facts = [fact for fact in load_facts(BUILTIN_FACTS, wordings) if fact.split == "new"][: options.num_facts]
model, tokenizer = files.load(options.checkpoint)
num_slots = {name: table.num_embeddings for name, table in memory_tables(model).items()}
product_keys = product_key_fingerprints(model)
background = load_counts(options.checkpoint / "background_counts.safetensors", num_slots, product_keys)
before = state_fingerprint(model)

# A fact stays away from the rows of the others: they count as read by 10 more background documents.
finetuner = SparseMemoryFinetuner(model, background, num_rows=400, idf_power=8, protect=10)
optimizer = finetuner.watch(torch.optim.SGD(finetuner.parameters(), lr=10.0))
for fact in facts:
    examples = teaching_examples(fact, wordings, statements=3, questions=3)
    batch = collate(encode(tokenizer, examples), tokenizer.pad_token_id, loss_on="answer")
    losses = []
    finetuner.begin(fact.key)
    for _ in range(5):
        loss = finetuner.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{fact.key}: loss {losses[0]:.2f} -> {losses[-1]:.2f}")

patch = finetuner.detach()
patch.save(options.output / "patch")
print(f"{patch.num_rows} of {sum(num_slots.values())} rows changed, saved in {options.output / 'patch'}")
patch.revert(model)
came_back = state_fingerprint(model) == before
print("reverted: every bit of the model is what it was" if came_back else "reverted, but the model differs")
raise SystemExit(not came_back)
