# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate>=1.12.0", "bitsandbytes>=0.50.0", "datasets>=4.5.0", "diffusers>=0.38.0", "huggingface_hub>=1.20.0",
#     "jinja2>=3.1.4", "numpy>=2.1.0", "peft>=0.19.0", "Pillow>=11.0.0", "safetensors>=0.7.0",
#     "scikit-learn>=1.5.2", "scipy>=1.14.1", "torch>=2.11.0", "torchvision>=0.26.0", "tqdm>=4.67.0",
#     "transformers>=5.17.0", "triton>=3.6.0; sys_platform == 'linux'",
# ]
# ///
"""Evaluate a Re-ID model: ranking, re-ranking, thresholds, search in your own images, identities across cameras.

    python evaluate.py --model output/model --data market1501 --data_root ~/reid --rerank --output_dir output/market
    python evaluate.py --model output/model --query_dir lost --gallery_dir cameras --output_dir output/search
    python evaluate.py --model output/model --query_dir lost --gallery_dir cameras --gallery_features kept
    python evaluate.py --model output/model --group_dir tracklets --output_dir output/identities

With `--calibrate` the first command also leaves `calibration.json` in the model's folder, and the second then decides
for each query whether the nearest image shows the same person.

Without arguments it is a demo: the shipped stand-in CLIP on people drawn by code. Features are stored in the
output folder: the same command with `--rerank` or another `--protocol` does not extract them again. `--features FILE`
ranks features of any other tool; `--model DIR --export onnx FILE.onnx` writes a model for onnxruntime.
"""

import os
from pathlib import Path

from utils import flags, ranges
from utils.flags import CLIP_DIR
from utils.ranges import at_least

DEMO_MODEL = Path(CLIP_DIR)
DEMO_DATA = "synthetic:domain=b,num_ids=16"
DEMO_RESOLUTION = (128, 64)
DEMO = (
    "Demo: the shipped stand-in CLIP, without training, on drawn people. "
    "For your own: --model DIR --data SPEC --data_root DIR, or --query_dir DIR --gallery_dir DIR"
)
# The protocols of utils.evaluation.metrics.
PROTOCOLS = ("market", "cuhk03", "all")


def build_parser():
    parser = flags.Parser(__doc__)
    group = parser.group("model")
    group.add(
        "--model",
        help="a ReIDModel folder or Hub id, a plain backbone (CLIP, ResNet, Swin, ViT, ...) for zero-shot features, "
        "or a file of weights, see the README; default: the shipped stand-in CLIP",
    )
    group.size(
        "--resolution",
        help="input of a backbone or file in pixels; default 256 128 or the file's (a ReIDModel folder has its own)",
    )
    group.add(
        "--export",
        nargs=2,
        metavar=("FORMAT", "FILE"),
        help="`onnx FILE`: write the model with a free batch size and check it against torch's features; with --model "
        "and no data nothing else is done",
    )
    group.switch("--calibrate", "write calibration.json into the folder of --model too: searches then give decisions")
    group.add(
        "--calibration",
        metavar="FILE",
        idle=(lambda args: not args.query_dir, "no --query_dir"),
        help="search: a calibration.json elsewhere; default: that beside the weights of --model, on the Hub too",
    )
    group.switch(
        "--camera_embeddings",
        "give each image's camera to a model trained with them (SIE of TransReID, CLIP-ReID): right if the data's "
        "cameras, counted from 0, are those of its training; else it takes the mean of its cameras",
    )

    group = parser.group("data")
    group.add(
        "--data",
        metavar="SPEC",
        help=f"data set, such as market1501 or viper:split=3; all images of one without query and gallery are "
        f"measured; default: {DEMO_DATA}",
    )
    group.add("--data_root", help="folder that holds the benchmarks; default: where --data itself points")
    group.add(
        "--splits",
        type=at_least(1),
        help="average over splits 0..N-1 of a small set (viper, grid, prid, ilids): mean and deviation",
    )
    group.add(
        "--query_dir", help="search: images to look for, a folder or one; needs --gallery_dir or --gallery_features"
    )
    group.add(
        "--gallery_dir",
        help="search: folder of the images to look in; labels are read from names like 0001_c2_x.jpg or folders",
    )
    group.add(
        "--gallery_features",
        metavar="DIR",
        idle=(lambda args: not args.query_dir, "no --query_dir"),
        help="search: folder of a gallery whose features stay on disk, larger than memory: made from the images of "
        "--gallery_dir, and searched again without them",
    )
    group.switch(
        "--append",
        "search: add the images of --gallery_dir that are new to --gallery_features; only they are extracted",
        idle=(lambda args: not (args.gallery_features and args.gallery_dir), "no --gallery_dir, --gallery_features"),
    )
    group.add(
        "--features",
        metavar="FILE",
        help="rank these features instead of extracting: safetensors or npz with qf, gf, q_pid, g_pid, q_cam, g_cam; "
        "with --data the report shows that set's images",
    )
    group.switch("--skip_unreadable", flags.SKIP_WORDS)
    add_grouping(parser)

    group = parser.group("ranking")
    group.add(
        "--protocol",
        choices=PROTOCOLS,
        help="market drops gallery images of the query's identity and camera, cuhk03 also draws one image of each "
        "identity for the CMC, all drops only the same file; default market, or all where there are no cameras",
    )
    group.add(
        "--topk",
        type=at_least(1),
        help="images per query in rankings.csv; default 50, or the whole gallery if it is smaller",
    )
    flags.add_reranking(group)
    group.add(
        "--rerank_compat",
        choices=["torchreid"],
        idle=(lambda args: not args.rerank, "no --rerank"),
        help="re-ranking: torchreid's distance to the fourth power, to compare with published numbers",
    )
    group.add(
        "--false_alarm_rate",
        type=ranges.fraction,
        default=0.01,
        idle=(lambda args: not args.query_dir, "no --query_dir"),
        help="search: chance of a yes for somebody who is not in the gallery that you accept",
    )
    group.add("--backend", choices=["auto", "torch", "triton"], default="auto", help="implementation of the kernels")

    group = parser.group("running")
    group.add("--eval_batch_size", "--batch_size", type=at_least(1), default=64, help="images of each process")
    flags.add_workers(group)
    group.add("--mixed_precision", choices=flags.PRECISIONS, help="of extraction; default: accelerate's setting")
    group.add("--seed", type=ranges.seed, default=0, help="of the report's random queries and of intervals")

    group = parser.group("output")
    group.add("--output_dir", default="output/evaluate", help="folder of the results")
    group.add(
        "--report_queries",
        type=at_least(0),
        default=4,
        help="queries of each kind (best, worst, random) in the report, 0 for none",
    )
    return parser


