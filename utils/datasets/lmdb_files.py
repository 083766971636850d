"""Images in an lmdb, as LUPerson's are: lmdb:///folder/of/data.mdb/KEY."""

import functools
import os
from io import BytesIO

from fsspec.spec import AbstractFileSystem


class LmdbFileSystem(AbstractFileSystem):
    """Values of an lmdb as files: lmdb:///folder/of/data.mdb/KEY."""

    protocol = "lmdb"

    def _open(self, path, mode="rb", **_):
        # Some fsspec calls remove the first slash.
        database, key = "/" + self._strip_protocol(path).lstrip("/"), ""
        while database and not is_lmdb(database):
            database, _, part = database.rpartition("/")
            key = f"{part}/{key}" if key else part
        with open_lmdb(database, os.getpid()).begin() as transaction:
            value = transaction.get(key.encode())
        if value is None:
            raise FileNotFoundError(path)
        return BytesIO(value)


def is_lmdb(folder):
    return os.path.isfile(os.path.join(folder, "data.mdb"))


@functools.lru_cache(maxsize=4)
def open_lmdb(folder, process):
    """One handle per process: an open lmdb must not be used after a fork."""
    try:
        import lmdb
    except ImportError:
        raise ValueError(f"{folder} is an lmdb, which needs another package: pip install lmdb") from None
    return lmdb.open(folder, readonly=True, lock=False, readahead=False)


def lmdb_names(folder):
    """Keys of images; writers add others, such as `__len__` and `__keys__`."""
    with open_lmdb(os.path.realpath(folder), os.getpid()).begin() as transaction:
        keys = [bytes(key) for key in transaction.cursor().iternext(values=False)]
    return [key.decode(errors="replace") for key in keys if not key.startswith(b"__")]
