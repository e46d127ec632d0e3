"""What a memory patch is in words: a few lines for a terminal, and the model card that is saved with it."""

import json

import torch
from huggingface_hub import ModelCard, ModelCardData

from memlayer.patch.base_model import Base
from memlayer.patch.table import TablePatch

# A row that has moved so many times the usual norm of a row is no knowledge.
ABSURD = 1000
PART = {"fingerprint", "provenance"}

CARD = """---
{metadata}
---

# Memory patch

New values for {num_rows:,} rows of the memory of {base}. Every other number of the model stays as it is, and
the original rows are part of the patch, so it can be taken back to the last bit.

```
{tables}
```

## How to apply it

```python
import memlayer

patch = memlayer.MemoryPatch.from_pretrained("name or folder of this patch")
patch.apply(model)  # refuses a model of other rows, product keys or, as far as a sample shows, other weights
patch.revert(model)
```

or, from one model folder to another: `python -m memlayer.patch apply PATCH MODEL OUT`.

## Provenance

```json
{provenance}
```
"""


def describe(tables: dict[str, TablePatch], provenance: dict, base: Base | None) -> str:
    """Tables, rows, size of the change, base, what was taught, and provenance."""
    num_bytes = sum(table.num_bytes for table in tables.values())
    lines = [f"memory patch: {_num_rows(tables):,} rows, {num_bytes:,} bytes with their originals"]
    for name, table in tables.items():
        lines += [f"  {line}" for line in _table_lines(name, table)]
    lines += [_base_line(provenance, base), *_taught_lines(provenance), *_lesson_lines(tables)]
    lines += ["provenance:", *(f"  {line}" for line in _json(provenance).splitlines())]
    return "\n".join(lines)


def parts_of(provenance: dict, key: str) -> list[dict]:
    """The patches of which this one was put together: fingerprint and provenance of each."""
    parts = provenance.get(key)
    return [part for part in parts if isinstance(part, dict) and part.keys() >= PART] if isinstance(parts, list) else []


def _base_line(provenance: dict, base: Base | None) -> str:
    name = provenance.get("base_model") or provenance.get("checkpoint") or "a model that is not named"
    if base is None:
        return f"made for: {name}; its weights outside the memory are not recorded"
    below = ", ".join(patch[:12] for patch in base.patches) or "no other patch"
    return f"made for: {name}, weights {base.weights_sha256['float32'][:12]}, with {below}"


def _taught_lines(provenance: dict) -> list[str]:
    """What a learning run of train.py recorded, or those of which a patch was put together."""
    if parts := parts_of(provenance, "parents") + parts_of(provenance, "squash"):
        return [f"{part['fingerprint'][:12]}: {line}" for part in parts for line in _taught_lines(part["provenance"])]
    data, learn = provenance.get("data"), provenance.get("learn")
    if not (isinstance(data, dict) and isinstance(learn, dict)):
        return ["taught: not recorded"]
    number = "all" if data.get("num_new") is None else data["num_new"]
    facts = data.get("facts") or "the built-in facts"
    how = (f"{key} {learn[key]}" for key in ("learning_rate", "num_rows", "steps_per_fact") if key in learn)
    return [
        f"taught: {number} new facts from number {data.get('first_new', 0)} of {facts}, by "
        f"{learn.get('method')} with {', '.join(how)}"
    ]


def _lesson_lines(tables: dict[str, TablePatch]) -> list[str]:
    """The lessons that the patch tells apart, each with its rows."""
    rows: dict[str, int] = {}
    for table in tables.values():
        for lesson, slots in table.lessons.items():
            rows[lesson] = rows.get(lesson, 0) + len(slots)
    return [f"lessons told apart: {len(rows)}"] * bool(rows) + [f"  {name}: {n:,} rows" for name, n in rows.items()]


def model_card(tables: dict[str, TablePatch], provenance: dict) -> ModelCard:
    """README.md of a patch folder."""
    data = ModelCardData(library_name="memlayer", tags=["memlayer", "memory-patch"], pipeline_tag="text-generation")
    # The Hub refuses a card whose base model is a local folder, so a checkpoint is named in the text alone.
    if base_model := provenance.get("base_model"):
        data.base_model, data.base_model_relation = base_model, "adapter"
    base = base_model or provenance.get("checkpoint")
    return ModelCard(
        CARD.format(
            metadata=data.to_yaml(),
            num_rows=_num_rows(tables),
            base=f"`{base}`" if base else "a model that the provenance does not name",
            tables="\n".join(line for name, table in tables.items() for line in _table_lines(name, table)),
            provenance=_json(provenance),
        )
    )


def _num_rows(tables: dict[str, TablePatch]) -> int:
    return sum(len(table.slots) for table in tables.values())


def _table_lines(name: str, table: TablePatch) -> list[str]:
    num_rows, width = table.rows.shape
    dtype = str(table.rows.dtype).removeprefix("torch.")
    line = f"{name}: {num_rows:,} of {table.num_slots:,} rows of width {width}, {dtype}"
    if not num_rows:
        return [line]
    originals, rows = table.originals.double(), table.rows.double()  # float32 overflows at norms of 1e19
    change = torch.linalg.vector_norm(rows - originals, dim=1)
    length = torch.linalg.vector_norm(originals, dim=1)
    absurd = change > ABSURD * length.median()
    warning = f"  CAREFUL: {int(absurd.sum()):,} rows moved more than {ABSURD:,} times the norm of an original row"
    return [
        f"{line}, slots {int(table.slots[0]):,} to {int(table.slots[-1]):,}",
        f"  norm of a row's change: median {change.median():.4g}, largest {change.max():.4g}, "
        f"all together {torch.linalg.vector_norm(change):.4g}; of an original row: median {length.median():.4g}",
        *([f"{warning}: did the run diverge?"] if absurd.any() and length.median() > 0 else []),
    ]


def _json(provenance: dict) -> str:
    return json.dumps(provenance, indent=2, sort_keys=True)
