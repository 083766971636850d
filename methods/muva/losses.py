"""MUVA's losses and conditions in DCAC's module, and test features under given masks."""

import math

import torch
import torch.nn.functional as F

from utils.batches.transforms import TransformedImages
from utils.evaluation.features import extract
from utils.launch import gather_with_gradient


def mask_losses(logits, masks):
    """BCE and 1 - Dice of each image (B, 2) float32: logits (blocks, B, parts, patches), masks bool without blocks."""
    with torch.autocast(logits.device.type, enabled=False):
        logits, truth = logits.float(), masks.to(logits.device, torch.float32).expand(logits.shape)
        bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((0, 2, 3))
        seen = logits.sigmoid()
        both, sizes = (seen * truth).sum(-1) / 1000, (seen.sum(-1) + truth.sum(-1)) / 1000
        dice = (2 * both + 1e-6) / (sizes + 1e-6)
        return torch.stack([bce, 1 - dice.mean((0, 2))], dim=1)


def with_parts(base):
    """`base`, the DCAC module of train_dcac.py, with MUVA's losses and conditions."""

    class PartDCAC(base):
        def __init__(
            self,
            *parts,
            probabilities,
            tau,
            text_tau,
            text_weight,
            text_temperature,
            mask_weight,
            mask_lr_multiplier,
            **options,
        ):
            super().__init__(*parts, **options)
            self.probabilities, self.tau, self.text_tau = probabilities, tau, text_tau
            self.text_weight, self.mask_weight = text_weight, mask_weight
            self.mask_lr_multiplier, self.text_temperature = mask_lr_multiplier, text_temperature
            # Of all identities; a checkpoint holds them.
            self.register_buffer("texts", torch.zeros(self.encoder.num_ids, self.encoder.num_features))

        def encode(self, images, masks):
            """Features under predicted masks, and the losses of these masks."""
            rows, width = self.in_passes(self.rows_of, images, masks), self.encoder.num_features
            features, of_masks = gather_with_gradient(rows).split([width, 2], dim=1)
            bce, dice = self.mask_weight * of_masks.mean(0)
            return features, {"loss_bce": bce, "loss_dice": dice}

        def predictor_groups(self, rate):
            """The parameters of the mask predictors for an optimizer: at a higher rate, without decay."""
            params = list(self.encoder.backbone.model.predictors.parameters())
            return [{"params": params, "lr": self.mask_lr_multiplier * rate, "weight_decay": 0.0}]

        def rows_of(self, images, masks):
            features, logits = self.encoder.backbone(images, with_logits=True)
            return torch.cat([features.float(), mask_losses(logits, masks)], dim=1)

        def identity_losses(self, features, bn_features, logits, labels):
            loss = F.cross_entropy(self.text_logits(features), labels, label_smoothing=self.label_smoothing)
            losses = super().identity_losses(features, bn_features, logits, labels)
            return losses | {"loss_text": self.text_weight * loss}

        def text_logits(self, features):
            return features.float() @ self.texts.t() / self.text_temperature

        def condition_inputs(self, features, bn_features, logits, warmup):
            if warmup:
                features, bn_features, logits = features.detach(), bn_features.detach(), logits.detach()
            elif self.balance is not None:
                features = self.balance(features)
                logits, bn_features = self.neck_again(features)
            return self.scored(features, logits, bn_features)

        def scored(self, features, logits, bn_features):
            """Logits whose softmax, at temperature `tau`, are the probabilities asked for."""
            if self.probabilities == "text":
                logits = self.text_logits(features) * (self.tau / self.text_tau)
            elif self.probabilities == "text-mean":
                by_text = (self.text_logits(features) / self.text_tau).softmax(1)
                mean = ((logits / self.tau).softmax(1) + by_text) / 2
                logits = self.tau * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
            elif self.probabilities == "parts":
                # (B, grains, N): each grain's columns of the classifier.
                grains = self.encoder.backbone.num_grains, -1
                weight = self.encoder.classifier.weight.unflatten(1, grains)
                logits = torch.einsum("bgd,ngd->bgn", bn_features.unflatten(1, grains), weight)
            return logits, bn_features

    return PartDCAC


def extract_under(masks, encoder, dataset, transform, *, neck=True, **options):
    """Features as by `extract`, under given masks (N, parts, patches); without `neck` before BatchNorm."""
    shape, size = (3, *encoder.image_size), masks.shape[1:]

    def compute(rows):
        images, seen = rows.split([math.prod(shape), math.prod(size)], dim=1)
        features = encoder.backbone(images.unflatten(1, shape), seen.unflatten(1, size) > 0.5)
        return encoder.bnneck(features) if neck else features

    def pictures(dataset, transform):
        return MaskedPictures(dataset, transform, masks)

    return extract(encoder, dataset, transform, pictures=pictures, compute=compute, **options)


class MaskedPictures(TransformedImages):
    """Each image and its masks as one row of numbers."""

    def __init__(self, dataset, transform, masks):
        super().__init__(dataset, transform)
        self.masks = masks

    def __getitem__(self, row):
        return torch.cat([super().__getitem__(row).flatten(), self.masks[row].flatten().float()])
