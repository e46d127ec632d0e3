"""Each sequence hears the blocks of its own path and of no other; nothing is added before something is learned."""

import pytest
import torch
from torch.nn import functional as F

from memlayer.layers.routed_blocks import RoutedBlocks

PATHS = torch.tensor([[0, 1], [1, 2], [0, 0], [0, 1]])


def blocks(width=6, branching=2, sizes=(4, 3), loud=True):
    torch.manual_seed(0)
    made = RoutedBlocks(width, branching, sizes)
    for parameter in made.parameters() if loud else ():
        torch.nn.init.normal_(parameter)
    return made


def test_a_sequence_hears_the_sum_of_its_paths_blocks():
    made, hidden_BLD = blocks(), torch.randn(4, 5, 6)
    found_BLD = made(hidden_BLD, PATHS)
    for hidden_LD, found_LD, path_P in zip(hidden_BLD, found_BLD, PATHS.tolist(), strict=True):
        expected_LD = torch.zeros(5, 6)
        for level, node in enumerate(path_P):
            gate_SD, up_SD, down_SD = made.levels[level][node]
            expected_LD += (F.silu(hidden_LD @ gate_SD.T) * (hidden_LD @ up_SD.T)) @ down_SD
        torch.testing.assert_close(found_LD, expected_LD)


def test_only_blocks_of_a_path_in_the_batch_get_a_gradient():
    made = blocks(loud=False)
    made(torch.randn(4, 5, 6), PATHS).sum().backward()
    with_gradient = [[node for node, block in enumerate(level) if block.grad is not None] for level in made.levels]
    assert with_gradient == [[0, 1], [0, 1, 2]]


def test_nothing_is_added_at_the_start():
    assert not blocks(loud=False)(torch.randn(4, 5, 6), PATHS).any()


@pytest.mark.parametrize("sizes", [(4, 3), (5, 0), (0, 2), (8, 4, 1)])
def test_the_bank_and_what_is_fetched_have_the_sizes_of_the_formula(sizes):
    made = blocks(width=6, branching=3, sizes=sizes)
    assert made.num_fetched == sum(3 * 6 * size for size in sizes)
    bank = sum(3 * 6 * size * 3**level for level, size in enumerate(sizes, start=1))
    assert sum(parameter.numel() for parameter in made.parameters()) == bank


def test_a_level_without_blocks_says_nothing():
    made, hidden_BLD = blocks(sizes=(4, 0)), torch.randn(4, 5, 6)
    found_BLD = made(hidden_BLD, PATHS)
    assert torch.equal(found_BLD, made(hidden_BLD, torch.tensor([[0, 0], [1, 3], [0, 1], [0, 0]])))


def test_what_cannot_be_is_refused():
    for sizes in ((0, 0), (), (4, -1)):
        with pytest.raises(ValueError, match="none may be below 0, and one must be above"):
            RoutedBlocks(6, 2, sizes)
    with pytest.raises(ValueError, match="4 paths for a batch of 3 sequences"):
        blocks()(torch.randn(3, 5, 6), PATHS)
