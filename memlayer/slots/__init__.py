"""What the slots of a table hold: background counts, and the choice of the slots that a step may write."""
