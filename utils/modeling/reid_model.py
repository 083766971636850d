"""The Re-ID model: backbone, BNNeck, classifier; how to save, load and share it.

model = ReIDModel.from_backbone("openai/clip-vit-base-patch16", num_ids=751)
features, bn_features, logits = model.train()(images)
unit_features = model.eval()(images)                   # (B, D) float32, cosine similarity is the dot product
model.save_pretrained("out/model")
model = ReIDModel.from_pretrained("out/model")         # a folder or a Hub id
"""

import tempfile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import HfApi
from torch import nn

from utils import modeling
from utils.modeling import importers
from utils.modeling.backbones import HALVES, IMAGENET, ClipBackbone, backbone_from_config, config_from, load_backbone
from utils.modeling.folder import (
    IMPORTED_HEADS,
    MODEL_TYPE,
    check_fit,
    model_kind,
    plain_card,
    read_model_folder,
    write_model_folder,
)
from utils.modeling.norms import add_batch_instance_norms, has_batch_instance_norms

RESAMPLE = {"bilinear": 2, "bicubic": 3}
BATCH_INSTANCE, GEM = "batch-instance", "gem"
META = "meta"


class ReIDOutput(NamedTuple):
    """The output in training: features before BatchNorm (B, D), after it (B, D), and logits (B, num_ids) or None."""

    features: torch.Tensor
    bn_features: torch.Tensor
    logits: torch.Tensor | None