def add_grouping(parser):
    group = parser.group("grouping", idle=(lambda args: not args.group_dir, "no --group_dir"))
    group.add(
        "--group_dir",
        help="give every image or tracklet an identity, across cameras. Images directly in this folder are items of "
        "their own, any other folder of images is one tracklet, and so is each track of a MOT file, SEQ/NAME.txt or "
        "SEQ/gt/gt.txt beside SEQ/img1/000001.jpg. Camera and frame are read from names like 0001_c2s1_000123_00.jpg "
        "or track7_c2_f123.jpg, the camera also from folders like c2 or cam2; in MOT each SEQ is a camera. No camera "
        "sees an identity twice at one time",
    )
    group.add("--eps", type=float, default=0.4, help="distance of neighbours in DBSCAN, above 0 and below 1")
    group.add("--min_samples", type=at_least(2), default=2, help="neighbours that make a core, with the item itself")
    group.add(
        "--cluster_k1",
        type=at_least(1),
        help="reciprocal neighbours of an item; default 8, or a third of the items if they are few",
    )
    group.add("--cluster_k2", type=at_least(1), help="neighbours averaged over; default 4, at most cluster_k1")


def parse_args(input_args=None):
    parser = build_parser()
    args = parser.parse(input_args)
    check_args(parser, args)
    args.demo = not (args.model or args.data or args.query_dir or args.features or args.group_dir)
    args.export_only = bool(args.export and not (args.data or args.query_dir))
    if args.model is None and not args.features:
        args.model, args.resolution = str(DEMO_MODEL), args.resolution or DEMO_RESOLUTION
    if args.data is None and not (args.query_dir or args.features or args.group_dir):
        args.data = DEMO_DATA
    args.notes = parser.notes(args)
    return args


