"""What a user types: ``memlayer`` and its faces train.py and eval.py. They hand over to memlayer.jobs."""
