"""What holds for every test: no network, one thread, and GPU tests only where there is a GPU."""

import importlib.util
import os
from pathlib import Path

import pytest

OFFLINE = Path(__file__).parent / "offline"
OFFLINE_SWITCHES = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def pytest_configure(config):
    """Close the network before any test module, or any library it imports, is loaded."""
    os.environ.update(OFFLINE_SWITCHES)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each of a hundred processes compiles our modules again
    if not _has_gpu():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which transformers does
    python_path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(OFFLINE) not in python_path:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(OFFLINE), *filter(None, python_path)])
    spec = importlib.util.spec_from_file_location("offline_sockets", OFFLINE / "sitecustomize.py")
    offline_sockets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(offline_sockets)
    offline_sockets.refuse_network()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# The files that take longest go first: two processes then end at the same time.
LONGEST = (
    *("test_docs.py", "test_train.py", "test_retrofit.py", "test_save_load.py", "test_compile.py", "test_demo.py"),
    *("test_trainer.py", "test_terms.py", "test_compare.py", "test_families.py", "test_sparse_memory.py"),
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    if not _has_gpu():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tests run two at a time, so more threads would only wait for each other."""
    import torch

    torch.set_num_threads(1)
