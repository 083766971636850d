"""Data as people have it: folders, tables, archives and the Hub; `data` opens them."""
