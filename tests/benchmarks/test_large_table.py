"""The benchmark runs at a size that takes no disk, and its last line says what it measured."""

import json

import commands
import pytest

SIZES = {"facts": 2, "steps": 2, "small-keys": 32, "large-keys": 48, "width": 64, "layers": 4, "value-width": 64}


@pytest.mark.slow
def test_last_line_says_what_each_table_took(tmp_path):
    sizes = (f"--{name}={value}" for name, value in SIZES.items())
    done = commands.run("benchmarks/large_table.py", f"--folder={tmp_path}", *sizes, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["name"] == "large_table"
    cases = {name: figures for name, figures in result["figures"].items() if isinstance(figures, dict)}
    assert list(cases) == ["small, loaded", "small, mapped", "large, mapped"]
    loaded, mapped, large = cases.values()
    assert (loaded["mapped"], mapped["mapped"]) == (False, True)
    for same in ("rows_changed", "nats_before", "nats_after"):
        assert loaded[same] == mapped[same]
    for case in cases.values():
        assert case["file_untouched"]
        assert case["rows_changed"] > 0
        assert 0 < case["own_peak_bytes"] < case["peak_bytes"]
    assert large["disk_bytes"] < large["table_bytes"]
