"""A saved Re-ID model on disk: four files that are replaced together, even if the process is killed meanwhile."""

import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from utils.files import portable
from utils.flags import shown
from utils.modeling import importers
from utils.modeling.networks import SHORT_NAMES, full_name
from utils.reporting.report import model_card

MODEL_TYPE = "diffreid"
# Heads of other projects' weights: for features; training keeps the backbone and takes a new head.
IMPORTED_HEADS = ("embedding", "granular", "jigsaw")
FILES = ("config.json", "preprocessor_config.json", "README.md", "model.safetensors")
# What a score of the model says, written by `evaluate.py --calibrate`.
CALIBRATION = "calibration.json"
# A complete new save that has not been moved into place yet.
COMMITTED = ".saved"
# Arguments of a run that say nothing about the model.
NOT_ON_CARD = (
    "cache_dir", "data_root", "demo", "free_on_resume", "hub_model_id", "notes", "origin", "output_dir", "push_to_hub",
    "report_to", "resume_from_checkpoint",
)  # fmt: skip


def write_model_folder(folder, config, preprocessor, tensors, card):
    """Write all files to a temporary folder, rename it so that they are the ones read, then move them into place."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"cannot save a model in {str(folder)!r}: it is a file")
    folder.mkdir(parents=True, exist_ok=True)
    move_into_place(folder)
    for unfinished in folder.glob(".saving-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (part / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n", encoding="utf-8")
    (part / "README.md").write_text(card, encoding="utf-8")
    save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    for name in FILES:
        with open(part / name, "rb+") as file:
            os.fsync(file.fileno())
    part.rename(folder / COMMITTED)
    move_into_place(folder)


def move_into_place(folder):
    committed = folder / COMMITTED
    if committed.is_dir():
        for name in FILES:
            if (committed / name).exists():
                os.replace(committed / name, folder / name)
        committed.rmdir()


def read_model_folder(name_or_path, *, revision=None, token=None):
    """(configuration, preprocessor, tensors) of a saved Re-ID model: a folder or a Hub id."""
    name = str(name_or_path)
    try:
        folder = model_folder(name_or_path, revision=revision, token=token)
    except Exception as error:
        # The Hub's client raises its own error classes and those of its HTTP library.
        raise ValueError(
            f"no Re-ID model at {name!r}, neither a local folder nor a readable Hub id: {error}"
        ) from error

    def current(file_name):
        committed = folder / COMMITTED / file_name
        return committed if committed.exists() else folder / file_name

    if not current("config.json").is_file():
        names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"{name!r} is not a Re-ID model: it has no config.json (found: {names})")
    config = read_json(current("config.json"))
    kind = config.get("model_type")
    if kind != MODEL_TYPE:
        raise ValueError(
            f"{name!r} is not a Re-ID model: the model_type in its config.json is {kind!r}. "
            "If this is a plain backbone folder, use ReIDModel.from_backbone"
        )
    preprocessor = read_json(current("preprocessor_config.json"))
    weights = current("model.safetensors")
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"cannot read {str(weights)!r}: {error}. Only whole safetensors files are read: save or download the "
            "model again"
        ) from error
    return config, preprocessor, tensors


def model_folder(name_or_path, **options):
    """The folder of a saved Re-ID model; of a Hub id that of its files in the Hub's cache."""
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    return Path(snapshot_download(str(name_or_path), allow_patterns=[*FILES, CALIBRATION], **options))


def read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}. Save or download the model again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__}, not a JSON object")
    return content


def check_fit(expected, tensors, name):
    """ValueError, with the names of tensors, if weights and configuration do not match."""
    wrong = [f"{key} is missing" for key in expected if key not in tensors]
    wrong += [f"{key} is not part of the model" for key in tensors if key not in expected]
    wrong += [
        f"{key} is {tuple(tensors[key].shape)} in the file and {tuple(tensor.shape)} in the model"
        for key, tensor in expected.items()
        if key in tensors and tensors[key].shape != tensor.shape
    ]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"the weights in {str(name)!r} do not fit its config.json: {'; '.join(wrong[:5])}{more}")


