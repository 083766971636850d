"""IDM: adaptation with a third domain between source and target, maps of both mixed with ratios learned for each pair.

    L = (1 - w) CE(own classes) + w CE(mixed) + triplets + b bridge of features - d spread of the ratios

The labels and features of the mixed domain are bridged by the same ratios as its maps. With `--earlier_weight` there
are triplets with the features of earlier batches too (XBM): as many as both domains have images, each with the label
that it had in its batch.
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils.batches.pseudo_batches import gather_by_domain
from utils.evaluation.groups.clusters import NOISE
from utils.launch import gather_with_gradient
from utils.modeling.domain_norms import split_norms
from utils.modeling.losses import hard_triplet
from utils.modeling.memories import class_means
from utils.modeling.stages import stages_of
from utils.training.contrast import FeatureQueue


class IDM(nn.Module):
    """Encoder with a classifier of both domains, mixer and pseudo labels; `forward` is the loss of one batch of both.

    With several processes, each passes its share of the images through the backbone. The features are gathered, one
    domain after the other, so that BatchNorm and triplets see the whole batch, as in a run with one process.
    """

    def __init__(self, encoder, args, num_source, cameras, source_size=0):
        super().__init__()
        self.encoder, self.args, self.num_source = encoder, args, num_source
        self.register_buffer("pseudo_labels", torch.full((len(cameras),), NOISE))
        encoder.reset_classifier(num_source + len(cameras))
        self.earlier = None
        if args.earlier_weight:
            self.earlier = FeatureQueue(source_size + len(cameras), encoder.num_features)
        self.mixer = Mixer(encoder.backbone, args.mix_stage)
        # After the mixer a batch has three domains.
        before = self.mixer.norms_before(encoder.backbone)
        split_norms(encoder, lambda name: 2 if name in before else 3)
        self.mixer.attach(encoder.backbone)

    def tested(self):
        """The model that is clustered with, measured and saved."""
        return self.encoder

    def relabel(self, epoch, target, source, cluster):
        """Cluster for an epoch; each cluster's mean direction becomes its row of the classifier."""
        features = target()
        labels = cluster(features)
        weight = self.encoder.classifier.weight
        if epoch == 1:
            weight[: self.num_source] = source().to(weight.device)
        in_cluster, count = labels >= 0, int(labels.max()) + 1
        means = class_means(features[in_cluster], labels[in_cluster], count)
        weight[self.num_source : self.num_source + count] = means.to(weight.device)
        return labels

    def forward(self, images, rows):
        """`rows`: labels for source images; for target images `num_source` plus the number of the image."""
        features, rows = gather_by_domain(self.encoder.backbone(images), 3), gather_by_domain(rows, 2)
        with torch.autocast(images.device.type, enabled=False):
            bn_features, logits = self.encoder.neck(features.float())
            ratios = gather_with_gradient(self.mixer.ratios).float()
            loss, values = self.bridged_losses(features.float(), logits, rows, ratios)
        values = {"loss": loss, **values}
        return loss, {name: value.detach() for name, value in values.items()}, (bn_features.detach(), rows)

    def classes(self, rows):
        """The class of each row: the identity of a source row, `num_source` plus the cluster of a target row."""
        target = self.pseudo_labels[(rows - self.num_source).clamp(min=0)] + self.num_source
        return torch.where(rows < self.num_source, rows, target)

    def bridged_losses(self, features, logits, rows, ratios):
        """IDM's losses; `ratios` (B, 2): the shares of the source and of the target image in a mixed image."""
        args, classes = self.args, self.classes(rows)
        logits = logits[:, : self.num_source + int(self.pseudo_labels.max()) + 1]
        own_logits, mixed_logits = logits[: len(classes)], logits[len(classes) :]
        source, target, between = features.chunk(3)
        loss_id = F.cross_entropy(own_logits, classes, label_smoothing=args.label_smoothing)
        sides = torch.stack(
            [
                F.cross_entropy(mixed_logits, side, label_smoothing=args.label_smoothing, reduction="none")
                for side in classes.chunk(2)
            ],
            dim=1,
        )
        # With a gradient here the ratios would move to the easier label. They learn from the mixed maps, the bridge
        # loss and the diversity loss.
        loss_mixed = (ratios.detach() * sides).sum(1).mean()
        loss_triplet = hard_triplet(features[: len(classes)], classes, args.margin)
        apart = torch.stack([(between - side).square().sum(1).clamp(min=1e-12).sqrt() for side in (source, target)], 1)
        loss_bridge = (ratios * apart).sum(1).mean()
        loss_diversity = -ratios.var(0, correction=0).clamp(min=1e-12).sqrt().sum()
        loss = (1 - args.mix_weight) * loss_id + args.mix_weight * loss_mixed + loss_triplet
        loss = loss + args.bridge_weight * loss_bridge + args.diversity_weight * loss_diversity
        values = {
            "loss_id": loss_id,
            "loss_mixed": loss_mixed,
            "loss_triplet": loss_triplet,
            "loss_bridge": loss_bridge,
            "loss_diversity": loss_diversity,
        }
        if self.earlier is not None:
            own, queue = features[: len(classes)], self.earlier
            # Before the loss: at the first step there is a batch to compare with.
            queue.add(own.detach(), classes)
            values["loss_earlier"] = hard_triplet(own, classes, args.margin, queue.features, queue.labels)
            loss = loss + args.earlier_weight * values["loss_earlier"]
        return loss, values

    def after_step(self, bn_features, rows):
        """Nothing to do: gradients update everything."""


