# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate>=1.12.0", "bitsandbytes>=0.50.0", "datasets>=4.5.0", "diffusers>=0.38.0", "huggingface_hub>=1.20.0",
#     "jinja2>=3.1.4", "numpy>=2.1.0", "peft>=0.19.0", "Pillow>=11.0.0", "safetensors>=0.7.0",
#     "scikit-learn>=1.5.2", "scipy>=1.14.1", "torch>=2.11.0", "torchvision>=0.26.0", "tqdm>=4.67.0",
#     "transformers>=5.17.0", "triton>=3.6.0; sys_platform == 'linux'",
# ]
# ///
"""Train a Re-ID model without labels, or with the labels of another domain: pseudo labels by clustering, every epoch.

    accelerate launch --config_file accelerate_config.yaml adapt_reid.py
    accelerate launch adapt_reid.py --target ./images --backbone output/people/model --output_dir output/adapted
    accelerate launch adapt_reid.py --recipe cluster-contrast --target msmt17 --steps_per_epoch 400 \\
        --data_root ~/reid --backbone output/pretrain/backbone --output_dir output/msmt17-unsupervised
    accelerate launch adapt_reid.py --recipe idm --source market1501 --target msmt17 --data_root ~/reid ...

The first is a demo on drawn people with the shipped stand-in CLIP, about a minute on two CPU cores; the second
takes a folder of images without labels. Each method stands in a file of `methods/`.

Before every epoch the target's training images are clustered: DBSCAN on k-reciprocal Jaccard distances, if a method
says nothing else. Then, with u the unit-length BNNeck feature of an image,

    cluster-contrast  CE(u M^T / temperature, cluster)         M: a prototype a cluster, moved after every step; noise
                                                               is left out
    hhcl              the same with two memories, of which one is moved by hard images and one by means
    spcl              CE(u C^T / temperature, class)           C: means of a memory with a row of each source identity
                                                               and of each target image; clusters that do not hold at
                                                               a looser and a tighter scale are dissolved, and each
                                                               image in none is a class of its own
    pplr              labels of the whole body and of its parts refine each other; contrast with proxies of cameras
    ice               a student learns from its running mean: hard positives, proxies of cameras, equal likenesses
    idm               classes of both domains, hard triplets, and a third domain between them: feature maps mixed with
                      ratios learned for each pair, whose labels and features are bridged likewise
    cacl              classes of both domains, one camera of the target after the other; a reconstruction
    unrn              after a training on the source, classes of both domains by a student, weighed by how far its
                      mean teacher agrees; contrast with the source's centres and with a queue of target images
    glt               after a training on the source, k-means groups of several numbers, shared out evenly among the
                      images after every epoch
    hcd               spcl with labels that move after every step, of clusters and of their parts; no clustering after
                      the first

Of the source, `--source`, labels are used; those of `--target`, where it has any, only for numbers in the report. A
batch has K images of each cluster, as different cameras saw it where the data say which camera an image is of.
With a source, BatchNorm has averages and weights of its own for each domain; the target's are saved.

Distances follow the paper on re-ranking, as IDM's code does; `--jaccard faiss` is that of the other methods' code: it
counts an image among its own k1 and does not divide a row's distances by its largest. The recipes set it, use learned
GeM and XBM where the authors do, and set `--norm_group` to the images of one of their GPUs. Numbers are of the last
epoch; published ones are of the epoch that was best on the test images.
"""

from methods.settings import (
    JACCARD,
    METHODS,
    NAMES,
    RECIPES,
    add_flags,
    check_reid_training,
    check_stages,
    named_method,
)
from utils import flags
from utils.flags import CLIP_DIR
from utils.ranges import at_least, fraction

DEMO_SOURCE = "synthetic:domain=a,num_ids=64"
DEMO_TARGET = "synthetic:domain=d,num_ids=32,images_per_id=16"

UNMEASURED = "nothing: no target has query and gallery; a labelled one has them with holdout=0.3 behind its name"
DEMO_WORDS = (
    "Demo: {} on drawn people, from the shipped stand-in CLIP; about a minute on two cores. "
    "For your own images: --target SPEC --data_root DIR --backbone DIR --recipe cluster-contrast"
)
STAND_IN = (
    "No --backbone or --recipe given: using the shipped stand-in CLIP, which knows drawn people only. "
    "A real one: --backbone microsoft/resnet-50"
)


