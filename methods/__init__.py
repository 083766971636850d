"""Published downstream methods, one file or folder each, to copy and change."""
