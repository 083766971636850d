"""Opens every source of labelled people with one schema.

`load_reid` opens a data set by name, path or Hub id; `parse_spec`, `labels_of` and `subset` are its helpers.
"""

from utils import opened_when_used

__getattr__ = opened_when_used(
    __name__,
    {
        "load": "load_reid load_sources parse_spec labels_of people_of subset known_names",
        # Loaded only where a set needs them.
        "own.tables": "Columns",
        "own.data": "read_local read_hub",
        "holdout": "hold_out hold_out_of told_apart",
        "lmdb_files": "is_lmdb lmdb_names",
    },
)
