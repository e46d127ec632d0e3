"""Where a processor is slow at a dtype, its matrix product stays small."""

import clocks
import pytest
import torch


@pytest.mark.parametrize(("rate", "largest"), [(1e8, 256), (1e9, 512), (1e12, 1024)])
def test_the_matrix_product_grows_only_while_the_next_is_short(rate, largest, monkeypatch):
    """On a machine of 1e9 operations a second a product of 512 cubed takes 0.27 s, one of 1024 cubed 2.1 s."""
    sizes = []

    def seconds_there(self, way):
        sizes.append(len(way()))
        return 2 * sizes[-1] ** 3 / rate

    monkeypatch.setattr(clocks.Clock, "_seconds", seconds_there)
    monkeypatch.setattr(clocks, "LARGEST_MATMUL", {"cpu": 1024})
    assert clocks.Clock(torch.device("cpu")).operations_per_second(torch.float32) == pytest.approx(rate)
    assert sizes[0] == 256
    assert sizes[-1] == max(sizes) == largest
