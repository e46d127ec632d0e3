"""Tasks of EleutherAI's lm-evaluation-harness, asked of a model that is loaded.

The harness is a package of its own: ``pip install "memlayer[harness]"``. Without a network it asks what lies on this
machine: a folder of task files whose ``dataset_path`` is json with local ``data_files``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memlayer.evaluation.probes import Probed

METRICS = ("acc_norm", "acc", "exact_match")  # of a task that has several, the first of these


def ask_tasks(
    model, tokenizer, tasks: Sequence[str], folder: str | Path | None = None, limit: int | None = None
) -> list[Probed]:
    """Each task's score on each of its examples, zero-shot or as the task says.

    Args:
        tasks: names, of the harness or of files in ``folder``.
        folder: task files of one's own.
        limit: examples of a task at most.

    Raises:
        ValueError: the harness is not installed, a task is unknown or cannot be loaded, or it has none of METRICS.
    """
    if not tasks:
        return []
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"tasks {', '.join(tasks)} need lm-evaluation-harness ({error}): pip install 'memlayer[harness]'"
        ) from error
    manager = TaskManager(include_path=folder and str(folder))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        where = f" and {folder} has no file of it" if folder else ""
        raise ValueError(f"lm-evaluation-harness has no task {unknown[0]!r}{where}")
    asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    try:
        found = simple_evaluate(
            asked, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=True, bootstrap_iters=0
        )
    except Exception as error:  # whatever the harness, datasets or a hub that is out of reach raise
        raise ValueError(f"tasks {', '.join(tasks)} cannot be asked: {str(error).splitlines()[0]}") from error
    return [_probed(task, samples) for task, samples in found["samples"].items()]


def _probed(task: str, samples: Sequence[dict[str, Any]]) -> Probed:
    in_order = sorted(samples, key=lambda sample: sample["doc_id"])
    metric = next((name for name in METRICS if name in in_order[0]), None)
    if metric is None:
        raise ValueError(f"task {task!r} has none of {', '.join(METRICS)}")
    return Probed(f"{task} ({metric})", "right", [float(sample[metric]) for sample in in_order])
