"""Measures of an identity's generated images: similarity to the prompts and to the source, and diversity."""

import torch
import torch.nn.functional as F
from transformers import AutoProcessor, CLIPModel, PreTrainedConfig

from utils.batches.transforms import test_transform
from utils.diffusion.families.texts import check_vocabulary
from utils.modeling.folder import MODEL_TYPE
from utils.modeling.reid_model import ReIDModel

BATCH = 32


def check_measures(clip_name=None, reid_name=None):
    """ValueError unless the names are a CLIP model and a Re-ID model; reads only their configurations."""
    for name, flag, wanted in (
        (clip_name, "--clip_model_name_or_path", "clip"),
        (reid_name, "--reid_model", MODEL_TYPE),
    ):
        if not name:
            continue
        try:
            kind = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
        except Exception as error:
            raise ValueError(f"{flag}: no model at {name!r}: {' '.join(str(error).split())}") from error
        if kind != wanted:
            raise ValueError(f"{flag}: {name!r} is a {kind or 'nameless'} model, expected {wanted}")


class Measures:
    """Measures one identity at a time with CLIP, a Re-ID model, or both."""

    def __init__(self, clip=None, processor=None, reid=None):
        self.clip, self.processor, self.reid = clip, processor, reid

    @classmethod
    def from_pretrained(cls, clip_name=None, reid_name=None, device="cpu"):
        clip = processor = reid = None
        if clip_name:
            try:
                clip = CLIPModel.from_pretrained(clip_name, use_safetensors=True).to(device).eval()
                processor = AutoProcessor.from_pretrained(clip_name, trust_remote_code=False)
                check_vocabulary(processor.tokenizer, clip_name)
            except Exception as error:
                raise ValueError(f"no CLIP model at {clip_name!r}: {' '.join(str(error).split())}") from error
        if reid_name:
            reid = ReIDModel.from_pretrained(reid_name, num_ids=0).to(device).eval()
        return cls(clip, processor, reid)

    def of(self, source, generated, prompts, own=None):
        """({measure: value}, {"source": mean feature, "generated": mean feature}). All measures are cosines.

        text_similarity: each image and its own prompt; image_similarity: generated and source images; diversity:
        1 - cosine between two generated images; identity_similarity: as image_similarity, in the Re-ID features.
        `own`: which images are in the identity's own clothes, default all; the others say nothing about the identity.
        """
        values, means = {}, {}
        own = torch.ones(len(generated), dtype=torch.bool) if own is None or not any(own) else torch.tensor(own)
        if self.clip is not None:
            real, made = self.clip_features(source), self.clip_features(generated)
            values["text_similarity"] = float((made * self.text_features(prompts)).sum(1).mean())
            values["image_similarity"] = float((made[own] @ real.T).mean())
            values["diversity"] = diversity(made)
            means = {"source": real.mean(0), "generated": made[own].mean(0)}
        if self.reid is not None:
            real, made = self.reid_features(source), self.reid_features(generated)
            values["identity_similarity"] = float((made[own] @ real.T).mean())
            means = {"source": real.mean(0), "generated": made[own].mean(0)}
        rounded = {name: [round(value, 5) for value in mean.tolist()] for name, mean in means.items()}
        return {name: round(value, 5) for name, value in values.items()}, rounded

    @torch.inference_mode()
    def clip_features(self, images):
        parts = []
        for start in range(0, len(images), BATCH):
            inputs = self.processor(images=images[start : start + BATCH], return_tensors="pt")
            parts.append(as_features(self.clip.get_image_features(inputs.pixel_values.to(self.clip.device))))
        return F.normalize(torch.cat(parts).float(), dim=1).cpu()

    @torch.inference_mode()
    def text_features(self, prompts):
        parts = []
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            tokens = self.processor.tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            parts.append(as_features(self.clip.get_text_features(**tokens.to(self.clip.device))))
        return F.normalize(torch.cat(parts).float(), dim=1).cpu()

    @torch.inference_mode()
    def reid_features(self, images):
        model = self.reid
        transform = test_transform(model.image_size, model.image_mean, model.image_std, model.resample)
        device = next(model.parameters()).device
        batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
        return torch.cat(
            [model(torch.stack([transform(image) for image in batch]).to(device)).cpu() for batch in batches]
        )


def as_features(output):
    """The features as a tensor; older versions of transformers return one, newer ones an output object."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def diversity(features):
    """The mean cosine distance of all pairs; 0 for a single image."""
    count = len(features)
    if count < 2:
        return 0.0
    return float(1 - (features.sum(0).square().sum() - count) / (count * (count - 1)))


def identity_auc(sources, generated):
    """AUC of generated mean features: their own source against the others, ties count half; None for one identity."""
    count = len(sources)
    if count < 2:
        return None
    similarity = (F.normalize(generated, dim=1) @ F.normalize(sources, dim=1).T).double()
    own, others = similarity.diagonal(), similarity[~torch.eye(count, dtype=torch.bool)].sort().values
    below, below_or_equal = (torch.searchsorted(others, own.contiguous(), right=right) for right in (False, True))
    return float((below + below_or_equal).double().mean() / (2 * len(others)))