def card_text(model):
    """The text of a model's card in Markdown: what the model is and how to use it."""
    (height, width), kind = model.image_size, model.backbone.config.model_type
    heads = {"bot": "BNNeck", "embedding": "an imported neck", "granular": "the branches of fast-reid's MGN"}
    heads |= {"jigsaw": "TransReID's jigsaw branch"}
    head = heads.get(model.method, f"the head of {model.method.upper()}")
    return f"""A {kind} backbone with {head}. An image of {height} x {width} (height x width) becomes
{model.num_features} numbers of unit length; the larger the dot product of two, the likelier they show the same person.

```python
from utils.modeling import ReIDModel

model = ReIDModel.from_pretrained("this folder or repository")
features = model.extract(["person.jpg", "another.jpg"])
print(model.similarity(features[:1], features[1:]))
```

Images are RGB in 0..1, resized ({model.resample}), then normalised with mean {list(model.image_mean)} and
standard deviation {list(model.image_std)}. The classifier tells {model.num_ids} training identities apart; retrieval
does not need it.

It is meant for retrieval among images whose subjects consented or where the law gives a clear right, not for covert or
mass surveillance."""


def plain_card(model):
    """The card of a model without information about its training."""
    return model_card(
        "Person re-identification encoder",
        text=card_text(model),
        library_name="diffreid",
        pipeline_tag="image-feature-extraction",
        tags=["person-re-identification"],
    )


def training_card(title, text, script, settings, *, metrics, details, library_name="diffreid"):
    """The card of a model that `script` trained: `text`, command, numbers, settings, but no paths of this machine."""
    settings = {name: portable(value) for name, value in settings.items() if name not in NOT_ON_CARD}
    settings = {name: value for name, value in settings.items() if value is not None and value is not False}
    names = [portable(spec) for spec in metrics]
    names = [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, start=1)]
    return model_card(
        title,
        text=text,
        command=shlex.join(["accelerate", "launch", script, *(str(portable(word)) for word in sys.argv[1:])]),
        metrics=dict(zip(names, metrics.values(), strict=True)),
        details=details | {name: shown(value) for name, value in settings.items()},
        library_name=library_name,
        pipeline_tag="image-feature-extraction",
        tags=["person-re-identification"],
    )


def model_kind(name):
    """The kind of a model, `file`, `reid` or `backbone`, without loading it.

    `file`: weights of another project, in one file or in a folder or repository of timm.
    """
    name = str(full_name(name))
    path = Path(name)
    if path.is_file():
        importers.check_weights(path)
        return "file"
    if not path.exists() and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise ValueError(
            f"{name} does not exist; give a model folder, a file of weights, a Hub id such as user/name, "
            f"or one of {', '.join(SHORT_NAMES)}"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        names = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        inner = [path / one for one in ("model", "backbone") if (path / one / "config.json").is_file()]
        hint = f"; its model is {inner[0]}" if inner else ""
        raise ValueError(f"{name} is no model folder: it has no config.json (found: {names}){hint}")
    try:
        # One request to the Hub or its cache: without network, transformers would retry for half a minute.
        folder = path if path.is_dir() else snapshot_download(name, allow_patterns=["config.json"])
        config = PreTrainedConfig.get_config_dict(folder)[0]
    # The Hub's client raises its own error classes and those of its HTTP library.
    except Exception as error:
        raise ValueError(f"no model at {name}, neither a local folder nor a readable Hub id: {error}") from None
    # transformers calls a configuration of timm so.
    if config.get("model_type") == "timm_wrapper" or ("architecture" in config and "model_type" not in config):
        return "file"
    return "reid" if config.get("model_type") == MODEL_TYPE else "backbone"


def ask_hub(name, revision=None, token=None):
    """Check a name with one request to the Hub or its cache; transformers would retry an absent name for long."""
    try:
        HfApi(token=token).model_info(name, revision=revision)
    except Exception as error:
        # The Hub's client raises its own error classes and those of its HTTP library.
        with suppress(HFValidationError):
            if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
                return
        raise ValueError(f"no model at {name!r}, neither a local folder nor a readable Hub id: {error}") from error
