"""Predictions to weights: losses, optimizers, schedules, trainer."""
