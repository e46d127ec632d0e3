"""Several processes, with whole tables and with split ones, do what one does: over gloo, on the CPU.

NCCL is asked for nothing that gloo is not: all_gather of equal parts, all_to_all_single and broadcast of dense tensors.
"""

import pytest
import several
import tiny
import torch
from safetensors.torch import load_file
from training import assert_same

WHOLE, SPLIT = "shards 1", "shards 2"
FIELDS = ("slots", "rows", "originals")


def run_group(number, job, folder):
    """What the processes of a group found, by rank."""
    folder.mkdir()
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number))
    tiny.run_python(several.__file__, job, folder, modules=launch)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(number)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("several")


@pytest.fixture(scope="module")
def one(folder):
    """One process, which also leaves the checkpoints that groups go on from."""
    return {
        "read": several.read_a_table(1),
        "pretrain": several.pretrain(folder / "one" / "pretrain", 1),
        "teach": several.teach(folder / "one" / "teach", 1),
        "sharded": several.train_sharded(folder / "one" / "sharded", 1),
        "all values": several.teach_all_values(folder / "one" / "values"),
    }


@pytest.fixture(scope="module")
def two(folder, one):
    return run_group(2, "quick", folder / "two")


@pytest.fixture(scope="module")
def four(folder, one):
    return run_group(4, "quick", folder / "four")


@pytest.fixture(params=["two", pytest.param("four", marks=pytest.mark.slow)])
def group(request):
    """What each process of a group found, and how its tables may be shared out."""
    found = request.getfixturevalue(request.param)
    return found, [name for name in (WHOLE, SPLIT, "shards 4") if f"read {name}" in found[0]]


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # float32, sums in another order


def assert_same_training(ours, one):
    assert ours["losses"] == pytest.approx(one["losses"], abs=1e-6)
    assert torch.equal(ours["stepped"], one["stepped"]), "the same rows were read in every step"
    assert_close(ours["state"], one["state"])


def test_a_read_and_its_gradients_are_those_of_one_process(one, group):
    found, ways = group
    for name in ways:
        parts = [rank[f"read {name}"] for rank in found]
        for key in ("read", "weights"):
            assert_close(torch.cat([part[key] for part in parts]), one["read"][key])
        for part in parts:
            assert_close(part["gradient"], one["read"]["gradient"])
            assert torch.equal(part["slots"], one["read"]["slots"])
            if name != WHOLE:
                assert torch.equal(part["joined"], several.tiny_table().weight)


def test_pretraining_ends_where_one_process_ends(one, group):
    found, ways = group
    for name in ways:
        ours = [rank[f"pretrain {name}"] for rank in found]
        assert_same_training(ours[0], one["pretrain"])
        for other in ours[1:]:
            assert_same(ours[0]["state"], other["state"])


def test_learning_chooses_the_same_slots_and_makes_the_same_patch(one, group):
    found, ways = group
    for name in ways:
        ours = [rank[f"teach {name}"] for rank in found]
        for key in FIELDS:
            assert_close(ours[0][key], one["teach"][key])
        assert torch.equal(ours[0]["slots"], one["teach"]["slots"])
        unmoved = [n for n, t in one["teach"]["state"].items() if n != f"{tiny.TABLE}.weight"]
        assert all(torch.equal(ours[0]["state"][n], one["teach"]["state"][n]) for n in unmoved)
        for other in ours[1:]:
            assert_same(ours[0], other)


def test_rows_that_no_step_chose_do_not_move_in_a_split_table(one, group):
    found, ways = group
    before = tiny.memory_model().state_dict()[f"{tiny.TABLE}.weight"]
    for name in ways:
        after = found[0][f"teach {name}"]["state"][f"{tiny.TABLE}.weight"]
        moved = (after != before).any(dim=1).nonzero()[:, 0]
        assert torch.equal(moved, found[0][f"teach {name}"]["slots"])


def test_a_method_that_trains_tables_alone_needs_no_reducer(one, group):
    found, _ = group
    table = f"{tiny.TABLE}.weight"
    ours, alone = found[0]["all values"]["state"][table], one["all values"]["state"][table]
    # Adam divides by the gradient's size, so a gradient that is zero but for rounding moves by a whole step.
    assert torch.isclose(ours, alone, atol=1e-5).float().mean() > 0.98
    assert torch.equal(
        (ours != tiny.memory_model().state_dict()[table]).any(1),
        (alone != tiny.memory_model().state_dict()[table]).any(1),
    )


