"""A search by bounds gives the lists of one that sorts everything, and sorts in full what it cannot settle."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_product_key import INFINITE, check_exact, check_rounded, draw

from memlayer_kernels import half_bounds, product_key, reference
from memlayer_kernels.half_lists import Lists
from memlayer_kernels.product_key import search
from memlayer_kernels.variants import CHOSEN, ONE_WARP, SEARCHES, Collect, Search

# As the ways of the table, but small: an interpreter is slow.
SMALL = Collect(TOKENS=16, GROUPS=16, COLUMNS=16, RESIDENT=False, WARPS=4, STAGES=2)
RESIDENT = SMALL._replace(COLUMNS=64, RESIDENT=True)
SLOW_RESIDENT = pytest.param(RESIDENT, id="resident", marks=pytest.mark.slow)
WAYS = pytest.mark.parametrize("tiles", [pytest.param(SMALL, id="tiles"), SLOW_RESIDENT])
SORT = SEARCHES["sort"]


def by_bounds(monkeypatch, tiles):
    """Makes checks of test_product_key.py search by bounds."""
    monkeypatch.setattr("test_product_key.search", lambda *inputs: search(*inputs, Search(tiles, ONE_WARP)))


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    num_tokens=st.integers(1, 20),
    heads=st.integers(1, 2),
    n=st.integers(32, 90),
    width=st.integers(1, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    whole=st.booleans(),
    tiles=st.sampled_from([SMALL, RESIDENT]),
)
def test_equals_the_reference(device, data, num_tokens, heads, n, width, dtype, whole, tiles):
    k = data.draw(st.integers(1, 8))
    inputs = draw(data.draw(st.integers(0, 99)), num_tokens, heads, n, width, dtype, device, whole)
    assert half_bounds.can_collect(n, width, k, dtype, tiles)
    with pytest.MonkeyPatch.context() as patched:
        by_bounds(patched, tiles)
        (check_exact if whole else check_rounded)(*inputs, k)


def lists_of(queries, half_keys, k, tiles):
    """What collect fills, and how many tokens of each head and half had to be sorted in full."""
    num_tokens, heads = queries.shape[:2]
    shape = num_tokens, heads, 2, k
    again = []
    with pytest.MonkeyPatch.context() as patched:
        sort_again = half_bounds.sort_again

        def noting(*arguments):
            again.append(arguments[-1].clone())
            sort_again(*arguments)

        patched.setattr(half_bounds, "sort_again", noting)
        candidates = product_key.pair_tiles(k, ONE_WARP).CANDIDATES
        sizes = (shape, torch.float32), (shape, torch.int32), ((2, candidates), torch.int32)
        lists = Lists(*(torch.empty(size, dtype=dtype, device=queries.device) for size, dtype in sizes))
        half_bounds.collect(queries, half_keys, k, lists, tiles)
    return lists, again[0].tolist()


@WAYS
def test_lists_of_random_scores_are_settled_and_those_of_rows_of_zeros_sorted_in_full(device, tiles):
    queries, half_keys = draw(0, 18, 1, 35, 9, torch.bfloat16, device, whole=False)
    queries[3:15, 0, 1] = 0  # as padding: 35 equal scores
    lists, again = lists_of(queries, half_keys, 2, tiles)
    assert again == [0, 12]
    assert torch.equal(lists.index_TH2K[3:15, 0, 1].cpu(), torch.arange(2).expand(12, 2).int())
    found, right = search(queries, half_keys, 2, Search(tiles, ONE_WARP)), search(queries, half_keys, 2, SORT)
    assert all(torch.equal(*pair) for pair in zip(found, right))


def test_a_bound_that_too_few_reach_is_seen(device, monkeypatch):
    """As where a product with other tiles rounds every score down."""
    queries, half_keys = draw(0, 5, 1, 35, 9, torch.bfloat16, device, whole=False)
    right = reference.product_key_topk(queries, half_keys, 2)[1]
    launch = half_bounds.launch

    def raising(kernel, grid, *arguments, **options):
        launch(kernel, grid, *arguments, **options)
        if kernel is half_bounds.bound_kernel:
            arguments[2].fill_(1e9)

    monkeypatch.setattr(half_bounds, "launch", raising)
    lists, again = lists_of(queries, half_keys, 2, SMALL)
    assert again == [5, 5]
    best = lists.index_TH2K[:, 0, :, 0].long()
    assert torch.equal(best[:, 0] * 35 + best[:, 1], right[:, 0, 0].to(best))


@INFINITE
@WAYS
@pytest.mark.parametrize(
    "strange", [float("nan"), *(pytest.param(float(x), marks=pytest.mark.slow) for x in ("inf", "-inf"))]
)
def test_scores_that_are_not_finite_are_chosen_as_by_sorting_everything(device, strange, tiles):
    queries, half_keys = draw(0, 3, 1, 35, 3, torch.float16, device, whole=False)
    half_keys[0, 0, 3], half_keys[0, 1, :32] = strange, strange
    found, right = (search(queries, half_keys, 4, way) for way in (Search(tiles, ONE_WARP), SORT))
    assert torch.equal(found[1], right[1])
    assert torch.equal(found[0].nan_to_num(7.0), right[0].nan_to_num(7.0))


def test_a_token_has_the_same_bits_in_another_batch(device):
    queries, half_keys = draw(0, 18, 1, 35, 7, torch.bfloat16, device, whole=False)
    way = Search(SMALL, ONE_WARP)
    found, part = search(queries, half_keys, 2, way), search(queries[15:], half_keys, 2, way)
    assert all(torch.equal(whole[15:], some) for whole, some in zip(found, part))


@pytest.mark.slow  # 128 groups under the interpreter
@pytest.mark.parametrize("name", [name for name, way in SEARCHES.items() if way.collect])
def test_every_way_of_the_table_finds_the_same(device, name):
    queries, half_keys = draw(0, 70, 1, 300, 33, torch.bfloat16, device, whole=True)
    assert half_bounds.can_collect(300, 33, 32, torch.bfloat16, SEARCHES[name].collect)
    found, right = search(queries, half_keys, 32, SEARCHES[name]), search(queries, half_keys, 32, SORT)
    assert all(torch.equal(*pair) for pair in zip(found, right))


def test_what_does_not_fit_is_sorted_in_full():
    fits = {"n": 1024, "width": 256, "k": 32, "dtype": torch.bfloat16, "tiles": SEARCHES["resident"].collect}
    assert half_bounds.can_collect(**fits)
    for change in ({"n": 255}, {"width": 257}, {"k": 33}, {"dtype": torch.float32}):
        assert not half_bounds.can_collect(**fits | change), change
    for (operation, _), name in CHOSEN.items():
        assert operation != "search" or name in SEARCHES
