"""Devices and hosts that take part in a run."""