def check_args(parser, args):
    """Reject wrong combinations of arguments."""
    if bool(args.query_dir) != bool(args.gallery_dir or args.gallery_features):
        parser.error("--query_dir and --gallery_dir (or --gallery_features) belong together: what to look for, where")
    if args.gallery_features and (args.camera_embeddings or args.export):
        parser.error("--gallery_features keeps features without cameras; leave out --camera_embeddings and --export")
    if args.query_dir and (args.data or args.features):
        parser.error("--query_dir is a search of its own; leave out --data and --features")
    if args.features and (args.model or args.export or args.splits):
        parser.error("--features needs no model, export or splits; leave out --model, --export and --splits")
    elsewhere = args.query_dir or args.features or not (args.data or args.group_dir)
    if args.calibrate and (elsewhere or not args.model):
        parser.error("--calibrate needs --model DIR and --data SPEC, labelled images; leave out other inputs")
    if args.calibrate and not (os.path.isdir(args.model) and os.access(args.model, os.W_OK)):
        parser.error(
            f"--calibrate writes into the folder of --model, and {args.model} is no folder to write to; leave it out "
            "and give the calibration.json of --output_dir to searches by --calibration"
        )
    if args.calibration and not os.path.isfile(args.calibration):
        parser.error(f"--calibration {args.calibration}: there is no such file")
    if args.camera_embeddings and (args.features or args.group_dir):
        parser.error("--camera_embeddings needs images with known cameras: --data, or --query_dir and --gallery_dir")
    if args.splits and args.query_dir:
        parser.error(f"--splits {args.splits} are those of --data; leave it out with --query_dir")
    if args.splits and args.data and "split=" in args.data:
        parser.error(f"--splits {args.splits} runs over all splits; leave split= out of --data {args.data}")
    if args.group_dir:
        check_grouping(parser, args)
    if args.export and (args.export[0] != "onnx" or not args.export[1].endswith(".onnx")):
        parser.error(f"--export takes `onnx FILE.onnx`, got {' '.join(args.export)}")


def check_grouping(parser, args):
    others = ("data", "data_root", "query_dir", "gallery_dir", "features", "splits", "calibrate", "export", "rerank")
    others += ("protocol", "topk", "report_queries")
    given = [f"--{name}" for name in others if args.origin[name] == "flag"]
    if given:
        parser.error(f"--group_dir ranks nothing and is a job of its own; leave out {', '.join(given)}")
    if not 0 < args.eps < 1:
        parser.error(f"--eps {args.eps} must be above 0 and below 1, the largest Jaccard distance")


if __name__ == "__main__":
    # Parse before torch and transformers are imported, so that --help and a mistyped flag answer at once.
    args = parse_args()


from kernels.ring.processes import all_processes
from utils import evaluation, launch
from utils.batches.chunks import image_identities
from utils.batches.transforms import test_transform
from utils.datasets.holdout import hold_out
from utils.datasets.images import check_files, check_images
from utils.datasets.load import open_spec
from utils.datasets.search_folders import read_folders
from utils.datasets.tracklets import read_tracklets
from utils.evaluation.calibration import CALIBRATION, calibrate, calibration_of, fingerprint, write_calibration
from utils.evaluation.cameras import check_cameras, extract_by_camera
from utils.evaluation.chunk_files import ChunkFiles, extraction_key, forget_chunks
from utils.evaluation.decisions import decide, limits, summary
from utils.evaluation.features import extract
from utils.evaluation.findings import combined, measured, nothing_measured
from utils.evaluation.groups import grouping
from utils.evaluation.groups.report import group_report
from utils.evaluation.index.search import add_new, open_kept, rows_of, sides_of
from utils.evaluation.index.store import about_model
from utils.evaluation.kept_features import (
    FEATURES,
    features_of_key,
    keep_features,
    load_features,
    names_of_labels,
    sides_of_splits,
)
from utils.evaluation.lists import left_out
from utils.evaluation.report import ResultPictures, evaluation_report
from utils.evaluation.results import answer_lines, summary_lines, write_results
from utils.evaluation.self_matches import copies_in, mark
from utils.evaluation.splits import SIDES, readable_splits
from utils.files import run_record, to_json, versions, write_csv, write_together
from utils.modeling.export import export_onnx
from utils.modeling.folder import model_kind
from utils.modeling.reid_model import ReIDModel


