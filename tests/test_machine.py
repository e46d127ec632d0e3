"""Precision and threads follow from what the processor does fast, and whoever sets them is obeyed."""

import ast
import os
import subprocess
import sys

import pytest
import tiny
import torch
from commands import REPO
from transformers import TrainingArguments

from memlayer import machine
from memlayer.decoders import files
from memlayer.jobs.config import load_config
from memlayer.jobs.preflight import training_arguments
from memlayer.layers.config import MemoryConfig
from memlayer_kernels import short_waits


def as_processor(monkeypatch, name, capability, **instructions):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("platform.machine", lambda: name)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for each in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{each}_supported", lambda each=each: instructions.get(each, False))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)


@pytest.mark.parametrize(
    ("capability", "instructions", "fast"),
    [
        ("AVX2", {}, False),
        ("AVX512", {}, False),
        ("AVX512", {"avx512_bf16": True}, True),
        ("AVX512", {"amx_tile": True}, True),
        ("AVX2", {"avx512_bf16": True}, False),  # ATEN_CPU_CAPABILITY=avx2 on a processor that has more
    ],
)
def test_bfloat16_is_fast_where_the_processor_has_instructions_for_it(monkeypatch, capability, instructions, fast):
    as_processor(monkeypatch, "x86_64", capability, **instructions)
    assert machine.has_fast_bfloat16() is fast


@pytest.mark.parametrize(("instructions", "expected"), [({}, "sdpa"), ({"avx512_bf16": True}, "eager")])
def test_a_model_has_the_attention_that_the_machine_is_fast_at_built_or_loaded(
    monkeypatch, tmp_path, instructions, expected
):
    as_processor(monkeypatch, "x86_64", "AVX512", **instructions)
    sizes = {"num_layers": 2, "width": 16, "num_heads": 2, "ffn_width": 32, "max_length": 32}
    model = files.build(MemoryConfig(layers=[1], num_keys=8, top_k=2), tiny.tokenizer(tmp_path), **sizes)
    model.save_pretrained(tmp_path)
    loaded = files.load_model(tmp_path)
    assert [each.config._attn_implementation for each in (model, loaded)] == [expected] * 2


def test_instructions_taken_away_from_onednn_count_as_absent(monkeypatch):
    as_processor(monkeypatch, "x86_64", "AVX512", avx512_bf16=True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert not machine.has_fast_bfloat16()


def test_a_mac_without_onednn_takes_float32(monkeypatch):
    as_processor(monkeypatch, "arm64", "DEFAULT")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not machine.has_fast_bfloat16()


def test_auto_is_resolved_and_a_setting_of_ones_own_is_kept(monkeypatch):
    monkeypatch.setattr(machine, "has_fast_bfloat16", lambda: True)
    assert machine.resolve_precision({"bf16": "auto", "save_steps": 3}) == {"bf16": True, "save_steps": 3}
    assert machine.resolve_precision({"bf16": "auto", "fp16": True})["bf16"] is False
    assert machine.resolve_precision({"bf16": False}) == {"bf16": False}
    assert machine.resolve_precision({}) == {}
    with pytest.raises(ValueError, match=r"trainer\.bf16 is 'fast', must be true, false or 'auto'"):
        machine.resolve_precision({"bf16": "fast"})


@pytest.mark.parametrize("fast", [True, False])
def test_the_resolved_config_says_what_auto_came_to(monkeypatch, fast):
    monkeypatch.setattr(machine, "has_fast_bfloat16", lambda: fast)
    assert load_config("configs/pretrain.yaml").trainer["bf16"] is fast


def test_a_macs_gpu_is_left_alone_since_the_kernels_have_no_way_on_it(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert machine.best_device() == torch.device("cpu")
    config = load_config("configs/learn_full.yaml", [f"output={tmp_path}"])
    assert training_arguments(config, per_device_train_batch_size=6).use_cpu


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 2), ("10000 100000", 1), ("max 100000", 64)])
def test_a_container_counts_its_share_of_cores(monkeypatch, tmp_path, quota, cores):
    (tmp_path / "cpu.max").write_text(quota, encoding="utf-8")
    monkeypatch.setattr(machine, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: range(64), raising=False)
    assert machine.usable_cores() == cores


def test_cores_are_counted_where_the_system_does_not_bind_processes(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(machine, "CPU_QUOTA", tmp_path / "none")
    assert machine.usable_cores() == 8


def test_no_more_threads_than_cores_unless_they_are_asked_for(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    try:
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        machine.use_threads()
        assert torch.get_num_threads() == 3
        monkeypatch.delenv("OMP_NUM_THREADS")
        machine.use_threads()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_one_line_says_what_a_run_uses(monkeypatch, tmp_path):
    as_processor(monkeypatch, "x86_64", "AVX2")
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setenv("GOMP_SPINCOUNT", "3000")
    assert machine.describe(TrainingArguments(str(tmp_path), use_cpu=True)) == (
        "running on 2 CPU cores (AVX2) in float32, since this processor has no fast bfloat16; "
        "1 thread, short waits of 3000 turns"
    )
    assert "in bfloat16 autocast; " in machine.describe(TrainingArguments(str(tmp_path), use_cpu=True, bf16=True))


SHORT_WAITS = "import memlayer_kernels.short_waits, sys, os; print('torch' in sys.modules, os.environ.get('{}'))"


@pytest.mark.parametrize(("theirs", "spins"), [({}, {"3000", "30000"}), ({"OMP_WAIT_POLICY": "active"}, {"None"})])
def test_waits_are_settled_before_torch_is_there_and_by_the_user_first(theirs, spins):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {name: value for name, value in os.environ.items() if name not in names} | theirs
    command = [sys.executable, "-c", SHORT_WAITS.format("GOMP_SPINCOUNT")]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    loaded, turns = said.split()
    assert loaded == "False"
    assert turns in spins


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="only Linux says what its processors do")
def test_a_busy_process_is_company_and_clocks_that_stand_or_are_not_there_are_none(monkeypatch, tmp_path):
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        assert short_waits.in_company()
        busy.kill()
    standing = tmp_path / "stat"
    standing.write_text("cpu  10 20 30 40 50 60 70 80 0 0\n", encoding="ascii")
    for clocks in (standing, tmp_path / "absent"):
        monkeypatch.setattr(short_waits, "CLOCKS", str(clocks))
        assert not short_waits.in_company()


@pytest.mark.parametrize("script", ["train.py", "eval.py", "demo.py"])
def test_scripts_settle_waits_before_they_load_torch(script):
    tree = ast.parse((REPO / script).read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert ast.unparse(imports[0]) == "import memlayer_kernels.short_waits"