def build_parser(shown=None):
    """`shown`: the method whose flags the help lists, beside those of all methods."""
    parser = flags.Parser(__doc__, recipes=RECIPES)
    flags.add_recipe(
        parser,
        "published values and an ImageNet ResNet-50, Market-1501 or MSMT17 as target (for MSMT17 cluster-contrast and "
        "spcl are published with twice the --steps_per_epoch)",
    )
    parser.add(
        "--setting",
        choices=tuple(METHODS),
        default="unsupervised",
        help="unsupervised: no labels at all; adaptation: the labels of --source",
    )
    parser.add(
        "--method",
        choices=NAMES,
        help="default cluster-contrast, under adaptation spcl; --method NAME --help lists only the flags of NAME",
    )
    data = flags.add_data(
        parser,
        source=f"labelled sets of --setting adaptation; its demo: {DEMO_SOURCE}",
        target="sets whose training images are clustered, or a folder of images; measured on where they have query "
        f"and gallery; default {DEMO_TARGET}",
    )
    flags.add_single_image_ids(data, idle=(lambda args: not args.source, "no --source"))
    group = flags.add_images(parser, resolution=[128, 64], padding=5, erasing=0.0)
    group.add(
        "--erasing_value",
        type=float,
        nargs="+",
        default=[0.5],
        help="what erasing writes after normalisation, one number or one for each channel",
    )
    group.add("--blur", type=fraction, default=0.0, help="probability of a Gaussian blur")
    group = parser.group("model")
    group.add(
        "--backbone",
        default=CLIP_DIR,
        help="model to start from, folder, Hub id, short name or file of weights: a backbone, such as backbone/ of "
        "pretrain_backbone.py, or a ReIDModel",
    )
    group.add("--pooling", choices=["mean", "gem"], default="mean", help="of a map; gem: a learned generalised mean")
    group.add(
        "--network",
        choices=["plain", "sbs"],
        default="plain",
        help="sbs: a ResNet gets non-local blocks in its two middle stages and loses the ReLU after its first norm",
    )
    group.add(
        "--norm_group",
        type=at_least(0),
        default=0,
        help="images whose BatchNorm statistics are taken together, as each of several GPUs does; default all of a "
        "domain in a batch",
    )

    group = parser.group("clustering", idle=(lambda args: args.method == "glt", "--method glt groups by k-means"))
    group.add("--eps", type=float, default=0.4, help="distance of neighbours in DBSCAN, 0 to 1")
    group.add("--min_samples", type=at_least(2), default=4, help="neighbours that make a core, with the image itself")
    group.add("--cluster_k1", type=at_least(1), default=15, help="reciprocal neighbours of an image")
    group.add("--cluster_k2", type=at_least(1), default=4, help="neighbours that are averaged over")

    group.add(
        "--jaccard",
        choices=tuple(JACCARD),
        default="paper",
        help="distance; faiss, of most methods' code, counts an image among its own k1 and divides by no largest one",
    )
    add_flags(parser, shown)

    group = flags.add_training(
        parser,
        batch=32,
        epochs=5,
        batch_help="images of each process, and as many of the source",
        accumulation=flags.ONE_PASS,
    )
    group.add("--steps_per_epoch", type=at_least(1), help="steps of an epoch; default: images divided by the batch")
    flags.add_optimizer(parser, learning_rate=3e-4, weight_decay=5e-4)
    flags.add_schedule(parser, milestones=[4])
    flags.add_memory(parser)
    flags.add_evaluation(parser, every=1, resample=True)
    flags.add_output(parser, "output/adapt")
    return parser


def parse_args(input_args=None):
    parser = build_parser(named_method(input_args))
    args = parser.parse(input_args)
    args.demo = args.target is None and args.source is None
    args.target = args.target or [DEMO_TARGET]
    args.method = args.method or METHODS[args.setting][0]
    args.memory_update = args.memory_update or ("hybrid" if args.method == "hhcl" else "momentum")
    if args.setting == "adaptation" and args.source is None and args.demo:
        args.source = [DEMO_SOURCE]
    check_args(parser, args)
    args.notes = parser.notes(args)
    return args


