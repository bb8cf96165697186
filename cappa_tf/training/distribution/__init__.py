"""Distribution of a run over devices and hosts."""
