"""One query against a gallery, at once: for pages that answer while somebody waits.

    gallery = Gallery(side, images, folder, model, "output/people/model", "cameras", accelerator)
    query = uploaded_query(gallery, "0001.jpg", content)
    results = search(gallery, query, cameras=[0, 2], count=20, rerank=True)

Scores are cosines. The query's own file is never a result.
"""

import functools
import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from kernels import cosine_topk, k_reciprocal_rerank
from kernels.disk.rows import BLOCK_ROWS, RowsOnDisk
from utils.batches.transforms import test_transform
from utils.datasets.images import PersonImage
from utils.datasets.schema import UNKNOWN
from utils.evaluation.metrics import Side
from utils.modeling.reid_model import ReIDModel
from utils.reporting.report import data_uri

# Re-ranking looks at the query and so many of its nearest gallery images. A smaller gallery is re-ranked whole.
RERANKED = 1000
MOST_BYTES = 20 << 20
# Equal files have equal features but for rounding: only gallery images above this cosine are compared byte by byte.
SAME_SCORE = 0.999
# More than the rounding error of a product of two unit rows in float32.
MARGIN = 1e-4


@dataclass(eq=False)
class Gallery:
    """The images to look in, with features and labels, and the model of both sides.

    Features in memory become unit rows; `RowsOnDisk` stay on the disk. `images` is a data set in the order of `side`,
    or None where there are no pictures; `folder`, or None, is the one that the names in `side` start from.
    `model_name` and `source` say where model and images are from. `digests`, where given, are those of the files.
    """

    side: Side
    images: object
    folder: Path | None
    model: ReIDModel
    model_name: str
    source: str
    accelerator: object = field(repr=False)
    digests: list | None = None

    def __post_init__(self):
        features = self.side.features.to(self.accelerator.device)
        self.on_disk = isinstance(features, RowsOnDisk)
        self.side = replace(self.side, features=features if self.on_disk else F.normalize(features, dim=1))

    def __len__(self):
        return len(self.side)

    def cameras(self):
        """{camera: number of images}, without unknown ones."""
        cameras, counts = self.side.camids.unique(return_counts=True)
        return {camera: count for camera, count in zip(cameras.tolist(), counts.tolist(), strict=True) if camera >= 0}

    @torch.no_grad()
    def features_of(self, images):
        """(N, D) unit features of PIL images, as the gallery's were extracted."""
        transform = transform_of(self.model)
        batch = torch.stack([transform(image) for image in images]).to(self.accelerator.device)
        with self.accelerator.autocast():
            return F.normalize(self.model(batch).float(), dim=1).to(self.side.features.device)

    def cosines(self, feature):
        """(N,) cosines of a unit feature with all rows; ValueError for rows that have no direction."""
        features, cosines = self.side.features, []
        for begin in range(0, len(features), BLOCK_ROWS):
            block = features[begin : begin + BLOCK_ROWS]
            cosines.append((F.normalize(block.float(), dim=1) if self.on_disk else block) @ feature)
            if self.on_disk and not (cosines[-1].isfinite() & (block != 0).any(1)).all():
                raise ValueError(f"{self.source} holds features that are NaN, infinite or zero; extract it again")
        return torch.cat(cosines)

    def unit_rows(self, rows):
        features = self.side.features[rows]
        return F.normalize(features.float(), dim=1) if self.on_disk else features

    def file_of(self, row):
        return None if self.folder is None else self.folder / self.side.paths[row]

    def image_of(self, row):
        """A PIL image, or None where there is none to show."""
        try:
            return None if self.images is None else self.images[row]["image"]
        except (ValueError, OSError):
            return None

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def picture_of(self, row):
        """A small picture as a data URI, or None."""
        image = self.image_of(row)
        return None if image is None else data_uri(image)


def transform_of(model):
    return test_transform(model.image_size, model.image_mean, model.image_std, model.resample)


@dataclass
class Query:
    """An image to look for. `row` is set for one that was picked from the gallery; `digest` is that of its file."""

    feature: torch.Tensor
    name: str
    uri: str | None
    pid: int = UNKNOWN
    row: int | None = None
    size: int = -1
    digest: str = ""


