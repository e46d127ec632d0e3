"""The patch that forgets what another one taught, for facts that have changed: it moves the same rows the other way.

A model is finetuned on the old answers, which it knows already, and the patch of that run is turned round:

    row = original - strength * (row of the run - original)

Applied to the model as it was before, it takes the old answers out of a few hundred rows; the new ones are taught then.

Source: after F-Learning, Ni et al., arXiv:2311.08011, which subtracts the change of all weights or of a LoRA
(methods/f_learning.py). Ours: only the rows that the old answers read, as a patch that reverts to the bit.
"""

from dataclasses import replace

import torch
from torch import Tensor

from memlayer.patch.memory_patch import MemoryPatch


def forgetting_patch(learned: MemoryPatch, strength: float = 1.0) -> MemoryPatch:
    """Turn a patch round; it protects nothing, since the new answers may well go where the old ones were.

    Args:
        learned: of a run that taught the old answers; to be reverted before this one is applied.
        strength: of forgetting; choose it by lessons that nothing is reported on.

    Raises:
        ValueError: the strength is not above 0.
    """
    if not strength > 0:
        raise ValueError(f"strength is {strength:g}, must be above 0: less would teach what is to be forgotten")
    tables = {}
    for name, table in learned.tables.items():
        rows, originals = _wide(table.rows), _wide(table.originals)
        turned = (originals - strength * (rows - originals)).to(table.rows.dtype)
        nothing = torch.empty(0, dtype=torch.int64)
        tables[name] = replace(table, rows=turned, protected_slots=nothing, protected_documents=nothing)
    told = {"forgets": learned.fingerprint, "strength": strength}
    return MemoryPatch(tables, learned.provenance | told, learned.base)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
