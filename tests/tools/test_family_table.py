"""Every causal language model of transformers is tried; docs/families.md says what came of it."""

import importlib.util

import pytest
import transformers
from commands import REPO
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("family_table", REPO / "tools" / "family_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tried(tool, folder, *families):
    for family in families:
        tool.try_in_process(family, folder / "results.jsonl")
    return tool.read(folder / "results.jsonl")


def test_a_family_that_takes_memory_and_one_that_does_not(tool, tmp_path):
    rows = tried(tool, tmp_path, "llama", "mamba")
    assert (rows["llama"]["add"], rows["llama"]["replace"]) == ("yes", "yes")
    assert rows["mamba"]["add"].startswith("refused: no place for memory in MambaForCausalLM")
    table = tool.table(rows)
    assert "| llama | LlamaForCausalLM |  | yes | yes |" in table
    assert "| mamba | no place for memory" in table


def test_a_change_that_loading_loses_is_seen(tool, tmp_path, monkeypatch):
    def forgetful(*args, load=tool.AutoModelForCausalLM.from_pretrained, **kwargs):
        loaded = load(*args, **kwargs)
        if hasattr(getattr(loaded, "model", None), "memory"):
            loaded.model.memory[0].weight.data[0] += 1
        return loaded

    monkeypatch.setattr(tool.AutoModelForCausalLM, "from_pretrained", forgetful)
    assert "1 tensors are not loaded as they were saved" in tried(tool, tmp_path, "llama")["llama"]["add"]


def test_the_committed_table_names_every_family():
    text = (REPO / "docs" / "families.md").read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}," not in text:
        pytest.skip(f"the table is not of transformers {transformers.__version__}")
    lines = text.splitlines()
    named = {line.split("|")[1].strip() for line in lines if line.startswith("| ")}
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= named
    assert not [line for line in lines if "FAILED" in line]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_family_is_accepted_and_then_wrong(tool, tmp_path):
    rows = tried(tool, tmp_path, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not [row for row in rows.values() if "FAILED" in f"{row.get('add')} {row.get('replace')}"]
    assert sum("yes" in (row.get("add"), row.get("replace")) for row in rows.values()) > 100