class ReIDModel(nn.Module):
    """`model(images)`: a ReIDOutput in training mode, unit-length test features (B, D) float32 in eval mode.

    `method` sets what follows the backbone: BNNeck and a classifier for `bot`, else a head of `utils.modeling.heads`,
    which returns a HeadOutput in training. Prepare images according to `image_size` (height, width), `image_mean`,
    `image_std` and `resample`.
    """

    def __init__(
        self,
        backbone,
        num_ids=0,
        *,
        image_mean=None,
        image_std=None,
        resample="bilinear",
        method="bot",
        head_options=None,
    ):
        super().__init__()
        usual = backbone.preprocessing or (HALVES if isinstance(backbone, ClipBackbone) else IMAGENET)
        self.backbone = backbone
        self.image_size = backbone.image_size
        self.image_mean = tuple(map(float, image_mean or usual["image_mean"]))
        self.image_std = tuple(map(float, image_std or usual["image_std"]))
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError(
                f"image_mean and image_std need three values, the second positive, got {image_mean} and {image_std}"
            )
        if resample not in RESAMPLE:
            raise ValueError(f"resample must be one of {', '.join(RESAMPLE)}, got {resample!r}")
        self.resample = resample
        self.method = method
        # Other heads are imported only for methods that need them.
        self.head, self.head_options = None, dict(head_options or {})
        if method in IMPORTED_HEADS:
            self.head = modeling.build_imported_head(method, backbone, self.head_options)
        elif method == META:
            self.head = modeling.ExpertsHead(backbone, **self.head_options)
        elif method != "bot":
            self.head = modeling.build_head(method, backbone)
        self.num_features = backbone.num_features if self.head is None else self.head.num_features
        self.bnneck = BNNeck(self.num_features) if self.head is None else None
        # What a reader of another project's weights did or left out, for people to read.
        self.notes = []
        self.reset_classifier(num_ids)

    def reset_classifier(self, num_ids):
        """A new classifier for `num_ids` identities; 0 or None for none."""
        self.num_ids = int(num_ids or 0)
        if self.num_ids < 0:
            raise ValueError(f"num_ids must be 0 or more, got {num_ids}")
        self.classifier = None
        if self.head is not None:
            self.head.reset_classifiers(self.num_ids)
        elif self.num_ids:
            self.classifier = nn.Linear(self.num_features, self.num_ids, bias=False)
            self.classifier.to(self.bnneck.weight.device)
            nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, images):
        if not images.is_floating_point():
            raise ValueError(f"images must be normalised floats (see image_mean, image_std), got {images.dtype}")
        pooled = self.pool(images)
        if self.training:
            return ReIDOutput(pooled, *self.neck(pooled)) if self.head is None else self.head(pooled)
        features = self.bnneck(pooled) if self.head is None else self.head(pooled).features
        return F.normalize(features.float(), dim=1)

    def pool(self, images, rng=None):
        """Features of each image by itself: (B, C), or (B, groups, C) for a head, which may draw from `rng`."""
        return self.backbone(images) if self.head is None else self.head.pool(self.backbone, images, rng)

    def outputs(self, pooled):
        """The inputs of the losses of any method: `pool`'s features of the whole batch -> HeadOutput."""
        if self.head is not None:
            return self.head(pooled)
        bn_features, logits = self.neck(pooled)
        return HeadOutput([pooled], [] if logits is None else [logits], bn_features)

    def neck(self, features):
        """Features after BatchNorm, and logits. Several processes can gather `features` before they call this."""
        if self.head is not None:
            raise ValueError(f"a model of method {self.method} has a head instead of a BNNeck; train it with its own")
        bn_features = self.bnneck(features)
        if self.classifier is None:
            return bn_features, None
        return bn_features, self.classifier(bn_features.to(self.classifier.weight.dtype))

    def enable_gradient_checkpointing(self):
        """Recompute the backbone's activations in the backward pass: less memory, about a third more time."""
        self.backbone.enable_gradient_checkpointing()

    @classmethod
    def from_backbone(
        cls,
        name_or_path,
        *,
        num_ids=0,
        image_size=(256, 128),
        image_mean=None,
        image_std=None,
        resample=None,
        method="bot",
        head_options=None,
        attn_implementation=None,
        revision=None,
        token=None,
    ):
        """Start from a plain backbone, in eval mode: a `transformers` folder, a Hub id or a short name."""
        backbone = load_backbone(
            name_or_path, image_size, attn_implementation=attn_implementation, revision=revision, token=token
        )
        resample = resample or (backbone.preprocessing or {}).get("resample", "bilinear")
        options = {"image_mean": image_mean, "image_std": image_std, "resample": resample, "method": method}
        return cls(backbone, num_ids, **options, head_options=head_options).eval()

    @classmethod
    def for_training(cls, name_or_path, *, num_ids, image_size, resample=None, method="bot", head_options=None):
        """A model with a new classifier, from a plain backbone, a saved Re-ID model, or weights of another project.

        `resample`: of its images; default what the weights were trained with, as far as that is known.
        """
        kind = model_kind(name_or_path)
        if kind == "backbone":
            options = {"resample": resample, "method": method, "head_options": head_options}
            return cls.from_backbone(name_or_path, num_ids=num_ids, image_size=image_size, **options)
        if kind == "file":
            model = cls.from_weights(name_or_path, image_size)
        else:
            model = cls.from_pretrained(name_or_path, num_ids=0, dtype=torch.float32)
        if tuple(model.image_size) != tuple(image_size):
            raise ValueError(
                f"{name_or_path} takes images of {' x '.join(map(str, model.image_size))}, not of "
                f"{' x '.join(map(str, image_size))}; set --resolution to the same"
            )
        if model.method not in ("bot", method, *IMPORTED_HEADS):
            raise ValueError(f"{name_or_path} is a model of method {model.method}, it cannot start one of {method}")
        resample = resample or model.resample
        if model.method != method:
            normalisation, notes = {"image_mean": model.image_mean, "image_std": model.image_std}, model.notes
            if model.method in IMPORTED_HEADS:
                notes = [*notes, f"its head is left out, a new one of {method} starts"]
            model = cls(model.backbone, method=method, head_options=head_options, **normalisation).eval()
            model.notes = notes
        model.resample = resample
        model.reset_classifier(num_ids)
        return model

    @classmethod
    def open(cls, name_or_path, image_size=None):
        """Any model for evaluation, without classifier: our folder, a plain backbone, weights of another project."""
        kind = model_kind(name_or_path)
        if kind == "file":
            model = cls.from_weights(name_or_path, image_size)
        elif kind == "backbone":
            # A fresh neck does not change the direction of features: its mean is 0 and its variance 1.
            model = cls.from_backbone(name_or_path, image_size=image_size or (256, 128))
        else:
            model = cls.from_pretrained(name_or_path, num_ids=0)
            if image_size and tuple(image_size) != model.image_size:
                height, width = model.image_size
                raise ValueError(f"{name_or_path} takes images of {height} x {width}; leave out --resolution")
        # Convolutions take less time: on a processor a ResNet-50 an eighth, an OSNet a third.
        return model.to(memory_format=torch.channels_last)

    @classmethod
    def from_weights(cls, path, image_size=None, **options):
        """Open weights of another project, in eval mode, recognised by their names (see `importers.layouts`).

        `model.notes` says what they were and what was left out; `options` are those of the layout's reader.
        """
        return importers.open_weights(cls, path, image_size, **options)

    @classmethod
    def from_dcac_checkpoint(cls, path, image_size=None):
        """Open a checkpoint released by DCAC's authors, in eval mode."""
        config, image_size, num_ids, state = importers.read_dcac_checkpoint(path, image_size)
        model = cls(backbone_from_config(config, image_size), num_ids)
        model.load_state_dict(state)
        return model.eval()

    def extract(self, images, batch_size=64):
        """Unit features (N, D) float32 on the CPU of a list of any length, or of one image.

        An image is a path, a PIL image, an array (H, W, 3) uint8 RGB, or a tensor: (3, H, W) uint8, or already
        normalised (3, height, width) float. A tensor or array with one more dimension is a list.
        """
        return modeling.extract_features(self, images, batch_size)

    def similarity(self, a, b):
        """Cosine similarities (N, M) of two sets of images, or of features from `extract`."""
        first, second = (modeling.features_of(self, side) for side in (a, b))
        return first @ second.T

    def save_pretrained(self, folder, *, card=None):
        """Write config.json, preprocessor_config.json, README.md (`card`, or a short one) and model.safetensors.

        A model already in `folder` stays whole until the new one is complete.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_model_folder(folder, self.configuration(), self.preprocessing(), tensors, card or plain_card(self))

    @classmethod
    def from_pretrained(
        cls, name_or_path, *, num_ids=None, dtype=None, attn_implementation=None, revision=None, token=None
    ):
        """Open a saved Re-ID model, in eval mode: a folder or a Hub id.

        num_ids: None keeps the classifier as saved, 0 drops it, another number than the saved one draws a new one.
        dtype: None keeps the precision of the file.
        """
        config, preprocessor, state = read_model_folder(name_or_path, revision=revision, token=token)
        try:
            size = preprocessor["size"]["height"], preprocessor["size"]["width"]
            if list(size) != config["image_size"]:
                raise ValueError(
                    f"image_size {config['image_size']} in config.json, {size} in preprocessor_config.json"
                )
            backbone = backbone_from_config(config_from(config["backbone"]), size)
            if config.get("norms") == BATCH_INSTANCE:
                add_batch_instance_norms(backbone)
            if config.get("pooling") == GEM:
                modeling.add_gem(backbone)
            model = cls(
                backbone,
                config["num_ids"],
                image_mean=preprocessor["image_mean"],
                image_std=preprocessor["image_std"],
                resample={number: name for name, number in RESAMPLE.items()}[preprocessor["resample"]],
                method=config.get("method", "bot"),
                head_options=config.get("head"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the configuration in {str(name_or_path)!r} is not valid: {error!r}") from error
        check_fit(model.state_dict(), state, name_or_path)
        model.load_state_dict(state, assign=True)
        if attn_implementation is not None:
            backbone.set_attention(attn_implementation)
        if num_ids is not None and num_ids != model.num_ids:
            model.reset_classifier(num_ids)
        return model.to(dtype=dtype).eval()

    def push_to_hub(self, repo_id, *, card=None, private=True, token=None, commit_message="Upload a Re-ID model"):
        """Upload what save_pretrained writes; returns the commit's address. A new repository is private by default."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, card=card)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)

    def configuration(self):
        backbone = self.backbone.config.to_diff_dict()
        for key in ("_name_or_path", "architectures", "dtype", "transformers_version"):
            backbone.pop(key, None)
        return {
            "model_type": MODEL_TYPE,
            "architectures": ["ReIDModel"],
            "backbone": backbone,
            "num_ids": self.num_ids,
            "image_size": list(self.image_size),
            **({} if self.head is None else {"method": self.method}),
            **({"head": self.head_options} if self.head_options else {}),
            **({"norms": BATCH_INSTANCE} if has_batch_instance_norms(self.backbone) else {}),
            **({} if self.backbone.pooling is None else {"pooling": GEM}),
        }

    def preprocessing(self):
        """The configuration of a transformers image processor, so that AutoImageProcessor can read it."""
        return {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": self.image_size[0], "width": self.image_size[1]},
            "resample": RESAMPLE[self.resample],
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }


class HeadOutput(NamedTuple):
    compared: list
    logits: list
    features: torch.Tensor


class BNNeck(nn.BatchNorm1d):
    """BatchNorm with its bias frozen at 0. Computes in at least float32 and keeps its weights in it."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.bias.requires_grad_(False)

    def forward(self, features):
        return super().forward(features.to(self.weight.dtype))

    def _apply(self, fn, recurse=True):
        # model.half() and model.to(torch.bfloat16) would round the running averages.
        def keep_precision(tensor):
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(keep_precision, recurse)