def main(args):
    # A process writes and hashes a kept gallery, for which the others wait.
    accelerator = launch.start_accelerator(args.mixed_precision, patient=bool(args.gallery_features))
    if accelerator.device.type == "cuda" and args.origin["dataloader_num_workers"] == "default":
        # It would wait for images most of the time.
        args.dataloader_num_workers = min(8, os.cpu_count())
    is_default = args.model == str(DEMO_MODEL) and args.origin["model"] == "default"
    launch.introduce(
        args, accelerator, demo=DEMO, stand_ins=is_default and "No --model given: using the shipped stand-in CLIP"
    )
    if args.group_dir:
        return group(args, accelerator)
    calibration = None
    if args.features:
        model = None
        sides, images, splits, skipped = read_features(args)
        copies = find_copies(args, images, splits)
        if copies is not None and len(copies) != len(sides):
            raise ValueError(f"{args.features} has {len(sides)} splits, {args.data} {len(copies)}; leave out --data")
    elif args.gallery_features:
        images, splits = None, []
        model, calibration, sides, copies, skipped = search_kept(args, accelerator)
    else:
        # A name that is no model shows before images are read.
        model_kind(args.model)
        images, splits, skipped = open_images(args) if not args.export_only else (None, [], [])
        check_topk(args, splits)
        copies = find_copies(args, images, splits)
        if images is not None and images.info.description:
            # The test identities of a drawn split.
            accelerator.print(images.info.description)
        model = ReIDModel.open(args.model, args.resolution).to(accelerator.device).eval()
        launch.print_notes(accelerator, model.notes)
        if args.camera_embeddings and images is not None:
            check_cameras(model, args.model, images["camid"][:])
        if args.export and accelerator.is_main_process:
            accelerator.print(export_onnx(model, Path(args.export[1])))
        if args.export_only:
            return None
        calibration = open_calibration(args, accelerator, model) if args.query_dir else None
        sides = extract_or_read(args, accelerator, model, images, splits)

    num_same_files = mark(sides, copies, trusts_query=bool(args.query_dir), say=accelerator.print)
    if images is not None and not args.features:
        for side in (side for pair in sides for side in pair):
            side.names = names_of_labels(images)
    metrics, results = None, [measure(args, accelerator, *pair) for pair in sides]
    if accelerator.is_main_process:
        findings = results[0]
        metrics = nothing_measured(findings)
        if findings.result:
            metrics = combined(results, rerank_options(args) if args.rerank else None, each=bool(args.splits))
        metrics |= {"model": args.model, "data": data_name(args), "skipped_images": skipped, "versions": versions()}
        if num_same_files is not None:
            metrics["num_same_files"] = num_same_files
        if not args.query_dir:
            findings.calibration = calibrated(args, model, findings)
        elif calibration:
            findings.decisions = decide(calibration, findings.lists, len(findings.gallery), args.false_alarm_rate)
            sides = findings.queries, findings.gallery
            metrics["decisions"] = summary(findings.decisions, *sides, findings.protocol)
        pictures = ResultPictures(images, *(rows for rows, *_ in splits[0]), model) if images is not None else None
        report = evaluation_report(metrics, findings, pictures, num_random=args.report_queries, seed=args.seed)
        write_results(args.output_dir, metrics, findings, report, run_record(args))
        lines = answer_lines(findings, calibration, args.false_alarm_rate)
        if (
            args.query_dir
            and findings.protocol == "market"
            and (count := left_out(findings.queries, findings.gallery))
        ):
            # A date and a camera in a name look like an identity and a camera.
            lines.append(
                f"Names were read as identities and cameras: {count:,} pairs of a query and a gallery image of its "
                "own identity and camera are left out; --protocol all keeps them"
            )
        if args.calibrate:
            write_calibration(findings.calibration, args.model)
            too_few = limits(findings.calibration, len(findings.gallery), args.false_alarm_rate)
            lines += [f"Calibrated: {Path(args.model) / CALIBRATION}", *filter(None, [too_few])]
        print(*lines, *summary_lines(metrics, args.output_dir), sep="\n")
    accelerator.end_training()
    return metrics


def data_name(args):
    return args.data or args.features or f"{args.query_dir} in {args.gallery_features or args.gallery_dir}"


# Images and models


def open_images(args):
    """(images, splits, unreadable files). A split is ((query rows, pids, camids), (gallery rows, pids, camids))."""
    if args.query_dir:
        pairs = [read_folders(args.query_dir, args.gallery_dir)]
    else:
        choices = [{"split": number} for number in range(args.splits)] if args.splits else [{}]
        pairs = [query_and_gallery(args, choice) for choice in choices]
        if len(pairs) > 1 and all(query["path"][:] == pairs[0][0]["path"][:] for query, _ in pairs):
            raise ValueError(f"--splits {args.splits}: {args.data} has one split only; leave it out")
    return readable_splits(pairs, skip_unreadable=args.skip_unreadable, where=data_name(args))


