"""What trainings of a Re-ID model share, by labels or by pseudo labels: checks, optimiser, batches, the end."""

from pathlib import Path

import torch

from utils.batches.images import ReIDImages
from utils.batches.transforms import test_transform, train_transform
from utils.evaluation.targets import measure_targets
from utils.files import run_record, to_json, write_together
from utils.flags import CLIP_DIR, describe_origin
from utils.launch import tracked
from utils.modeling.folder import card_text, training_card
from utils.reporting.report import text_table
from utils.training.optimizer import LearningRate, build_optimizer
from utils.training.report import before_and_after

# What may differ from the checkpoint's run without changing what it trains.
FREE_ON_RESUME = (
    "output_dir", "data_root", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit",
    "log_every", "report_to", "dataloader_num_workers", "max_train_steps", "eval_batch_size", "recipe", "push_to_hub",
    "hub_model_id", "train_batch_size", "demo", "origin", "gradient_checkpointing",
)  # fmt: skip


def check_training(parser, args):
    """What can be told from the arguments alone."""
    if min(args.resolution) < 8:
        parser.error(f"--resolution must be at least 8 pixels, got {' '.join(map(str, args.resolution))}")
    if args.use_8bit_adam and args.optimizer == "sgd":
        parser.error("--use_8bit_adam goes with --optimizer adam or adamw, not sgd")
    if args.gradient_accumulation_steps != 1:
        parser.error(
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps} cannot be: BatchNorm, triplets and "
            "memory look at a whole batch at once; for less memory use --gradient_checkpointing, --mixed_precision or "
            "more processes"
        )


def introduce(args, demo, say):
    """The first lines of a run; `demo` says what runs where nothing was asked for."""
    if args.demo:
        say(demo)
    elif args.backbone == CLIP_DIR:
        say(
            "No --backbone or --recipe given: using the shipped stand-in CLIP, which knows drawn people only. "
            "A real one: --backbone microsoft/resnet-50"
        )
    for line in describe_origin(args, args.origin):
        say(line)


def optimizer_of(args, model):
    return build_optimizer(
        [{"params": trained(model)}],
        args.optimizer,
        learning_rate=args.learning_rate,
        weight_decay=args.adam_weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        epsilon=args.adam_epsilon,
        use_8bit=args.use_8bit_adam,
    )


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def rates_of(args, optimizer, num_steps, schedule=None):
    """`schedule`: a function in place of --lr_scheduler."""
    return LearningRate(
        optimizer,
        schedule or args.lr_scheduler,
        warmup_epochs=args.lr_warmup_epochs,
        warmup_factor=args.lr_warmup_factor,
        milestones=args.lr_milestones,
        gamma=args.lr_gamma,
        warmup_steps=args.lr_warmup_steps,
        num_steps=num_steps,
    )


def transform_of(model):
    """How a model's images are prepared where it is measured."""
    return test_transform(model.image_size, model.image_mean, model.image_std, model.resample)


def build_loader(args, accelerator, model, dataset, labels, sampler):
    """Augmented batches of a sampler that gives keyed rows."""
    transform = train_transform(
        model.image_size, model.image_mean, model.image_std, padding=args.padding, erasing=args.erasing
    )
    return torch.utils.data.DataLoader(
        ReIDImages(dataset, transform, labels),
        batch_sampler=sampler,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=args.dataloader_num_workers > 0,
    )


def write_arguments(args, accelerator, project):
    """args.json, and the trackers' start."""
    if accelerator.is_main_process:
        with write_together(args.output_dir) as aside:
            aside("args.json").write_text(to_json(run_record(args)))
    accelerator.init_trackers(project, config=tracked(args))


def measure(args, accelerator, state, model, targets, epoch, rerank):
    """`rerank`: (k1, k2) of re-ranking, where --rerank asks for it."""
    k1, k2 = rerank
    measure_targets(
        state,
        epoch,
        model,
        targets,
        transform_of(model),
        accelerator=accelerator,
        output_dir=args.output_dir,
        batch_size=args.eval_batch_size,
        num_workers=args.dataloader_num_workers,
        rerank={"k1": k1, "k2": k2, "lambda_value": args.lambda_value} if args.rerank else None,
    )


def save_model(args, script, model, title, targets, details):
    """`model/` with its card, of the command that made it."""
    card = training_card(title, card_text(model), script, args, metrics=targets, details=details)
    model.save_pretrained(Path(args.output_dir) / "model", card=card)
    return card


def say_goodbye(args, model, card, history):
    """The table of what came out, and the upload."""
    output_dir = Path(args.output_dir)
    if history:
        print(text_table(["target", "number", "before", "after", "points"], before_and_after(history)))
    print(f"Results: {output_dir}; open {output_dir / 'report.html'}")
    if args.push_to_hub:
        repo_id = args.hub_model_id or output_dir.resolve().name
        print(f"Uploaded: {model.push_to_hub(repo_id, card=card)}")
