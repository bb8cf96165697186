"""Sources of records: folders, tables, tar files, TFRecords, TFDS."""
