"""The models of a source that nobody gave: its Re-ID model and its image classifier."""

import random

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from utils.filter_scoring import view_of
from utils.loading import IdentitySampler, ReIDImages, train_transform
from utils.losses import hard_triplet
from utils.modeling import ReIDModel
from utils.scene_changes import change_scene

LABEL_SMOOTHING, ERASING, WEIGHT_DECAY, WARMUP = 0.1, 0.5, 1e-4, 0.1


def train_model(kind, source, args, device, quiet=False):
    """A model of one source, by one process alone.

    `reid`: the head of `--reid_method`, cross-entropy and triplets, on images that are not held out, moved, mirrored,
    put into other scenes and erased. `classifier`: BNNeck and cross-entropy on all images, mirrored and no more, so
    that it knows an image by all that is in it.
    """
    set_seed(args.seed)
    size, reid = tuple(args.resolution), kind == "reid"
    method = args.reid_method if reid else "bot"
    model = ReIDModel.for_training(args.backbone, num_ids=len(source.pids), image_size=size, method=method).to(device)
    rows = (~source.held_out).nonzero().flatten().tolist() if reid else list(range(len(source.train)))
    images, labels = source.train.select(rows), source.labels[rows].tolist()
    # Of few identities, the batch has fewer.
    batch_size = min(args.train_batch_size, args.images_per_id * len(source.pids))
    sampler = IdentitySampler(labels, batch_size, args.images_per_id, args.seed)
    # Between 0 and 1, for what changes scenes.
    plain = train_transform(size, (0.0,) * 3, (1.0,) * 3, padding=size[0] // 25 if reid else 0, erasing=0.0)
    loader = torch.utils.data.DataLoader(
        ReIDImages(images, plain, labels),
        batch_sampler=sampler,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_num_workers > 0,
    )
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(params, lr=args.learning_rate, weight_decay=WEIGHT_DECAY)
    epochs = args.num_train_epochs if reid else args.classifier_epochs
    total = sum(1 for epoch in range(epochs) for _ in sampler.global_batches(epoch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=max(total, 2), pct_start=WARMUP
    )
    change = SceneChange(model, args.seed) if reid else view_of(model).scaled
    model.train()
    bar = tqdm(total=total, desc=f"training {kind} of {source.domain}", disable=True if quiet else None)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            targets = batch["labels"].to(device)
            output = model.outputs(model.pool(change(batch["images"]).to(device)).float())
            smoothing = LABEL_SMOOTHING if reid else 0.0
            losses = [F.cross_entropy(logits.float(), targets, label_smoothing=smoothing) for logits in output.logits]
            loss = torch.stack(losses).mean()
            if reid:
                loss = loss + torch.stack([hard_triplet(one, targets) for one in output.compared]).mean()
            if not torch.isfinite(loss):
                raise ValueError(
                    f"training the {kind} model of {source.domain}: the loss is not finite at step {bar.n + 1}; "
                    f"lower --learning_rate {args.learning_rate}"
                )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.update()
    bar.close()
    return model.eval()


class SceneChange:
    """Images between 0 and 1 in other scenes, erased here and there, as the model takes them."""

    def __init__(self, model, seed):
        self.view = view_of(model)
        self.eraser = train_transform(self.view.size, erasing=ERASING)
        self.generator, self.rng = torch.Generator().manual_seed(seed), random.Random(f"erasing/{seed}")

    def __call__(self, images):
        images = self.view.scaled(change_scene(images, self.generator))
        for image in images:
            if self.rng.random() < self.eraser.erasing:
                self.eraser.erase(image, self.rng)
        return images
