"""Which models score a set: what was asked for, checked before anything loads, and written down beside the scores.

transformers is imported only where a model is looked at: a run that only chooses again does not wait for it.
"""

import hashlib
import json
from pathlib import Path

from utils.files import sha256, to_json
from utils.flags import CLIP_DIR
from utils.generated.images import SCORED

TRAINING = (
    "reid_method", "resolution", "train_batch_size", "images_per_id", "num_train_epochs", "classifier_epochs",
    "learning_rate",
)  # fmt: skip
# The stand-in knows people in their own shape.
STANDIN_SIZE = (128, 64)


def left_out(args, name):
    """Whether the filter was switched off."""
    return {"clip": args.clip_model, "cctf": (args.classifier_model or [""])[0]}.get(name) == "none"


def clip_size(args):
    """(height, width) of what CLIP sees, None for its own square."""
    if args.clip_resolution is None and args.clip_model == CLIP_DIR:
        return STANDIN_SIZE
    return args.clip_resolution and tuple(args.clip_resolution)


def given(names, sources, flag):
    """{domain: model}, or None where the models are to be trained."""
    if not names:
        return None
    if len(names) not in (1, len(sources)):
        raise ValueError(f"{flag} names {len(names)} models for {len(sources)} sources; give one, or one for each")
    return dict(zip(sources, names * (len(sources) if len(names) == 1 else 1), strict=True))


def check_models(args, sources):
    """ValueError, from configurations alone, where a model is not what it should be."""
    from utils.modeling.folder import MODEL_TYPE, model_kind

    if not left_out(args, "clip"):
        check_kind("--clip_model", args.clip_model, "clip")
    reid = given(args.reid_model, sources, "--reid_model")
    for name in sorted(set((reid or {}).values())):
        check_kind("--reid_model", name, MODEL_TYPE)
    classifiers = {}
    if not left_out(args, "cctf"):
        classifiers = given(args.classifier_model, sources, "--classifier_model")
        for domain, name in (classifiers or {}).items():
            config, wanted = check_kind("--classifier_model", name, MODEL_TYPE), len(sources[domain].pids)
            if config.get("num_ids") != wanted:
                raise ValueError(
                    f"--classifier_model: {name!r} knows {config.get('num_ids')} identities, {domain} has {wanted}"
                )
            if config.get("method", "bot") != "bot":
                raise ValueError(
                    f"--classifier_model: {name!r} is a model of method {config['method']} with several classifiers; "
                    "give one of method bot"
                )
    if reid is None or classifiers is None:
        model_kind(args.backbone)


def check_kind(flag, name, wanted):
    from transformers import PreTrainedConfig

    try:
        config = PreTrainedConfig.get_config_dict(name)[0]
    except Exception as error:
        raise ValueError(f"{flag}: no model at {name!r}: {' '.join(str(error).split())}") from error
    if config.get("model_type") != wanted:
        raise ValueError(f"{flag}: {name!r} is a {config.get('model_type') or 'nameless'} model, expected {wanted}")
    return config


def settings_of(args, generated, sources):
    """What decides the scores: digests of images' names and of models, found without loading one."""
    images = hashlib.sha256()
    for source in sources.values():
        images.update(json.dumps([source.domain, source.train["path"][:], source.labels.tolist()]).encode())
    found = {
        "generated": generated.digest,
        "source": images.hexdigest(),
        "clip_model": identity_of_model(args.clip_model),
        "clip_resolution": clip_size(args),
        "clip_sentences": [args.clip_sentence, *args.clip_others],
        "holdout_fraction": args.holdout_fraction,
        "mixed_precision": args.mixed_precision,
        "seed": args.seed,
        "columns": SCORED.names,
    }
    for flag in ("reid_model", "classifier_model"):
        names = getattr(args, flag)
        found[flag] = [identity_of_model(name) for name in names] if names else "trained"
    if "trained" in (found["reid_model"], found["classifier_model"]):
        found["training"] = {name: getattr(args, name) for name in TRAINING}
        found["training"]["backbone"] = identity_of_model(args.backbone)
    return json.loads(to_json(found))


def identity_of_model(name):
    """A Hub id as it is; of a folder its name and a digest of its weights and settings."""
    if not Path(name).is_dir():
        return name
    files = sorted(path for path in Path(name).iterdir() if path.suffix in (".safetensors", ".json"))
    digest = hashlib.sha256("".join(f"{path.name} {sha256(path)}" for path in files).encode())
    return f"{Path(name).resolve().name} {digest.hexdigest()[:16]}"
