"""Models on disk: checkpoints, the folder of a run, big_vision's files."""
