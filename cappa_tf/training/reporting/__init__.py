"""Reporting of a run's metrics: terminal, log file, TensorBoard."""
