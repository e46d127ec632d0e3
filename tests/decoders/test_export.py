"""A folder saved with its code is the same model where memlayer is not installed."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from memlayer import MemoryConfig, add_memory
from memlayer.decoders.export import FILES

# Stands for an installation without memlayer: both of its packages cannot be found.
WITHOUT_MEMLAYER = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("memlayer", "memlayer_kernels"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Hidden())
import torch
from transformers import AutoModelForCausalLM

expected = torch.load(sys.argv[2])
ids = expected["ids"]
for folder in (sys.argv[1], sys.argv[1] + "_again"):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    state = model.state_dict()
    assert state.keys() == expected["state"].keys()
    assert all(torch.equal(tensor, expected["state"][name]) for name, tensor in state.items())
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected["logits"], rtol=0, atol=1e-5)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected["generated"])
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected["grads"][name], rtol=1e-4, atol=1e-6)
    model.save_pretrained(sys.argv[1] + "_again")
print(type(model).__name__, type(model).__module__)
"""


@pytest.mark.parametrize(
    "memory",
    [
        pytest.param({"mode": "add", "share": False}, id="add"),
        pytest.param({"mode": "replace"}, id="replace", marks=pytest.mark.slow),
    ],
)
def test_exported_code_gives_the_same_model_without_memlayer(tmp_path, monkeypatch, memory):
    model = tiny.memory_model(layers=[0, 2], **memory)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    ids = tiny.batch()["input_ids"]
    model.save_pretrained(tmp_path / "exported", export_code=True)
    expected = {"ids": ids, "state": model.state_dict(), "logits": model(ids).logits.detach()}
    expected["generated"] = model.generate(ids, max_new_tokens=5, do_sample=False)
    model(ids, labels=ids).loss.backward()
    expected["grads"] = {name: p.grad.to_dense() for name, p in model.named_parameters()}
    torch.save(expected, tmp_path / "expected.pt")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    printed = tiny.run_python(WITHOUT_MEMLAYER, tmp_path / "exported", tmp_path / "expected.pt")
    assert printed.split()[0] == type(model).__name__
    assert printed.split()[1].startswith("transformers_modules.")


def test_exported_code_imports_nothing_but_torch_and_transformers(tmp_path):
    tiny.memory_model(layers=[1]).save_pretrained(tmp_path, export_code=True)
    written = {path.stem: path.read_text() for path in tmp_path.glob("*.py")}
    assert written.keys() == set(FILES.values())
    standard = {"collections", "contextlib", "copy", "dataclasses", "functools", "inspect", "itertools", "pathlib"}
    standard |= {"re", "shutil", "typing"}
    for name, source in written.items():
        imports = [line.split()[1] for line in source.splitlines() if line.startswith(("from ", "import "))]
        packages = {module.split(".")[0] for module in imports if not module.startswith(".")}
        assert packages <= standard | {"torch", "transformers"}, name


def test_an_exported_folder_loads_with_memlayer_as_its_own_class_and_keeps_its_code(tmp_path):
    model = tiny.memory_model(layers=[1])
    model.save_pretrained(tmp_path / "one", export_code=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", trust_remote_code=True)
    assert type(loaded) is type(model)
    loaded.save_pretrained(tmp_path / "two")
    names = {path.name for path in (tmp_path / "one").glob("*.py")}
    assert names == {path.name for path in (tmp_path / "two").glob("*.py")}


def test_no_code_is_written_unless_asked_for(tmp_path):
    tiny.memory_model(layers=[1]).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))


def test_uploading_code_in_the_call_that_writes_it_is_refused(tmp_path):
    model = add_memory(tiny.decoder(), MemoryConfig([1], 8, 2, 3))
    with pytest.raises(ValueError, match="uploaded by push_to_hub, called after save_pretrained"):
        model.save_pretrained(tmp_path, export_code=True, push_to_hub=True)
