"""Training: the step and its loop, optimizers, distribution, reporting."""