def check_args(parser, args):
    """What the arguments alone show to be wrong."""
    if args.method not in METHODS[args.setting]:
        needs = "" if args.setting == "adaptation" else "; it needs labels: --setting adaptation --source SPEC"
        parser.error(
            f"--method {args.method} is not one of --setting {args.setting}: {', '.join(METHODS[args.setting])}{needs}"
        )
    if args.setting == "adaptation" and args.source is None:
        parser.error("--setting adaptation needs a labelled --source beside --target")
    if args.setting == "unsupervised" and args.source is not None:
        parser.error(
            f"--source {' '.join(args.source)} has labels, which --setting unsupervised does not use: name the images "
            "with --target, or choose --setting adaptation"
        )
    for name in ("k1", "k2"):
        if args.origin[name] == "flag" and not args.rerank:
            parser.error(f"--{name} is of re-ranking, without --rerank; for the clustering give --cluster_{name}")
    gap = args.eps_gap if args.method == "spcl" else 0
    if not 0 < args.eps - gap <= args.eps + gap < 1:
        listed = f" with --eps_gap {args.eps_gap}" if gap else ""
        parser.error(f"--eps {args.eps}{listed} must be above 0 and below 1, the largest Jaccard distance")
    if (args.memory_update in ("hybrid", "instances")) != (args.method == "hhcl"):
        known = "hybrid and instances" if args.method == "hhcl" else "momentum, hard and mean"
        parser.error(f"--memory_update {args.memory_update} is not of --method {args.method}, which has {known}")
    if len(args.erasing_value) not in (1, 3):
        parser.error(f"--erasing_value takes 1 number or 3, got {len(args.erasing_value)}")
    if args.images_per_id < 2:
        parser.error(f"--images_per_id must be 2 or more, got {args.images_per_id}")
    check_stages(parser, args)
    check_reid_training(parser, args)


if __name__ == "__main__":
    # Before torch and transformers are imported, so that --help and a mistyped flag answer at once.
    args = parse_args()

from pathlib import Path

import datasets
import torch
from accelerate.utils import DistributedType, broadcast_object_list, set_seed

from kernels.ring.processes import all_processes
from methods.cacl import CaCL
from methods.cluster_contrast import ClusterContrast
from methods.glt import GLT
from methods.hcd import HCD
from methods.ice import ICE
from methods.idm import IDM
from methods.pplr import PPLR
from methods.spcl import SpCL
from methods.unrn import UNRN
from utils import launch
from utils.batches.augmentation import training_loader, view_transform
from utils.batches.pseudo_batches import PseudoBatches, of_other_cameras
from utils.datasets.load import digest_of, open_source
from utils.datasets.unlabelled import open_unlabelled, without_names
from utils.evaluation.features import extract
from utils.evaluation.groups.clusters import NOISE, agreement
from utils.evaluation.targets import open_targets
from utils.files import portable, to_json, write_together
from utils.modeling.domain_norms import group_batch_statistics, join_norms
from utils.modeling.folder import card_text
from utils.modeling.heads import add_gem
from utils.modeling.memories import class_means
from utils.modeling.networks.resnet import as_sbs
from utils.modeling.norms import share_batch_statistics
from utils.modeling.reid_model import ReIDModel
from utils.training.cluster_report import add_clusters, add_contact_sheet, describe_clusters
from utils.training.clustering import check_clusters, check_settings, cluster
from utils.training.loop import Training, norm_of, optimizer_of, rates_of, trained, transform_of
from utils.training.teacher import buffer_shapes, reshape_buffers

MODULES = {
    "cluster-contrast": ClusterContrast,
    "hhcl": ClusterContrast,
    "spcl": SpCL,
    "idm": IDM,
    "pplr": PPLR,
    "ice": ICE,
    "cacl": CaCL,
    "unrn": UNRN,
    "glt": GLT,
    "hcd": HCD,
}


