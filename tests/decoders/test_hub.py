"""A model with memory goes to the Hub and comes back through huggingface_hub's own code; the Hub is on this machine."""

import pytest
import tiny
from fake_hub import FakeHub

from memlayer.decoders.fingerprint import state_fingerprint

PUSH = """
import tempfile, tiny
model = tiny.memory_model(layers=[0, 2], share=False)
model.push_to_hub("someone/memory")
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder, export_code=True)
model.push_to_hub("someone/memory-with-code")
"""

PULL = """
import memlayer
from memlayer.decoders.fingerprint import state_fingerprint
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("someone/memory")
print(type(model).__name__, state_fingerprint(model))
"""

PULL_CODE = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("someone/memory-with-code", trust_remote_code=True)
from memlayer.decoders.fingerprint import state_fingerprint
print(type(model).__module__, state_fingerprint(model))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with FakeHub() as hub:
        hub.run_python(tmp_path_factory.mktemp("home"), PUSH)
        yield hub


def test_a_pushed_model_is_pulled_by_another_process_to_the_bit(hub, tmp_path):
    name, fingerprint = hub.run_python(tmp_path, PULL).split()
    model = tiny.memory_model(layers=[0, 2], share=False)
    assert (name, fingerprint) == (type(model).__name__, state_fingerprint(model))


def test_the_card_of_a_pushed_model_is_tagged_and_no_code_is_pushed_unless_exported(hub):
    files = hub.files("someone/memory")
    assert "- memlayer" in files["README.md"].decode()
    assert not [name for name in files if name.endswith(".py")]


def test_exported_code_is_pulled_and_run_by_a_process_that_has_not_imported_memlayer(hub, tmp_path):
    module, fingerprint = hub.run_python(tmp_path, PULL_CODE).split()
    assert module.startswith("transformers_modules.someone.")
    assert fingerprint == state_fingerprint(tiny.memory_model(layers=[0, 2], share=False))
