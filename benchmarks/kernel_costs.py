"""What each memory kernel must move and compute, as pure functions of a shape, and the shapes they are timed at.

Two counts of bytes. The floor counts every number an operation needs or makes once, as if caches were endless:
nothing is faster. The traffic counts a row of the table, or of a gradient, again for every read that needs it:
what moves when rows do not stay in cache, so that a kernel which is faster was served by a cache. Sorting
reads, which backward needs but its result does not, is in neither.

Shapes: T tokens, H heads, n half-keys, N = n * n slots, K reads per token (all heads), Q key width of a half, V value
width, R rows a step may change, M = T * K reads, U distinct slots.
"""

from dataclasses import dataclass
from typing import NamedTuple

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
SLOT = 8  # int64
SCORE = 4  # scores, optimizer moments and step counts are float32

SEARCH = ("search", "search backward")
LOOKUP = ("lookup", "lookup backward, weights")
VALUES = ("lookup backward, values sparse", "lookup backward, values dense", "lookup and backward")
ROWS = ("lookup backward, rows",)
STEPS = ("SGD step", "Adam step")
EVERY_OP = SEARCH + LOOKUP + VALUES + ROWS + STEPS


@dataclass(frozen=True)
class Shape:
    """Sizes of one problem."""

    name: str
    tokens: int
    half_keys: int
    width: int
    key_width: int
    dtype: str
    heads: int = 4
    top_k: int = 32
    rows: int = 500
    ops: tuple[str, ...] = EVERY_OP

    @property
    def slots(self) -> int:
        return self.half_keys**2

    @property
    def reads_per_token(self) -> int:
        return self.heads * self.top_k

    @property
    def reads(self) -> int:
        return self.tokens * self.reads_per_token

    @property
    def steps_what_is_read(self) -> bool:
        """Whether optimizers step every slot read; else the R rows, where the values get no gradient."""
        return any(op in VALUES for op in self.ops)

    @property
    def value_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * BYTES[self.dtype]


class Drawn(NamedTuple):
    """What the costs depend on beyond the shape: counts of the reads that were drawn."""

    distinct_slots: int
    selected_reads: int  # reads of the R rows
    selected_tokens: int  # tokens with such a read
    stepped_rows: int


class Cost(NamedTuple):
    """Bytes and floating-point operations of one call; see the top of the file for the two counts of bytes."""

    floor_bytes: int
    traffic_bytes: int
    operations: int


def _pretraining(width: int) -> Shape:
    return Shape(f"A V={width}", tokens=32768, half_keys=1024, width=width, key_width=256, dtype="bfloat16")


def _facts(half_keys: int, name: str, ops: tuple[str, ...]) -> Shape:
    return Shape(name, tokens=4096, half_keys=half_keys, width=1024, key_width=256, dtype="float32", ops=ops)


def _decoding(tokens: int) -> Shape:
    ops = ("search", "lookup")
    return Shape(f"C T={tokens}", tokens, half_keys=1024, width=1024, key_width=256, dtype="bfloat16", ops=ops)


# A pretraining, B fact learning (three sizes of table, which backward into rows must not notice), C decoding, D a CPU.
SHAPES = {
    "A": (_pretraining(1024), _pretraining(2048)),
    "B": (
        _facts(1024, "B N=1M", SEARCH + LOOKUP + ROWS + STEPS),
        _facts(256, "B N=64k", ROWS),
        _facts(2048, "B N=4M", ROWS),
    ),
    "C": (_decoding(1), _decoding(16)),
    "D": (Shape("D", tokens=2048, half_keys=256, width=256, key_width=64, dtype="float32"),),
}


