"""Facts, questions, text and the tokenizer: everything a run reads, and no model code."""
