"""What an operation must move and compute, counted by hand at a shape small enough for it."""

import pytest
from kernel_costs import EVERY_OP, HELD, SHAPES, Drawn, Shape, bytes_needed, cost, input_bytes

# 9 slots of 10 bytes each, 8 reads: 2 tokens, 2 heads, 2 slots a head.
SMALL = Shape("small", tokens=2, half_keys=3, width=5, key_width=7, dtype="bfloat16", heads=2, top_k=2, rows=3)
DRAWN = Drawn(distinct_slots=6, selected_reads=3, selected_tokens=2, stepped_rows=6)
HALF_KEYS, QUERIES = 2 * 2 * 3 * 7 * 2, 2 * 2 * 2 * 7 * 2  # bytes

BY_HAND = {
    # every query with 3 half-keys of each half; 8 slots of 8 bytes and scores of 4
    "search": (QUERIES + HALF_KEYS + 96, QUERIES + HALF_KEYS + 96, 2 * 2 * 2 * 3 * 2 * 7),
    # both read and written, or one half-key and one query gathered for either half of a read
    "search backward": (2 * (QUERIES + HALF_KEYS) + 96, QUERIES + HALF_KEYS + 8 * 4 * 14 + 96, 8 * 2 * 2 * 2 * 7),
    # 6 distinct rows, or 8; 2 rows out; 8 slots of 8 bytes and weights of 2
    "lookup": (60 + 20 + 80, 80 + 20 + 80, 2 * 8 * 5),
    "lookup backward, weights": (60 + 20 + 80, 80 + 20 + 80, 2 * 8 * 5),
    # 2 rows of gradient, or 8; 6 rows with their slots out, or 9 rows
    "lookup backward, values sparse": (20 + 60 + 48 + 80, 80 + 60 + 48 + 80, 2 * 8 * 5),
    "lookup backward, values dense": (20 + 90 + 80, 80 + 90 + 80, 2 * 8 * 5),
    "lookup and backward": (160 + 160 + 190, 180 + 180 + 250, 3 * 2 * 8 * 5),
    # gradients of the 2 tokens with a selected read, or of 3 reads; 3 rows out; 8 slots and rows, 3 weights
    "lookup backward, rows": (20 + 30 + 96 + 6, 30 + 30 + 96 + 6, 2 * 3 * 5),
    # 6 slots, gradients, rows in and out
    "SGD step": (48 + 3 * 60, 48 + 3 * 60, 2 * 6 * 5),
    # and 2 moments and a count in float32, in and out
    "Adam step": (48 + 3 * 60 + 2 * 6 * (2 * 5 + 1) * 4, 48 + 3 * 60 + 2 * 6 * (2 * 5 + 1) * 4, 12 * 6 * 5),
}


@pytest.mark.parametrize("op", EVERY_OP)
def test_cost_is_what_one_counts_by_hand(op):
    assert cost(op, SMALL, DRAWN) == BY_HAND[op]


def test_an_operation_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="no operation 'sort', expected one of search"):
        cost("sort", SMALL, DRAWN)


def test_pretraining_search_is_what_the_field_counts():
    """137 GFLOP; queries of 134 MB, half-keys of 4 MB, slots of 8 bytes and scores of 4 for 4.2 M reads."""
    (shape, _), drawn = SHAPES["A"], Drawn(0, 0, 0, 0)
    found = cost("search", shape, drawn)
    assert found.operations == 4 * 32768 * 4 * 1024 * 256
    assert found.floor_bytes == 32768 * 4 * 512 * 2 + 4 * 2048 * 256 * 2 + 32768 * 128 * 12


def test_shapes_are_those_the_project_is_measured_at():
    sizes = {
        shape.name: (shape.tokens, shape.reads_per_token, shape.slots, shape.width, shape.dtype)
        for shapes in SHAPES.values()
        for shape in shapes
    }
    assert sizes == {
        "A V=1024": (32768, 128, 1 << 20, 1024, "bfloat16"),
        "A V=2048": (32768, 128, 1 << 20, 2048, "bfloat16"),
        "B N=1M": (4096, 128, 1 << 20, 1024, "float32"),
        "B N=64k": (4096, 128, 1 << 16, 1024, "float32"),
        "B N=4M": (4096, 128, 1 << 22, 1024, "float32"),
        "C T=1": (1, 128, 1 << 20, 1024, "bfloat16"),
        "C T=16": (16, 128, 1 << 20, 1024, "bfloat16"),
        "D": (2048, 128, 1 << 16, 256, "float32"),
    }


def test_memory_bounds_hold_what_is_certainly_there():
    for op in EVERY_OP:
        for way in HELD.get(op, ("ours", "composition")):
            assert bytes_needed(op, way, SMALL) > 0
    table = 9 * 10
    assert input_bytes(SMALL) > table + QUERIES + HALF_KEYS
    assert bytes_needed("lookup backward, values dense", "ours", SMALL) >= table
    assert bytes_needed("Adam step", "ours", SMALL) >= table + 2 * 9 * 5 * 4
    assert bytes_needed("lookup", "composition", SMALL) >= 8 * 10
