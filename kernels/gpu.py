"""The lookup and its gradients on GPUs: the Triton side of the three functions of cpu.py."""

from .gather import fetch_rows, weighted_sum
from .scatter import read_products, segment_sums

__all__ = ["fetch_rows", "read_products", "segment_sums", "weighted_sum"]