class Mixer(nn.Module):
    """Mixes each source map with the target map at the same place in the batch, after a stage of the backbone.

    The mixed maps are a third domain. The two ratios are computed from the means and maxima of both maps; `ratios`
    (B, 2) are those of the last batch. Both bridge losses favour a pure domain: in short trainings all ratios may move
    to one side before the diversity loss has an effect. `loss_diversity`, minus the sum of the standard deviations of
    the two ratios, is then 0.
    """

    def __init__(self, backbone, stage):
        super().__init__()
        self.stage, self.ratios = stage, None
        width = self.trace(backbone)[0]
        self.each = nn.Linear(2 * width, width)
        self.both = nn.Sequential(nn.Linear(width, width // 2), nn.Linear(width // 2, 2))

    def place(self, backbone):
        """The module whose output is mixed: the embedding before the blocks, or a stage of blocks."""
        stages = stages_of(backbone, "--method idm mixes")
        if self.stage >= len(stages):
            raise ValueError(f"--mix_stage {self.stage} is past the last stage of the backbone, {len(stages) - 1}")
        return stages[self.stage]

    @torch.no_grad()
    def trace(self, backbone):
        """The width of the mixed maps and the names of the norms before them, found by a pass with an empty image."""
        norm_names, width = [], []
        hooks = [
            module.register_forward_hook(lambda *call, name=name: None if width else norm_names.append(name))
            for name, module in backbone.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        hooks.append(self.place(backbone).register_forward_hook(lambda *call: width.append(width_of(call[2]))))
        was_training = backbone.training
        backbone.eval()(torch.zeros(1, 3, *backbone.image_size))
        backbone.train(was_training)
        for hook in hooks:
            hook.remove()
        return width[0], [f"backbone.{name}" for name in norm_names]

    def norms_before(self, backbone):
        return self.trace(backbone)[1]

    def attach(self, backbone):
        self.place(backbone).register_forward_hook(
            lambda module, inputs, output: self(output) if backbone.training else output
        )

    def forward(self, output):
        """[source, target] -> [source, target, mixed], for a tensor or a tuple whose first entry is that tensor."""
        if isinstance(output, tuple):
            return (self(output[0]), *output[1:])
        source, target = output.chunk(2)
        self.ratios = self.both(self.each(summary(source)) + self.each(summary(target))).softmax(1)
        shares = self.ratios.to(output.dtype).view(-1, 2, *[1] * (output.ndim - 1))
        return torch.cat([output, shares[:, 0] * source + shares[:, 1] * target])


def width_of(output):
    output = output[0] if isinstance(output, tuple) else output
    return output.shape[1 if output.ndim == 4 else 2]


def summary(maps):
    """Means and maxima over the places of maps (B, C, h, w) or tokens (B, T, C), without gradient: (B, 2 C)."""
    places = (2, 3) if maps.ndim == 4 else (1,)
    maps = maps.detach()
    return torch.cat([maps.mean(places), maps.amax(places)], dim=1)
