"""Write what an experiment found, for machines and for people: the rows of ``rows.py``, the tables of ``tables.py``."""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from memlayer.evaluation.pareto import pareto_figure
from memlayer.evaluation.rows import CONTROL, check_rows, without_nan
from memlayer.evaluation.tables import markdown
from memlayer.files import write_file


def write_report(
    folder: str | Path,
    title: str,
    rows: Sequence[Mapping],
    provenance: Mapping,
    samples: Iterable[Mapping],
    at_equal_learning: Mapping | None = None,
    note: str | None = None,
) -> Path:
    """Write results.json, report.md, samples.jsonl and pareto.png into the folder, replacing earlier ones.

    Args:
        at_equal_learning: of ``forgetting_at_equal_learning``.
        note: a paragraph under the title.

    Each file is written beside its place and then renamed, so that a crash leaves either the old file or the
    new one. The machine-readable results go first.

    Raises:
        ValueError: a row lacks a key, or there is no row.
    """
    check_rows(rows)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    equal = {"at_equal_learning": at_equal_learning} if at_equal_learning else {}
    results = {"title": title, "rows": list(rows), **equal, "provenance": provenance}
    write_file(folder / "results.json", json.dumps(without_nan(results), indent=1, allow_nan=False) + "\n")
    lines = (json.dumps(without_nan(each), ensure_ascii=False) + "\n" for each in samples)
    write_file(folder / "samples.jsonl", "".join(lines))
    write_file(folder / "report.md", markdown(title, rows, provenance, at_equal_learning, note))
    drawing = io.BytesIO()
    pareto_figure(title, rows, CONTROL).savefig(drawing, format="png", dpi=150)
    write_file(folder / "pareto.png", drawing.getvalue())
    return folder