@dataclass
class Results:
    """Gallery rows, best first, with their cosines, and the final distances of re-ranking or None.

    `nearest` is the largest cosine of all images that were compared, which re-ranking may not put first. `searched`
    counts these images, `same` names those left out because they are the query's own file.
    """

    rows: list
    scores: list
    distances: list | None
    searched: int
    reranked: int
    same: list
    nearest: float | None = None


def uploaded_query(gallery, name, content):
    """The Query of an uploaded file; ValueError where it is no image."""
    if len(content) > MOST_BYTES:
        raise ValueError(f"{name} has {len(content):,} bytes, at most {MOST_BYTES:,} are taken; give a smaller image")
    try:
        image = PersonImage(mode="RGB").decode_example({"bytes": content, "path": None})
    except ValueError as error:
        reason = str(error).rpartition(": ")[2]
        raise ValueError(f"{name} cannot be read as an image ({reason}); give a JPEG or PNG file") from None
    digest = hashlib.sha256(content).hexdigest()
    return Query(gallery.features_of([image]), name, data_uri(image), size=len(content), digest=digest)


def picked_query(gallery, row):
    """The Query of a gallery row, with its stored feature."""
    if not (isinstance(row, int) and 0 <= row < len(gallery)):
        raise ValueError(f"the gallery has rows 0 to {len(gallery) - 1}, {row!r} is none of them")
    query = Query(gallery.unit_rows([row]), gallery.side.paths[row], gallery.picture_of(row), row=row)
    query.pid = int(gallery.side.pids[row])
    file = gallery.file_of(row)
    if gallery.digests:
        query.digest = gallery.digests[row]
    elif file is not None and file.is_file():
        content = file.read_bytes()
        query.size, query.digest = len(content), hashlib.sha256(content).hexdigest()
    return query


def is_same_file(gallery, row, query):
    """Whether a gallery row is the query itself, or a file with the same content."""
    if row == query.row:
        return True
    if gallery.digests:
        return gallery.digests[row] == query.digest
    file = gallery.file_of(row)
    try:
        if file is None or file.stat().st_size != query.size:
            return False
        return hashlib.sha256(file.read_bytes()).hexdigest() == query.digest
    except OSError:
        return False


def search(gallery, query, *, cameras=(), count=20, rerank=False, **options):
    """The `count` best gallery images of these cameras (all if none is named): `Results`.

    The ranking is that of `kernels.cosine_topk`. Re-ranking is `kernels.k_reciprocal_rerank` of the query against its
    RERANKED nearest images, and so against all images where there are no more. Cameras are chosen before both.
    """
    kept = camera_mask(gallery, cameras).to(query.feature.device)
    scores = gallery.cosines(query.feature[0])
    near = (kept & (scores > SAME_SCORE)).nonzero().flatten().tolist()
    same = [row for row in near if is_same_file(gallery, row, query)]
    kept[same] = False
    searched = int(kept.sum())
    names = [gallery.side.paths[row] for row in same]
    if not searched:
        return Results([], [], [] if rerank else None, 0, 0, names)
    # The kernel sums in the same order for every row, so it decides among all rows that could be among the nearest.
    wanted = min(searched, RERANKED if rerank else count)
    limit = scores[kept].topk(wanted).values[-1] - MARGIN
    near = (kept & (scores >= limit)).nonzero().flatten()
    cosines, places = cosine_topk(query.feature, gallery.unit_rows(near), wanted)
    rows, cosines = near[places[0]], cosines[0]
    nearest = float(cosines[0])
    distances = None
    if rerank:
        # In the gallery's order, so that equal distances are ranked as in the whole gallery.
        rows, order = rows.sort()
        final, places = k_reciprocal_rerank(query.feature, gallery.unit_rows(rows), **options).topk(min(count, wanted))
        rows, cosines, distances = rows[places[0]], cosines[order][places[0]], (-final[0]).tolist()
    rows, cosines = rows[:count].tolist(), cosines[:count].tolist()
    return Results(rows, cosines, distances, searched, wanted if rerank else 0, names, nearest)


def camera_mask(gallery, cameras):
    if not cameras:
        return torch.ones(len(gallery), dtype=torch.bool)
    return torch.isin(gallery.side.camids, torch.tensor([int(camera) for camera in cameras]))
