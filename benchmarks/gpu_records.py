"""What was measured on a GPU, a line a measurement, written as soon as it is there, so that a later call goes on.

A record holds for one commit, machine and set of versions; what failed or lacked something is tried again, after what
was never tried.
"""

import json
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

RECORDS = "records.jsonl"


class Records:
    """The records of one folder.

    Args:
        folder: where records.jsonl is, or will be.
        where: device, versions and commit of this run (report.environment).
        earlier: another such folder, whose records are taken over if this one has none.
    """

    def __init__(self, folder: Path, where: dict, earlier: Path | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._where = folder / RECORDS, where
        if earlier and not self._path.exists() and (earlier / RECORDS).exists():
            shutil.copyfile(earlier / RECORDS, self._path)
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        self.all = {record["name"]: record for record in map(json.loads, lines) if self._holds(record)}

    def _holds(self, record: dict) -> bool:
        known = self._where["commit"] != "unknown" and not self._where["commit"].endswith("-changed")
        return known and all(record[name] == self._where[name] for name in self._where)

    def left(self, names: list[str]) -> list[str]:
        """Those without a record, then those that failed or lacked something."""
        again = [name for name in names if self.all.get(name, {}).keys() & {"failed", "skipped"}]
        return [name for name in names if name not in self.all] + again

    def add(self, name: str, measure: Callable[[], dict | None]) -> None:
        """Measure and write; an error is written too, and None is not: there was no time."""
        try:
            figures = measure()
        except Exception as error:  # the others are measured all the same
            traceback.print_exception(error)
            figures = {"failed": f"{type(error).__name__}: {str(error).strip()[:500]}"}
        if figures is not None:
            record, before = {"name": name, **figures, **self._where}, self.all.get(name)
            self.all[name] = record
            if record == before:  # it lacks what it lacked before
                return
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps({"name": name, **figures}), flush=True)
