"""The models that score a set: checks them before any is loaded, and identifies them in the settings of the scores.

transformers is imported inside the functions that need it: a run that only chooses again does not load it.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.files import one_line, sha256, to_json
from utils.generated.images import SCORED


@dataclass(frozen=True)
class Training:
    """How the script trains a model that is not given; `resolution` is (height, width)."""

    reid_method: str
    resolution: list
    train_batch_size: int
    images_per_id: int
    num_train_epochs: int
    classifier_epochs: int
    learning_rate: float
    backbone: str
    num_workers: int
    seed: int

    def settings(self):
        """The settings that determine the trained weights, by name."""
        values = asdict(self)
        del values["num_workers"], values["seed"]
        return values | {"backbone": identity_of_model(self.backbone)}


@dataclass(frozen=True)
class Wanted:
    """The models that score. `clip` is a name; `reid` and `classifiers` are {domain: name}, or None to train them.

    The name `none` skips a filter. `clip_size` is (height, width), or None for CLIP's own square. `captioner` answers
    questions about the images.
    """

    clip: str
    clip_size: list | None
    sentences: list
    reid: dict | None
    classifiers: dict | None
    training: Training
    captioner: str = "none"

    @property
    def has_attributes(self):
        return self.captioner != "none"

    @property
    def has_clip(self):
        return self.clip != "none"

    @property
    def has_cctf(self):
        return self.classifiers is None or "none" not in self.classifiers.values()


def given(names, sources, flag):
    """{domain: model name}, or None to train the models. Several names are in the order of the sources' places."""
    if not names:
        return None
    if len(names) not in (1, len(sources)):
        raise ValueError(f"{flag} names {len(names)} models for {len(sources)} sources; give one, or one for each")
    domains = sorted(sources, key=lambda domain: sources[domain].place)
    return dict(zip(domains, names * (len(sources) if len(names) == 1 else 1), strict=True))


def check_models(wanted, sources):
    """ValueError if a model is of the wrong kind or has other identities; reads only the configurations."""
    from utils.modeling.folder import MODEL_TYPE, model_kind

    if wanted.has_clip:
        check_kind("--clip_model", wanted.clip, "clip")
    for name in sorted(set((wanted.reid or {}).values())):
        check_kind("--reid_model", name, MODEL_TYPE)
    classifiers = wanted.classifiers or {} if wanted.has_cctf else {}
    for domain, name in classifiers.items():
        config, num_ids = check_kind("--classifier_model", name, MODEL_TYPE), len(sources[domain].pids)
        if config.get("num_ids") != num_ids:
            raise ValueError(
                f"--classifier_model: {name!r} knows {config.get('num_ids')} identities, {domain} has {num_ids}"
            )
        if config.get("method", "bot") != "bot":
            raise ValueError(
                f"--classifier_model: {name!r} is a model of method {config['method']} with several classifiers; "
                "give one of method bot"
            )
    if wanted.reid is None or wanted.classifiers is None:
        model_kind(wanted.training.backbone)
    if wanted.has_attributes:
        check_answerer(wanted.captioner)


def check_answerer(name):
    from utils.generated.texts.captioners import CAPTIONS, check_captioner

    if check_captioner(name) == CAPTIONS:
        raise ValueError(
            f"--captioner: {name!r} writes captions and answers no questions; give a question answerer such as "
            "Salesforce/blip-vqa-base"
        )


def check_kind(flag, name, wanted):
    from transformers import PreTrainedConfig

    try:
        config = PreTrainedConfig.get_config_dict(name)[0]
    except Exception as error:
        raise ValueError(f"{flag}: no model at {name!r}: {one_line(error)}") from error
    if config.get("model_type") != wanted:
        raise ValueError(f"{flag}: {name!r} is a {config.get('model_type') or 'nameless'} model, expected {wanted}")
    return config


def settings_of(wanted, digest, sources, holdout_fraction, mixed_precision, seed):
    """The settings that determine the scores, with digests of the image lists and models. No model is loaded.

    `digest`: that of the generated set.
    """
    images = hashlib.sha256()
    for source in sources.values():
        images.update(json.dumps([source.domain, source.train["path"][:], source.labels.tolist()]).encode())
    settings = {
        "generated": digest,
        "source": images.hexdigest(),
        "clip_model": identity_of_model(wanted.clip),
        "clip_resolution": wanted.clip_size,
        "clip_sentences": wanted.sentences,
        "holdout_fraction": holdout_fraction,
        "mixed_precision": mixed_precision,
        "seed": seed,
        "columns": SCORED.names,
        "calibration": "across cameras",
    }
    for flag, names in (("reid_model", wanted.reid), ("classifier_model", wanted.classifiers)):
        # A model that all sources share is listed once.
        names = list((names or {}).values())[: 1 if names and len(set(names.values())) == 1 else None]
        settings[flag] = [identity_of_model(name) for name in names] or "trained"
    if "trained" in (settings["reid_model"], settings["classifier_model"]):
        settings["training"] = wanted.training.settings()
    if wanted.has_attributes:
        settings["captioner"] = identity_of_model(wanted.captioner)
    return json.loads(to_json(settings))


def identity_of_model(name):
    """A Hub id unchanged; for a folder, its name and a digest of its weights and settings."""
    if not Path(name).is_dir():
        return name
    files = sorted(path for path in Path(name).iterdir() if path.suffix in (".safetensors", ".json"))
    digest = hashlib.sha256("".join(f"{path.name} {sha256(path)}" for path in files).encode())
    return f"{Path(name).resolve().name} {digest.hexdigest()[:16]}"