class Defaults:
    """What holds for a method whose file does not define it."""

    under_deepspeed = False
    views = ("changed",)
    draw = staticmethod(of_other_cameras)
    # Whether some weights have no gradient in some steps.
    rests_weights = False

    @staticmethod
    def fresh_optimizer(args, epoch):
        """Whether the optimizer starts anew in an epoch."""
        return False

    @staticmethod
    def erasing(args, epoch):
        """The probability of random erasing in an epoch."""
        return args.erasing

    @staticmethod
    def scales(args):
        """The values of eps to cluster with."""
        return [args.eps]

    @staticmethod
    def least_cameras(args):
        return 1

    @staticmethod
    def check_images(args, count):
        """ValueError where the target's images are too few."""
        check_settings(
            count, of(MODULES[args.method], "scales")(args), args.min_samples, args.cluster_k1, args.cluster_k2
        )

    @staticmethod
    def clusterings(features, args, group):
        """`Clusters` of the features, one for each of the scales; the processes of a group share the work."""
        options = {"min_samples": args.min_samples, "k1": args.cluster_k1, "k2": args.cluster_k2}
        scales = of(MODULES[args.method], "scales")(args)
        return cluster(features, eps=scales, compat=JACCARD[args.jaccard], **options, group=group)

    @staticmethod
    def labels_of(clusters, threshold):
        return clusters[0].labels, threshold

    @staticmethod
    def labels_for_batches(labels, key):
        return labels

    @staticmethod
    def epoch_steps(epoch, steps, batch_size):
        """The steps of an epoch; `steps` as the flags say."""
        return steps

    @staticmethod
    def draw_of_epoch():
        """How an epoch draws the images of a cluster, instead of `draw`."""
        return None

    @staticmethod
    def all_steps(args, steps):
        """The steps of the training, where it does not end by its number of epochs."""
        return None

    @staticmethod
    def rate(args, steps):
        """A factor on the learning rate by epoch and step, instead of that of warmup_multistep."""
        return None


def of(method, name):
    return getattr(method, name, getattr(Defaults, name))


# Training