def query_and_gallery(args, choice):
    """The query and gallery of --data; of a set that has none, all images are measured."""
    own_camera = args.protocol == "all"
    data, name, common = open_spec(
        args.data, args.data_root, {"skip_unreadable": args.skip_unreadable}, choice, own_camera
    )
    if kept := [name for name in ("image_fraction", "identity_fraction") if common.get(name) is not None]:
        raise ValueError(f"--data {args.data}: {kept[0]} is of training images, and has no effect here; leave it out")
    if not {"query", "gallery"} <= set(data):
        data = hold_out(data, 1, 0, args.data, own_camera)
    # It may stand in the spec.
    args.skip_unreadable = common["skip_unreadable"]
    if not args.skip_unreadable:
        check_files({side: data[side] for side in SIDES}, name)
    return data["query"], data["gallery"]


def check_topk(args, splits):
    for _, (rows, *_) in splits:
        if args.topk and args.topk > len(rows):
            raise ValueError(f"--topk {args.topk} is more than the gallery's {len(rows)} images; ask for fewer")


# Features


def extract_images(args, accelerator, model, images, key, keep_in=None):
    transform = test_transform(model.image_size, model.image_mean, model.image_std, model.resample)
    options = {"store": ChunkFiles(keep_in or args.output_dir, key), "batch_size": args.eval_batch_size}
    options |= {"accelerator": accelerator, "num_workers": args.dataloader_num_workers}
    return (extract_by_camera if args.camera_embeddings else extract)(model, images, transform, **options)


def extract_or_read(args, accelerator, model, images, splits):
    """Pairs of (queries, gallery): read from the output folder if it has exactly these features, else extracted."""
    more = {"rows": splits} | ({"cameras": images["camid"][:]} if args.camera_embeddings else {})
    key = extraction_key(model, image_identities(images), accelerator, args.eval_batch_size, **more)
    stored = Path(args.output_dir) / FEATURES
    if known := features_of_key(stored, key):
        accelerator.print(f"Features: {stored}, extracted before")
        return known
    features = extract_images(args, accelerator, model, images, key)
    sides = sides_of_splits(features, splits, list(images["path"]), names_of_labels(images))
    if accelerator.is_main_process:
        keep_features(args.output_dir, features, splits, sides, key=key, model=args.model, data=data_name(args))
        forget_chunks(args.output_dir)
    return sides


def read_features(args):
    """Pairs of sides from --features, and the images of --data if given."""
    sides, _ = load_features(args.features)
    for queries, gallery in sides:
        evaluation.check_sides(queries, gallery)
    if not args.data:
        return sides, None, [], []
    images, splits, skipped = open_images(args)
    for side, (rows, *_), name in zip(sides[0], splits[0], SIDES, strict=True):
        if len(side) != len(rows):
            raise ValueError(
                f"{args.features} has {len(side)} {name} rows, {args.data} {len(rows)}; give the data they are from"
            )
        side.paths = [images["path"][row] for row in rows]
    # A file of others may number the same identities otherwise.
    pairs = [
        (side, labels)
        for pair, split in zip(sides, splits, strict=False)
        for side, labels in zip(pair, split, strict=True)
    ]
    if all(side.pids.tolist() == pids and side.camids.tolist() == camids for side, (_, pids, camids) in pairs):
        for side in (side for pair in sides for side in pair):
            side.names = names_of_labels(images)
    return sides, images, splits, skipped


def find_copies(args, images, splits):
    return copies_in(images, splits, is_search=bool(args.query_dir), protocol=args.protocol, spec=args.data)


# A gallery that stays on disk


def search_kept(args, accelerator):
    """(model, calibration, sides, copies, unreadable files) of a search in --gallery_features, after additions."""
    model_kind(args.model)
    index = open_kept(args.gallery_features, args.gallery_dir, append=args.append)
    reading = {"skip_unreadable": args.skip_unreadable, "where": data_name(args)}
    queries, *gallery = read_folders(args.query_dir, args.gallery_dir)
    queries, skipped = check_images(queries, **reading)
    if not len(queries):
        raise ValueError(f"{args.query_dir}: no readable query image is left")
    model = ReIDModel.open(args.model, args.resolution).to(accelerator.device).eval()
    launch.print_notes(accelerator, model.notes)
    index.check_model(about_model(args.model, model, accelerator.mixed_precision))
    calibration = open_calibration(args, accelerator, model)

    def extract_all(images, folder):
        key = extraction_key(model, image_identities(images), accelerator, args.eval_batch_size)
        return extract_images(args, accelerator, model, images, key, keep_in=folder)

    for images in gallery:
        skipped += add_new(index, images, args.gallery_dir, extract_all, accelerator=accelerator, **reading)
    features = extract_all(queries, args.output_dir)
    forget_chunks(args.output_dir)
    *pair, copies = sides_of(features, rows_of(queries, index), index)
    return model, calibration, [pair], [copies], [f"{path}: {reason}" for _, path, reason in skipped]


