"""Where records come from: tar files, TFRecords, TFDS, folders."""
