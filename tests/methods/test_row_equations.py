"""Rows by least squares: what is solved is the minimum, whatever the order, and a lesson leaves without a trace."""

import pytest
import tiny
import torch

from memlayer.decoders.attach import memory_tables
from memlayer.decoders.fingerprint import product_key_fingerprints, state_fingerprint
from memlayer.methods import row_equations
from memlayer.methods.row_equations import LessonEquations, RowEquations, fingerprint_of

WIDTH, SLOTS = 16, 64


def part(weight, seed=0, positions=5, background=True):
    """A lesson whose positions read six slots each, of which some are not its own and one may come twice."""
    generator = torch.Generator().manual_seed(seed)
    slots_PK = torch.randint(SLOTS, (positions, 6), generator=generator).int()
    heard_N = torch.linspace(0, 0.3, SLOTS, dtype=torch.float64) * background  # of a slot, whoever brings it
    rows_R = slots_PK.long().unique()[1::2]
    return LessonEquations(
        slots_PK,
        torch.rand(positions, 6, generator=generator),
        torch.randn(positions, WIDTH, generator=generator),
        rows_R,
        heard_N[rows_R],
        fingerprint_of(weight, rows_R),
    )


def equations(model, lessons=4, ridge=0.05, **settings):
    (weight,) = (table.weight for table in memory_tables(model).values())
    parts = {f"lesson {seed}": part(weight, seed, **settings) for seed in range(lessons)}
    return RowEquations(tiny.TABLE, SLOTS, product_key_fingerprints(model)[tiny.TABLE], ridge, parts)


def by_brute_force(of):
    """The minimum over stacked equations, a column a slot of the table, by numpy's least squares in float64."""
    parts = list(of.lessons.values())
    rows = sorted({int(slot) for each in parts for slot in each.rows_R})
    damping = {int(s): of.ridge + float(b) for each in parts for s, b in zip(each.rows_R, each.background_R)}
    lines, wanted = [], []
    for each in parts:
        for slots, weights, vector in zip(each.slots_PK.tolist(), each.weights_PK.tolist(), each.wanted_PV):
            line = torch.zeros(len(rows), dtype=torch.float64)
            for slot, weight in zip(slots, weights):
                if slot in rows:
                    line[rows.index(slot)] += weight
            lines.append(line)
            wanted.append(vector.double())
    for place, slot in enumerate(rows):
        line = torch.zeros(len(rows), dtype=torch.float64)
        line[place] = damping[slot] ** 0.5
        lines.append(line)
        wanted.append(torch.zeros(WIDTH, dtype=torch.float64))
    solved = torch.linalg.lstsq(torch.stack(lines), torch.stack(wanted), driver="gelsd").solution
    return torch.tensor(rows), solved


@pytest.mark.parametrize("block", [5, 2048])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("lessons", [1, 4])  # fewer positions than rows, and about as many
def test_what_is_solved_is_the_least_squares_minimum(monkeypatch, lessons, background, block):
    monkeypatch.setattr(row_equations, "BLOCK", block)
    of = equations(tiny.memory_model(), lessons, background=background)
    rows_R, change_RV = of.solve()
    expected_R, expected_RV = by_brute_force(of)
    assert torch.equal(rows_R, expected_R)
    torch.testing.assert_close(change_RV, expected_RV, rtol=1e-9, atol=1e-11)  # float64


def test_the_normal_equations_hold():
    """(sum w w' + damping) d = sum w wanted', the form in which lessons are added up."""
    of = equations(tiny.memory_model())
    rows_R, change_RV = of.solve()
    damping_R = torch.zeros(SLOTS, dtype=torch.float64)
    left_RR, right_RV = torch.zeros(len(rows_R), len(rows_R)).double(), torch.zeros(len(rows_R), WIDTH).double()
    for each in of.lessons.values():
        damping_R[each.rows_R] = of.ridge + each.background_R
        reads_PR = row_equations.dense_reads(each.slots_PK, each.weights_PK, rows_R)
        left_RR += reads_PR.T @ reads_PR
        right_RV += reads_PR.T @ each.wanted_PV.double()
    torch.testing.assert_close((left_RR + damping_R[rows_R].diag()) @ change_RV, right_RV, rtol=1e-9, atol=1e-11)


