"""Methods, one file each: METHODS is the table of those that train, STORES of those that change no weight.

**A method** is a function ``prepare(model, background, settings, lessons=()) -> Prepared``. It gets a causal language
model as it was loaded, the background counts of its tables (None where there are none), its own settings: any object
with the attributes that the method reads, for jobs the dataclass of that name in ``jobs/learn_settings.py``, and, for
methods that look at what is taught before they train, the batch of each lesson's first step. It may freeze, wrap or
hook the model. What it returns is all that a loop needs: a model to run forward, an optimizer to step, and
``finish``, which gives the caller's model back as an ordinary one that has learned::

    prepared = METHODS["full"](model, None, FullConfig(learning_rate=1e-5))
    for batch in batches:
        prepared.model(**batch).loss.backward()
        prepared.optimizer.step()
        prepared.optimizer.zero_grad()
    prepared.finish()

A method that chooses for each step what may move has a ``finetuner`` beside it, whose ``loss`` or ``selecting`` stands
around the forward pass. Its steps need not be the model's: ``ridge`` learns what the memory should say, and changes
rows when it is finished.

**A term** (``terms.py``) is what a step heeds beside its batch, whatever the method: replayed examples, a bound, a
projected gradient. No loop knows a method or a term by its name.

**A store** (``stored.py``) takes a method's place where no weight may change: it keeps the lessons beside the model,
and changes what is asked or what the output head answers.
"""

from memlayer.methods import dense_memory, full, lora, ridge, sparse_mask, sparse_memory
from memlayer.methods.hebbian import Hebbian
from memlayer.methods.nearest import Nearest
from memlayer.methods.prepared import Prepared
from memlayer.methods.retrieval import Retrieval
from memlayer.methods.stored import Store
from memlayer.methods.terms import Term

METHODS = {
    "sparse_memory": sparse_memory.prepare,
    "dense_memory": dense_memory.prepare,
    "full": full.prepare,
    "lora": lora.prepare,
    "sparse_mask": sparse_mask.prepare,
    "ridge": ridge.prepare,
}
STORES: dict[str, type[Store]] = {"retrieval": Retrieval, "nearest": Nearest, "hebbian": Hebbian}

__all__ = ["METHODS", "STORES", "Prepared", "Store", "Term"]