def cost(op: str, shape: Shape, drawn: Drawn) -> Cost:
    """Bytes and operations of one call of an operation of EVERY_OP."""
    element, row = BYTES[shape.dtype], shape.value_bytes
    tokens, reads, distinct = shape.tokens * row, shape.reads, drawn.distinct_slots * row
    addresses = reads * (SLOT + element)  # slots and weights
    products = 2 * reads * shape.width
    match op:
        case "search" | "search backward":
            return _search_cost(op, shape)
        case "lookup":
            return Cost(distinct + tokens + addresses, reads * row + tokens + addresses, products)
        case "lookup backward, weights":  # slots in, as many weights out
            return Cost(distinct + tokens + addresses, reads * row + tokens + addresses, products)
        case "lookup backward, values sparse":
            written = distinct + drawn.distinct_slots * SLOT
            return Cost(tokens + written + addresses, reads * row + written + addresses, products)
        case "lookup backward, values dense":
            written = shape.slots * row
            return Cost(tokens + written + addresses, reads * row + written + addresses, products)
        case "lookup and backward":
            parts = [cost(part, shape, drawn) for part in (*LOOKUP, "lookup backward, values dense")]
            return Cost(*map(sum, zip(*parts)))
        case "lookup backward, rows":  # slots, the row of each, weights where there is one
            found = reads * (SLOT + 4) + drawn.selected_reads * element
            written = shape.rows * row
            floor = drawn.selected_tokens * row + written + found
            traffic = drawn.selected_reads * row + written + found
            return Cost(floor, traffic, 2 * drawn.selected_reads * shape.width)
        case "SGD step":  # slots and gradient in, rows in and out
            num_bytes = drawn.stepped_rows * (SLOT + 3 * row)
            return Cost(num_bytes, num_bytes, 2 * drawn.stepped_rows * shape.width)
        case "Adam step":  # as SGD, and two moments and a count, in and out
            state = 2 * SCORE * (2 * shape.width + 1)
            num_bytes = drawn.stepped_rows * (SLOT + 3 * row + state)
            return Cost(num_bytes, num_bytes, 12 * drawn.stepped_rows * shape.width)
    raise ValueError(f"there is no operation {op!r}, expected one of {', '.join(EVERY_OP)}")


def _search_cost(op: str, shape: Shape) -> Cost:
    """A search multiplies all half-keys; its gradients are lookups of half-keys and of queries, one of each a read."""
    element = BYTES[shape.dtype]
    both_halves = 2 * shape.key_width * element
    inputs = shape.heads * (shape.tokens + shape.half_keys) * both_halves
    results = shape.reads * (SLOT + SCORE)
    if op == "search":
        operations = 4 * shape.tokens * shape.heads * shape.half_keys * shape.key_width
        return Cost(inputs + results, inputs + results, operations)
    gathered = 2 * shape.reads * both_halves
    return Cost(2 * inputs + results, inputs + gathered + results, 8 * shape.reads * shape.key_width)


# What a way of computing a lookup holds beyond its inputs, at most: rows as many as reads, and whole tables. The
# composition keeps a row for each read, its product with the weight and the gradients of both.
HELD = {
    "lookup": {"ours": (0, 0), "composition": (2, 0), "embedding_bag": (0, 0)},
    "lookup backward, weights": {"ours": (0, 0), "composition": (4, 0), "embedding_bag": (0, 0)},
    "lookup backward, values sparse": {"ours": (0, 1), "composition": (5, 1), "embedding_bag": (3, 1)},
    "lookup backward, values dense": {"ours": (0, 1), "composition": (4, 2), "embedding_bag": (0, 2)},
    "lookup and backward": {"ours": (0, 1), "composition": (4, 2), "embedding_bag": (0, 2)},
    "lookup backward, rows": {"ours": (0, 0), "composition": (4, 2), "embedding_bag": (0, 2)},
}


def input_bytes(shape: Shape) -> int:
    """Memory that the inputs of all operations of a shape take together, and drawing them."""
    queries = shape.heads * (shape.tokens + shape.half_keys) * 2 * shape.key_width * BYTES[shape.dtype]
    tables = shape.slots * (shape.value_bytes + 4)
    return tables + queries + 2 * shape.tokens * shape.value_bytes + 5 * shape.reads * SLOT


def bytes_needed(op: str, way: str, shape: Shape) -> int:
    """A generous bound on the memory that one way of one operation takes beyond the inputs of the shape."""
    table, read_rows = shape.slots * shape.value_bytes, shape.reads * shape.value_bytes
    if op in HELD:
        rows, tables = HELD[op][way]
        return rows * read_rows + tables * table + 2 * shape.tokens * shape.value_bytes + 4 * shape.reads * SLOT
    if op in STEPS:
        state = 2 * shape.slots * shape.width * SCORE if op == "Adam step" else 0
        stepped = min(shape.reads, shape.slots) if shape.steps_what_is_read else shape.rows
        return table + state + 5 * stepped * shape.width * SCORE
    queries = 4 * shape.heads * (shape.tokens + shape.half_keys) * 2 * shape.key_width * SCORE
    lists = 2 * shape.half_keys + 2 * shape.top_k**2 if way == "composition" else 8 * shape.top_k
    return queries + shape.tokens * shape.heads * lists * (SLOT + SCORE)
