"""A run on disk: checkpoints, its folder, and whose the folder is."""