def test_a_background_that_hears_a_row_keeps_it_small():
    quiet, heard = (equations(tiny.memory_model(), background=background) for background in (False, True))
    lengths = [each.solve()[1].norm(dim=1) for each in (quiet, heard)]
    last = quiet.solve()[0] > SLOTS // 2  # heard most
    assert lengths[1][last].sum() < 0.8 * lengths[0][last].sum()


def test_the_order_of_lessons_changes_no_bit():
    model = tiny.memory_model()
    of = equations(model)
    other = RowEquations(of.table, of.num_slots, of.product_keys, of.ridge, dict(reversed(of.lessons.items())))
    assert list(other.lessons) != list(of.lessons)
    assert of.patch(model).fingerprint == other.patch(model).fingerprint


def test_a_lesson_left_out_leaves_what_a_run_without_it_has_to_the_bit():
    model = tiny.memory_model()
    of, never = equations(model), equations(model, 3)
    without = of.without(["lesson 3"])
    assert without.patch(model).fingerprint == never.patch(model).fingerprint != of.patch(model).fingerprint
    assert "lesson 3" not in without.patch(model).tables[tiny.TABLE].lessons
    assert (
        without.joined(of.without(["lesson 0", "lesson 1", "lesson 2"])).patch(model).fingerprint
        == of.patch(model).fingerprint
    ), "added again"
    nothing = of.without(of.lessons)
    assert nothing.patch(model).num_rows == 0


def test_a_patch_leaves_the_model_as_it_is_and_lays_its_rows_over_it():
    model = tiny.memory_model()
    of, before = equations(model), tiny.snapshot(model)
    fingerprint = state_fingerprint(model)
    patch = of.patch(model)
    assert state_fingerprint(model) == fingerprint
    patch.apply(model)
    rows_R, change_RV = of.solve()
    expected_NV = before[f"{tiny.TABLE}.weight"].double()
    expected_NV[rows_R] += change_RV
    assert torch.equal(model.state_dict()[f"{tiny.TABLE}.weight"], expected_NV.float())
    with pytest.raises(ValueError, match="does not hold at the rows of lesson 'lesson 0' what it held"):
        of.patch(model)
    patch.revert(model)
    assert state_fingerprint(model) == fingerprint


def test_equations_are_read_as_they_were_written(tmp_path):
    model = tiny.memory_model()
    of = equations(model)
    of.save(tmp_path)
    read = RowEquations.load(tmp_path)
    assert read.patch(model).fingerprint == of.patch(model).fingerprint
    assert read.missed() == of.missed()
    assert 0 < read.missed()["lesson 0"] < 1
    (tmp_path / row_equations.FILE).write_bytes(b"half a file")
    with pytest.raises(ValueError, match=row_equations.FILE):
        RowEquations.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"a learning run with learn\.method=ridge writes it"):
        RowEquations.load(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda of: equations(tiny.memory_model(), ridge=0.0), "ridge is 0.0, must be above 0"),
        (lambda of: of.without(["lesson 9"]), "no lesson 'lesson 9' among the 4"),
        (lambda of: of.joined(of), "both equations have lesson 'lesson 0'"),
        (lambda of: of.joined(equations(tiny.memory_model(), ridge=0.1)), "with ridge 0.05 and with 0.1 cannot be"),
        (lambda of: of.patch(tiny.memory_model(seed=1)), "made with other product keys at"),
        (lambda of: of.patch(tiny.memory_model(num_keys=16)), "of 64 slots of table 'model.memory.0', the model has"),
        (lambda of: of.without(of.lessons).solve(), "there is no lesson in the equations"),
    ],
)
def test_what_does_not_fit_is_refused(spoil, sentence):
    with pytest.raises(ValueError, match=sentence):
        spoil(equations(tiny.memory_model()))
