"""Training: the optimiser, one step, and the loop around it."""
