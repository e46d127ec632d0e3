"""What was learned and what was forgotten; knows no model code."""