# Identities across cameras


def group(args, accelerator):
    """Give every item of --group_dir an identity; the content of groups.json."""
    model_kind(args.model)
    tracklets = read_tracklets(args.group_dir, skip_unreadable=args.skip_unreadable)
    settings = grouping.settings_for(
        len(tracklets.items), eps=args.eps, min_samples=args.min_samples, k1=args.cluster_k1, k2=args.cluster_k2
    )
    accelerator.print(tracklets.described())
    for name, reason in tracklets.skipped:
        accelerator.print(f"Left out: {name} ({reason})")
    model = ReIDModel.open(args.model, args.resolution).to(accelerator.device).eval()
    features, typical_rows = features_of_items(args, accelerator, model, tracklets)
    metrics, moments = None, [item.moments for item in tracklets.items]
    options = {"backend": args.backend, "processes": all_processes()}
    groups = grouping.group(features.to(accelerator.device), settings, moments, **options)
    if accelerator.is_main_process:
        metrics = grouping.group_metrics(tracklets, settings, groups)
        metrics |= {"model": args.model, "data": args.group_dir, "versions": versions()}
        report = group_report(metrics, tracklets, groups, typical_rows)
        with write_together(args.output_dir) as part:
            part("groups.json").write_text(to_json(metrics))
            part("args.json").write_text(to_json(run_record(args)))
            write_csv(part("identities.csv"), grouping.COLUMNS, grouping.identity_rows(tracklets, groups))
            report.write(part("report.html"))
        print(grouping.described(metrics))
        print(f"Results: {args.output_dir}; open {Path(args.output_dir) / 'report.html'}")
    accelerator.end_training()
    return metrics


def features_of_items(args, accelerator, model, tracklets):
    """Unit features of the items and the row of each item's most typical image; read if extracted before."""
    identities = [image_identities(tracklets.files), [(item.path, item.rows) for item in tracklets.items]]
    more = {"rows": list(tracklets.images["path"])}
    key = extraction_key(model, identities, accelerator, args.eval_batch_size, **more)
    stored = Path(args.output_dir) / grouping.FEATURES
    known = grouping.load_items(stored, key)
    if known is not None:
        accelerator.print(f"Features: {stored}, extracted before")
        return known
    features = extract_images(args, accelerator, model, tracklets.images, key)
    features, typical_rows = grouping.item_features(features, tracklets)
    if accelerator.is_main_process:
        with write_together(args.output_dir) as part:
            grouping.save_items(part(grouping.FEATURES), features, typical_rows, tracklets, key)
        forget_chunks(args.output_dir)
    return features, typical_rows


# Numbers


def measure(args, accelerator, queries, gallery):
    """The `Findings` of one split: all processes rank, the main one adds the details of the report."""
    return measured(
        *(side.to(accelerator.device) for side in (queries, gallery)),
        protocol=args.protocol,
        topk=args.topk,
        rerank=rerank_options(args) if args.rerank else None,
        may_lack_matches=bool(args.query_dir),
        backend=args.backend,
        group=all_processes(),
        details=accelerator.is_main_process,
    )


def rerank_options(args):
    return {"k1": args.k1, "k2": args.k2, "lambda_value": args.lambda_value, "compat": args.rerank_compat}


def open_calibration(args, accelerator, model):
    """The calibration for a search, or None."""
    options = {"with_cameras": args.camera_embeddings, "say": accelerator.print}
    return calibration_of(args.model, model, args.calibration, **options)


def calibrated(args, model, findings):
    """The content of calibration.json: that of the first split, if there are several."""
    sides = findings.queries, findings.gallery
    content = calibrate(*sides, findings.pairs, protocol=findings.protocol, seed=args.seed)
    key = model and fingerprint(model, args.camera_embeddings)
    about = {"model": args.model, "fingerprint": key, "data": data_name(args)}
    return about | content | {"versions": versions()}


def run_script(args):
    launch.end_with(main, args, "evaluate.py", lean=f"lower --eval_batch_size, now {args.eval_batch_size}")


if __name__ == "__main__":
    run_script(args)