def test_a_folder_saved_by_several_has_the_tensors_and_the_config_of_one(folder, one, group):
    found, ways = group
    where = folder / ("two" if len(found) == 2 else "four")
    for name in ways:
        saved = where / f"pretrain{name.split()[1]}" / "saved"
        tensors = load_file(saved / "model.safetensors")
        state = found[0][f"pretrain {name}"]["state"]
        assert all(torch.equal(tensors[key], state[key]) for key in tensors)
        alone = folder / "one" / "pretrain" / "saved"
        assert load_file(alone / "model.safetensors").keys() == tensors.keys()
        assert sorted(path.name for path in saved.iterdir()) == sorted(path.name for path in alone.iterdir())
        assert (saved / "config.json").read_text() == (alone / "config.json").read_text()


def test_a_checkpoint_of_several_goes_on_in_one_process(folder, one, group):
    found, ways = group
    where = folder / ("two" if len(found) == 2 else "four")
    for name in ways:
        checkpoint = where / f"pretrain{name.split()[1]}" / "checkpoint-2"
        on = several.pretrain(where / f"on_{name}", 1, resume=checkpoint)
        assert_close(on["state"], one["pretrain"]["state"])
        assert torch.equal(on["stepped"], one["pretrain"]["stepped"])
        taught = several.teach(where / f"taught_{name}", 1, resume=where / f"teach{name.split()[1]}" / "checkpoint-1")
        assert torch.equal(taught["slots"], one["teach"]["slots"])
        assert_close(taught["rows"], one["teach"]["rows"])


def test_a_decoder_sharded_by_fsdp2_with_its_tables_left_out_trains_as_one_process_does(folder, one, group):
    found, ways = group
    alone = load_file(folder / "one" / "sharded" / "model.safetensors")
    for name in ways:
        ours = found[0][f"sharded {name}"]
        assert ours["losses"] == pytest.approx(one["sharded"]["losses"], abs=1e-6)
        assert torch.equal(ours["stepped"], one["sharded"]["stepped"])
        saved = folder / ("two" if len(found) == 2 else "four") / f"sharded{name.split()[1]}"
        assert_close(load_file(saved / "model.safetensors"), alone)
        config = folder / "one" / "sharded" / "config.json"
        assert (saved / "config.json").read_text() == config.read_text()


def test_what_is_sent_is_what_the_counting_says(two):
    """Bytes that a process sends for its tokens: see the table in docs/several_devices.md."""
    tokens, others = several.CUTS[2], (1, 0)
    longest, count = max(tokens), 8  # padded to the longest; one number that says how many tokens there are
    for rank, mine in enumerate(tokens):
        theirs, share = tokens[others[rank]], several.WIDTH // 2
        forward = count + longest * several.READS * (4 + 4) + theirs * share * 4
        backward = mine * share * 4 + theirs * several.READS * 4
        assert two[rank][f"read {SPLIT}"]["sent"] == [forward, backward]


def test_what_a_split_table_cannot_do_is_refused_by_name(two):
    said = two[0]["refusals"]
    assert said["width"] == (
        "table 'model.memory.0' has values of width 7, which 2 processes cannot share evenly by columns"
    )
    assert said["groups"] == "2 processes cannot stand in groups of 8"
    assert said["twice"] == "table 'model.memory.0' is split already, over 2 processes"
    assert "join_tables first" in said["between"]
    assert "join_tables first" in said["dense"]
    assert "select 'gradient' in 2 processes" in said["gradient"]
    assert said["sharded"].startswith("a finetuner is attached to table 'model.memory.0'")


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_any_number_of_processes_goes_on_from_the_checkpoint_of_one(folder, one, number):
    found = run_group(number, "slow", folder / f"slow{number}")
    ways = [name for name in (WHOLE, SPLIT, "shards 4") if f"resumed {name}" in found[0]]
    adam = several.teach(folder / f"adam{number}", 1, "adam", torch.bfloat16, max_norm=0.02)
    for name in ways:
        ours = found[0]
        assert_close(ours[f"resumed {name}"]["state"], one["pretrain"]["state"])
        assert torch.equal(ours[f"resumed {name}"]["stepped"], one["pretrain"]["stepped"])
        assert_same_training(ours[f"accumulated {name}"], one["pretrain"])
        assert_same_training(ours[f"recomputed {name}"], one["pretrain"])
        assert torch.equal(ours[f"teach resumed {name}"]["slots"], one["teach"]["slots"])
        assert_close(ours[f"teach resumed {name}"]["rows"], one["teach"]["rows"])
        assert torch.equal(ours[f"adam {name}"]["slots"], adam["slots"])
        moved, alone = ours[f"adam {name}"]["rows"].float(), adam["rows"].float()
        assert torch.isclose(moved, alone, atol=1e-2).float().mean() > 0.99  # bfloat16
