"""What the memory section of a config may say; all else is refused when the config is made."""

import pytest

from memlayer import MemoryConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [-1]}, r"memory\.layers is \[-1\], must be one layer or more, counted from 0, each once"),
        ({"layers": []}, r"memory\.layers is \[\], must be one layer or more"),
        ({"layers": [1, 1]}, r"memory\.layers is \[1, 1\], must be .* each once"),
        ({"layers": [True]}, r"memory\.layers is \[True\], must be a list of whole numbers"),
        ({"layers": [1.0]}, r"memory\.layers is \[1\.0\], must be a list of whole numbers"),
        ({"layers": "12"}, r"memory\.layers is '12', must be a list of whole numbers"),
        ({"layers": 1}, r"memory\.layers is 1, must be a list of whole numbers"),
        ({"num_keys": "8"}, r"memory\.num_keys is '8', must be a whole number"),
        ({"num_keys": 46341}, r"memory\.num_keys is 46341, must be at most 46340"),
        ({"num_keys": 0}, r"memory\.num_keys is 0, must be at least 1"),
        ({"num_heads": True}, r"memory\.num_heads is True, must be a whole number"),
        ({"top_k": 0}, r"memory\.top_k is 0, must be at least 1"),
        ({"num_keys": 2, "top_k": 3}, r"memory\.top_k is 3, must be at most memory\.num_keys = 2"),
        ({"top_k": None}, r"memory\.top_k is None, must be a whole number"),
        ({"value_width": 0}, r"memory\.value_width is 0, must be at least 1"),
        ({"key_width": 3}, r"memory\.key_width is 3, must be even"),
        ({"key_width": 0}, r"memory\.key_width is 0, must be at least 2"),
        ({"mode": "beside"}, r"memory\.mode is 'beside', must be 'replace' or 'add'"),
        ({"dtype": "int8"}, r"memory\.dtype is 'int8', must be 'float32' or 'bfloat16' or"),
        ({"share": 1}, r"memory\.share is 1, must be true or false"),
    ],
)
def test_what_makes_no_sense_is_refused_when_the_config_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**{"layers": [1], **changes})


def test_the_largest_table_has_slots_that_int32_can_number():
    assert MemoryConfig([0], num_keys=46340).num_keys ** 2 < 2**31 < 46341**2
