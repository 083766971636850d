"""Published downstream methods, one file each, to copy and change."""
