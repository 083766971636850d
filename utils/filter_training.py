"""The models of a source that nobody gave: its Re-ID model and its image classifier."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from utils.loading import IdentitySampler, ReIDImages, test_transform, train_transform
from utils.losses import PrototypeMemory
from utils.modeling import ReIDModel
from utils.targets import extract

LABEL_SMOOTHING, MEMORY_TEMPERATURE, MEMORY_MOMENTUM = 0.1, 0.05, 0.2


def train_model(kind, source, args, device, quiet=False):
    """A model of one source, by one process alone.

    `reid` learns identities and prototypes from augmented images that are not held out, `classifier` identities from
    all images as they are.
    """
    set_seed(args.seed)
    size, reid = tuple(args.resolution), kind == "reid"
    model = ReIDModel.for_training(args.backbone, num_ids=len(source.pids), image_size=size).to(device)
    rows = (~source.held_out).nonzero().flatten().tolist() if reid else list(range(len(source.train)))
    images, labels = source.train.select(rows), source.labels[rows].tolist()
    erasing, padding = (0.5, size[0] // 25) if reid else (0.0, 0)
    transform = train_transform(size, model.image_mean, model.image_std, padding=padding, erasing=erasing)
    # Of few identities, the batch has fewer.
    batch_size = min(args.train_batch_size, args.images_per_id * len(source.pids))
    sampler = IdentitySampler(labels, batch_size, args.images_per_id, args.seed)
    loader = torch.utils.data.DataLoader(
        ReIDImages(images, transform, labels),
        batch_sampler=sampler,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_num_workers > 0,
    )
    memory = None
    if reid:
        plain = test_transform(size, model.image_mean, model.image_std, "bicubic")
        memory = PrototypeMemory(
            torch.zeros(len(source.pids), model.num_features), MEMORY_TEMPERATURE, MEMORY_MOMENTUM
        )
        memory.rebuild(features_alone(model, images, plain, args.eval_batch_size, device), torch.tensor(labels))
        memory.to(device)
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(params, lr=args.learning_rate, weight_decay=1e-4)
    total = sum(1 for epoch in range(args.num_train_epochs) for _ in sampler.global_batches(epoch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=max(total, 2), pct_start=0.1
    )
    model.train()
    bar = tqdm(total=total, desc=f"training {kind} of {source.domain}", disable=True if quiet else None)
    for epoch in range(args.num_train_epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            targets = batch["labels"].to(device)
            output = model(batch["images"].to(device))
            loss = F.cross_entropy(output.logits.float(), targets, label_smoothing=LABEL_SMOOTHING if reid else 0.0)
            if memory is not None:
                loss = loss + memory(output.bn_features, targets)
            if not torch.isfinite(loss):
                raise ValueError(
                    f"training the {kind} model of {source.domain}: the loss is not finite at step {bar.n + 1}; "
                    f"lower --learning_rate {args.learning_rate}"
                )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if memory is not None:
                memory.update(output.bn_features.detach(), targets)
            bar.update()
    bar.close()
    return model.eval()


def features_alone(model, images, transform, batch_size, device):
    """Features by one process, while others do something else."""
    alone = SimpleNamespace(
        process_index=0, num_processes=1, is_main_process=False, device=device, autocast=nullcontext
    )
    return extract(model, images, transform, accelerator=alone, batch_size=batch_size)