def main(args):
    kind = MODULES[args.method]
    accelerator = launch.start_training(args, find_unused_parameters=of(kind, "rests_weights"))
    stand_ins = STAND_IN if args.backbone == CLIP_DIR else None
    launch.introduce(args, accelerator, demo=DEMO_WORDS.format(args.method), stand_ins=stand_ins)
    # What can be wrong with data and configuration shows before a model is loaded.
    if not of(kind, "under_deepspeed") and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            f"--method {args.method} writes weights outside of the optimizer, which DeepSpeed does not see; start it "
            "without DeepSpeed"
        )
    target, truth, measurable = open_unlabelled(args.target, args.data_root, skip_unreadable=args.skip_unreadable)
    source, source_labels = None, torch.zeros(0, dtype=torch.int64)
    if args.source is not None:
        source, source_labels, _ = open_source(
            args.source, args.data_root, single_image_ids=args.single_image_ids, skip_unreadable=args.skip_unreadable
        )
    targets = open_targets(measurable, args.data_root, skip_unreadable=args.skip_unreadable)
    of(kind, "check_images")(args, len(target))
    cameras = cameras_of(args, target, of(kind, "least_cameras")(args))
    images = target
    if source is not None:
        images = datasets.concatenate_datasets([without_names(source.select_columns(target.column_names)), target])
    batch_size = launch.global_batch_size(args, accelerator)
    if args.norm_group and args.train_batch_size % args.norm_group:
        raise ValueError(
            f"the {args.train_batch_size} images of a process and domain (--train_batch_size) cannot be normalised in "
            f"groups of {args.norm_group} (--norm_group): give a divisor"
        )
    steps = args.steps_per_epoch or max(1, len(target) // batch_size)
    sampler = PseudoBatches(
        batch_size,
        args.images_per_id,
        steps,
        list(zip(images["domain"], images["camid"], strict=True)),
        source_labels=source_labels.tolist(),
        draw=of(kind, "draw"),
        seed=args.seed,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    training = Training(
        args,
        accelerator,
        sampler,
        images,
        script="adapt_reid.py",
        data=[digest_of(target, torch.zeros(0)), digest_of(source, source_labels) if source else None],
        num_steps=of(kind, "all_steps")(args, steps),
    )
    training.state.setdefault("clusters", [])
    num_source = int(source_labels.max()) + 1 if source else 0
    accelerator.print(
        f"{' + '.join(args.target)}: {len(target)} images without labels"
        + (f"; {' + '.join(args.source)}: {len(source)} images of {num_source} identities" if source else "")
        + f"; measured on {', '.join(target.spec for target in targets) or UNMEASURED}"
    )

    set_seed(args.seed)
    encoder = ReIDModel.for_training(
        args.backbone, num_ids=0, image_size=tuple(args.resolution), resample=args.test_resample
    )
    launch.print_notes(accelerator, encoder.notes)
    if args.network == "sbs":
        encoder.backbone = as_sbs(encoder.backbone)
    if args.pooling == "mean" and args.origin["pooling"] == "flag" and encoder.backbone.pooling is not None:
        raise ValueError(f"--pooling mean: {args.backbone} has learned another pooling; leave it out to go on with it")
    if args.pooling == "gem" and encoder.backbone.pooling is None:
        add_gem(encoder.backbone)
    if args.gradient_checkpointing:
        encoder.enable_gradient_checkpointing()
    if args.norm_group:
        group_batch_statistics(encoder, args.norm_group)
    else:
        share_batch_statistics(encoder.backbone, accelerator.device)
    bare = kind(encoder, args, num_source, cameras, source_size=len(source_labels))
    # Of the source the identity counts, of the target the image.
    numbers = torch.cat([source_labels, num_source + torch.arange(len(target))]).to(accelerator.device)
    looks = of(kind, "views"), encoder.image_size, encoder.image_mean, encoder.image_std
    changes = {"padding": args.padding, "erasing_value": args.erasing_value, "blur": args.blur}

    def loader_with(erasing):
        return training_loader(
            encoder,
            images,
            # The target's labels are nowhere to be found in a batch.
            source_labels.tolist() + [-1] * len(target),
            sampler,
            transform=view_transform(*looks, **changes, erasing=erasing),
            num_workers=args.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )

    sizes = buffer_shapes(bare)
    if training.resumed:
        reshape_buffers(bare, training.state["shapes"])
    method, optimizer = accelerator.prepare(bare, optimizer_of(args, [{"params": trained(bare)}]))
    schedule = of(kind, "rate")(args, steps) if args.lr_scheduler == flags.MULTISTEP else None
    training.begin(method, optimizer, rates_of(args, optimizer, training.num_steps, schedule))
    params = trained(method)

    def features_of(dataset, words, model=None):
        return extract(
            model or bare.tested(),
            dataset,
            transform_of(encoder),
            accelerator=accelerator,
            batch_size=args.eval_batch_size,
            num_workers=args.dataloader_num_workers,
            desc=f"features of the {words}",
        )

    def features_of_source(rows=None):
        """The mean direction of each identity, or the features of some images."""
        if rows is None:
            return class_means(features_of(source, "source"), source_labels, num_source)
        return features_of(source.select(rows), "source")

    def relabel(epoch):
        """Clusters of the target as the model sees it now; memory or classifier follow them."""
        labels = bare.relabel(
            epoch,
            target=lambda model=None: features_of(target, "target", model),
            source=features_of_source,
            cluster=lambda features=None, rows=None, labels=None: shared_labels(
                args,
                training,
                bare,
                features,
                truth if rows is None or truth is None else truth[rows],
                epoch - 1,
                labels=labels,
            )[0],
        )
        # Not before: extraction may put other tensors in the place of buffers.
        bare.pseudo_labels.copy_(labels)
        # Sizes that follow from the clusters; a run that resumes makes room for them.
        training.state["shapes"] = {name: shape for name, shape in buffer_shapes(bare).items() if shape != sizes[name]}

    if not training.resumed:
        training.measure(0, bare.tested(), targets)
    erasing = loader = None
    for epoch in training.epochs():
        if not training.in_mid_epoch:
            with torch.no_grad():
                relabel(epoch)
            if of(kind, "fresh_optimizer")(args, epoch):
                optimizer.state.clear()
        # Its processes keep a transform for good.
        if erasing != (wanted := of(kind, "erasing")(args, epoch)):
            erasing, loader = wanted, loader_with(wanted)
        labels = of(bare, "labels_for_batches")(bare.pseudo_labels.cpu(), f"{args.seed}/{epoch}")
        sampler.take(labels, of(bare, "epoch_steps")(epoch, steps, batch_size), of(bare, "draw_of_epoch")())
        method.train()
        for batch in training.batches(loader):
            training.log(training_step(training, method, bare, batch, params, numbers))
        if training.measures(epoch):
            training.measure(epoch, bare.tested(), targets)
    if training.stopped:
        return training.end()

    features = features_of(target, "target")
    ended = training.epoch if training.in_mid_epoch else training.epoch - 1
    labels, clusters = shared_labels(args, training, bare, features, truth, ended, strict=False)
    encoder = bare.tested()
    join_norms(encoder)
    encoder.reset_classifier(0)
    if accelerator.is_main_process:
        encoder.save_pretrained(Path(args.output_dir) / "model", card=card_of(args, training, encoder, len(target)))
    return training.end(
        lambda: report_of(args, training, source, target, truth, clusters, labels, features),
        upload=lambda repo_id: encoder.push_to_hub(repo_id, card=card_of(args, training, encoder, len(target))),
    )


def training_step(training, method, bare, batch, params, numbers):
    """Losses, gradients, the optimizer's step, then memory or teacher."""
    args, accelerator, optimizer = training.args, training.accelerator, training.optimizer
    images, rows = (batch[name].to(accelerator.device) for name in ("images", "indices"))
    # DeepSpeed does not do so by itself.
    with accelerator.autocast():
        loss, values, seen = method(images, numbers[rows])
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(params, args.max_grad_norm or float("inf"))
    optimizer.step()
    optimizer.zero_grad()
    bare.after_step(*seen)
    return {"grad_norm": norm_of(norm, loss.device), **values}


def shared_labels(args, training, bare, features, truth, epoch, strict=True, labels=None):
    """(labels, Clusters or None) of the target, equal everywhere: all processes cluster, the main one decides.

    `strict`: ValueError where there are too few clusters to train with. `truth` is for the report alone. `labels` that
    a method has moved by itself are only recorded.
    """
    accelerator, state = training.accelerator, training.state
    message, clusters = [None], None
    if labels is not None:
        message = [(labels, state.get("independence"))]
    else:
        try:
            group = all_processes()
            clusters = of(bare, "clusterings")(features.to(accelerator.device), args, group)
            labels, threshold = of(bare, "labels_of")(clusters, state.get("independence"))
            if strict:
                check_clusters(clusters[0], where=" + ".join(args.target))
            message = [(labels, threshold)]
        except ValueError as error:
            message = [str(error)]
    answer = broadcast_object_list(message)[0]
    if isinstance(answer, str):
        raise ValueError(f"before epoch {epoch + 1}: {answer}")
    labels, state["independence"] = answer
    record = {
        "epoch": epoch,
        "clusters": int(labels.max()) + 1,
        "noise": float((labels == NOISE).double().mean()),
        **(agreement(labels, truth) if truth is not None else {"ari": None, "nmi": None}),
    }
    # A run that resumes clusters the images of an epoch it has begun with once more, at its end.
    state["clusters"] = [other for other in state["clusters"] if other["epoch"] != epoch] + [record]
    accelerator.print(f"epoch {epoch}: {describe_clusters(record)}")
    numbers = {f"clusters/{name}": value for name, value in record.items() if value is not None and name != "epoch"}
    accelerator.log(numbers, step=state["step"])
    if accelerator.is_main_process:
        with write_together(args.output_dir) as part:
            part("clusters.json").write_text(to_json(state["clusters"]))
    return labels, clusters and clusters[0]


def cameras_of(args, target, least):
    """The number of each image's camera, from 0; ValueError for fewer than `least` cameras."""
    listed = list(zip(target["domain"], target["camid"], strict=True))
    numbers = {camera: number for number, camera in enumerate(sorted(set(listed)))}
    if len(numbers) < least:
        raise ValueError(
            f"--method {args.method} needs images of {least} cameras or more, and {' + '.join(args.target)} shows "
            f"{len(numbers)}: give a set whose names or column camid tell the cameras, or another method"
        )
    return torch.tensor([numbers[camera] for camera in listed])


# Results


def card_of(args, training, encoder, num_images):
    title = f"{args.method} trained on {' + '.join(portable(args.target))}"
    title += f" from {' + '.join(portable(args.source))}" if args.source else ""
    return training.card(title, card_text(encoder), images=num_images)


def report_of(args, training, source, target, truth, clusters, labels, features):
    facts = [("Source", f"{' + '.join(portable(args.source))}, {len(source):,} images")] if source is not None else []
    facts += [
        ("Target", " + ".join(portable(args.target))),
        ("Images", f"{len(target):,}"),
        ("Start", Path(args.backbone).name),
        ("Clusters", describe_clusters(training.state["clusters"][-1])),
    ]
    lead = "A Re-ID model, trained on pseudo labels"
    report = training.report(f"{args.setting.capitalize()}: {args.method}", lead, facts)
    add_clusters(report, training.state["clusters"], clusters)
    add_contact_sheet(report, target, labels, features, truth)
    return report


def run_script(args):
    launch.end_with(main, args, "adapt_reid.py")


if __name__ == "__main__":
    run_script(args)
