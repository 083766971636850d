"""Features on disk, read in blocks: `RowsOnDisk` for galleries larger than memory."""
