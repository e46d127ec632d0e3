"""The memory layer: product keys, the table of values, its settings, and AdamW that moves only the rows read."""
