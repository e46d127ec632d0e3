"""Memory layers for language models: pretrain or retrofit, learn facts into a few rows, score forgetting."""

__version__ = "0.1.0"
