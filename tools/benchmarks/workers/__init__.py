"""Programs that benchmarks run in a process, or environment, of their own."""
