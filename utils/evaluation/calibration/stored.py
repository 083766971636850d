"""calibration.json: which model it is of, where it lies, written and read."""

import hashlib
import json
import math
import os
from pathlib import Path

from utils.batches.chunks import weights_digest
from utils.files import to_json, write_together
from utils.modeling.folder import CALIBRATION, model_folder, model_kind

VERSION = 1
CURVES = ("score", "false_match_rate", "right_match_rate", "false_alarm_rate", "TPIR")


def fingerprint(model, with_cameras=False):
    """Changes with the weights of a model and with how it takes images, and whether it is given their cameras."""
    settings = [list(model.image_size), list(model.image_mean), list(model.image_std), model.resample]
    settings += ["cameras"] * with_cameras
    return hashlib.sha256(json.dumps([weights_digest(model), settings]).encode()).hexdigest()


def calibration_path(name_or_path):
    """Where the calibration of a model is, if it has one: beside its weights, on the Hub in the same revision."""
    place = Path(name_or_path)
    if place.exists() or model_kind(name_or_path) != "reid":
        return place / CALIBRATION
    # The weights were downloaded just now: another request could find a newer revision.
    return model_folder(name_or_path, local_files_only=True) / CALIBRATION


def write_calibration(calibration, *folders):
    for folder in folders:
        with write_together(folder) as part:
            part(CALIBRATION).write_text(to_json(calibration), encoding="utf-8")


def read_calibration(path, model_fingerprint):
    """(calibration, None), or (None, why it cannot be used).

    A calibration that is damaged or of other weights is ignored and said to be so: the ranking does not need it.
    """
    path = Path(path)
    if not path.is_file():
        return None, f"{path} does not exist"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        problem = damage_of(content)
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())
    if problem:
        return None, f"{path} is damaged ({problem})"
    if content["fingerprint"] != model_fingerprint:
        return None, f"{path} is of another model: its weights, image size or --camera_embeddings differ"
    return content, None


def calibration_of(name, model, path=None, *, with_cameras=False, say=print):
    """The calibration of a model for a search, or None; says why there is none, and how to get one.

    `name` is that of the model, `path` another place of the file than beside its weights.
    """
    content, problem = read_calibration(path or calibration_path(name), fingerprint(model, with_cameras))
    if problem:
        how = "--camera_embeddings " if with_cameras else ""
        # The folder of a Hub model is the Hub's cache.
        is_folder = os.path.isdir(name)
        how += "--calibrate" if is_folder else f"--output_dir DIR, then search with --calibration DIR/{CALIBRATION}"
        say(
            f"No decisions: {problem}. To get them, calibrate with labelled images of such cameras: "
            f"python evaluate.py --model {name} --data SPEC {how}"
        )
    return content


def damage_of(content):
    """What is wrong with the content of a calibration, or None."""
    if not isinstance(content, dict) or content.get("version") != VERSION:
        return f"it is no calibration of version {VERSION}"
    curve, open_set = content.get("curve"), content.get("open_set")
    if (
        not isinstance(curve, dict)
        or not isinstance(open_set, dict)
        or not isinstance(content.get("fingerprint"), str)
    ):
        return "curve, open_set or fingerprint is missing"
    columns = [curve.get(name) for name in CURVES]
    if not all(isinstance(values, list) and len(values) == len(columns[0]) > 1 for values in columns):
        return "the columns of its curve differ in length"
    numbers = [value for values in columns for value in values]
    numbers += [open_set.get("gallery_images"), open_set.get("num_identities")]
    numbers += [curve.get("least_false_match_rate"), curve.get("least_false_alarm_rate")]
    if not all(type(value) in (int, float) and math.isfinite(value) for value in numbers):
        return "its curve holds something else than numbers"
    if sorted(columns[0]) != columns[0] or open_set["gallery_images"] < 0 or min(numbers) < -1:
        return "its numbers are out of range"
    return None
