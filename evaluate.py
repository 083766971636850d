# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate>=1.12.0",
#     "bitsandbytes>=0.50.0",
#     "datasets>=4.5.0",
#     "diffusers>=0.38.0",
#     "huggingface_hub>=1.20.0",
#     "jinja2>=3.1.4",
#     "matplotlib>=3.9.0",
#     "numpy>=2.1.0",
#     "peft>=0.19.0",
#     "Pillow>=11.0.0",
#     "safetensors>=0.7.0",
#     "scikit-learn>=1.5.2",
#     "scipy>=1.14.1",
#     "torch>=2.11.0",
#     "torchvision>=0.26.0",
#     "tqdm>=4.67.0",
#     "transformers>=5.17.0",
#     "triton>=3.6.0",
# ]
# ///
"""Evaluate a Re-ID model: features, ranking, re-ranking, thresholds, search in your own images, and a page of it all.

    python evaluate.py --model output/model --data market1501 --data_root ~/reid --rerank --output_dir output/market
    python evaluate.py --model output/model --query_dir lost --gallery_dir cameras --output_dir output/search

Without arguments it is a demo: the shipped stand-in CLIP on people drawn by code. Features are kept in the output
folder: the same command with `--rerank` or another `--protocol` extracts nothing again, and `--features FILE` ranks
anyone's features.
"""

import argparse
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator

from kernels import k_reciprocal_rerank
from utils import evaluation
from utils.batches.chunks import image_identities
from utils.batches.transforms import test_transform
from utils.datasets.images import check_images
from utils.datasets.load import check_splits, load_reid, parse_spec, read_source
from utils.datasets.search_folders import read_folders
from utils.evaluation.features import extract, extraction_key, forget_chunks
from utils.evaluation.kept_features import load_features, save_features
from utils.evaluation.metrics import MAX_RANK, PROTOCOLS, RANKS, Side
from utils.evaluation.report import Findings, ResultPictures, evaluation_report
from utils.evaluation.thresholds import pair_statistics
from utils.files import run_record, to_json, versions, write_csv, write_together
from utils.flags import check_ranges
from utils.launch import end_with, use_all_cores
from utils.modeling.folder import model_kind
from utils.modeling.reid_model import ReIDModel
from utils.reporting.report import percent

DEMO_MODEL = Path(__file__).parent / "utils" / "standins" / "clip"
DEMO_DATA = "synthetic:domain=b,num_ids=16"
DEMO_RESOLUTION = (128, 64)
FEATURES = "features.safetensors"


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        help="a ReIDModel folder or Hub id, a plain backbone (CLIP, ResNet, Swin) for zero-shot features, or a file "
        "released by DCAC's authors (.pth); default: the shipped stand-in CLIP",
    )
    group.add_argument(
        "--resolution",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="input size in pixels of a backbone or .pth file; default 256 128 (a ReIDModel folder knows its own)",
    )
    group.add_argument(
        "--export",
        nargs=2,
        metavar=("FORMAT", "FILE"),
        help="`onnx FILE`: write the model with a free batch size and check it against torch's features; with --model "
        "and no data nothing else is done",
    )

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", metavar="SPEC", help=f"data set, such as market1501 or viper:split=3; default: {DEMO_DATA}"
    )
    group.add_argument("--data_root", help="folder in which the benchmarks lie; default: where --data itself points")
    group.add_argument(
        "--splits",
        type=int,
        help="average over splits 0..N-1 of a small set (viper, grid, prid, ilids): mean and deviation",
    )
    group.add_argument("--query_dir", help="search: folder of the images to look for; needs --gallery_dir")
    group.add_argument(
        "--gallery_dir",
        help="search: folder of the images to look in; labels are read from names like 0001_c2_x.jpg or folders",
    )
    group.add_argument(
        "--features",
        metavar="FILE",
        help="rank these features instead of extracting: safetensors or npz with qf, gf, q_pid, g_pid, q_cam, g_cam; "
        "with --data the page shows that set's images",
    )
    group.add_argument(
        "--skip_unreadable",
        action="store_true",
        help="leave out images that do not decode, and list them; default: stop",
    )

    group = parser.add_argument_group("ranking")
    group.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="market drops gallery images of the query's identity and camera, cuhk03 also draws one image an identity "
        "for the CMC, all drops nothing; default market, or all where there are no cameras",
    )
    group.add_argument(
        "--topk", type=int, help="images per query in rankings.csv; default 50, or the whole gallery if it is smaller"
    )
    group.add_argument("--rerank", action="store_true", help="k-reciprocal re-ranking beside the plain numbers")
    group.add_argument("--k1", type=int, default=20, help="re-ranking: neighbours that must be reciprocal; default 20")
    group.add_argument("--k2", type=int, default=6, help="re-ranking: neighbours averaged over, 1 for none; default 6")
    group.add_argument(
        "--lambda_value", type=float, default=0.3, help="re-ranking: weight of the plain distance, 0 to 1; default 0.3"
    )
    group.add_argument(
        "--rerank_compat",
        choices=["torchreid"],
        help="re-ranking: torchreid's distance to the fourth power, to compare with published numbers",
    )
    group.add_argument(
        "--backend", choices=["auto", "torch", "triton"], default="auto", help="path of the kernels; default auto"
    )

    group = parser.add_argument_group("running")
    group.add_argument(
        "--eval_batch_size",
        "--batch_size",
        type=int,
        default=64,
        help="images a process; default 64",
    )
    group.add_argument(
        "--dataloader_num_workers", type=int, default=0, help="processes that decode images; default 0, the main one"
    )
    group.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="precision of extraction; default accelerate's setting",
    )
    group.add_argument("--seed", type=int, default=0, help="which queries the page draws at random; default 0")

    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_dir", default="output/evaluate", help="folder for all results; default output/evaluate"
    )
    group.add_argument(
        "--report_queries",
        type=int,
        default=4,
        help="queries shown of each kind (best, worst, random); default 4, 0 for none",
    )

    args = parser.parse_args(input_args)
    check_args(parser, args)
    args.demo = not (args.model or args.data or args.query_dir or args.features)
    args.export_only = bool(args.export and not (args.data or args.query_dir))
    if args.model is None and not args.features:
        args.model, args.resolution = str(DEMO_MODEL), args.resolution or DEMO_RESOLUTION
    if args.data is None and not (args.query_dir or args.features):
        args.data = DEMO_DATA
    return args


def check_args(parser, args):
    if bool(args.query_dir) != bool(args.gallery_dir):
        parser.error("--query_dir and --gallery_dir belong together: what to look for, and where")
    if args.query_dir and (args.data or args.features):
        parser.error("--query_dir is a search of its own; leave out --data and --features")
    if args.features and (args.model or args.export or args.splits):
        parser.error("--features needs no model, export or splits; leave out --model, --export and --splits")
    if args.splits is not None and (args.query_dir or args.splits < 1):
        parser.error(f"--splits must be 1 or more and goes with --data, got {args.splits}")
    if args.splits and args.data and "split=" in args.data:
        parser.error(f"--splits {args.splits} runs over all splits; leave split= out of --data {args.data}")
    if args.export and (args.export[0] != "onnx" or not args.export[1].endswith(".onnx")):
        parser.error(f"--export takes `onnx FILE.onnx`, got {' '.join(args.export)}")
    check_ranges(
        parser,
        args,
        one_or_more=["eval_batch_size", "k1", "k2", "topk"],
        not_negative=["report_queries", "dataloader_num_workers", "seed"],
        fractions=["lambda_value"],
    )
    if args.resolution and min(args.resolution) < 1:
        parser.error(
            f"--resolution must be two positive numbers of pixels, got {args.resolution[0]} {args.resolution[1]}"
        )


def main(args):
    # Without `cpu`, accelerate takes several processes of torchrun on a machine without a GPU for single ones.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=args.mixed_precision)
    if accelerator.device.type == "cpu":
        use_all_cores(accelerator.num_processes)
    say = accelerator.print
    if args.demo:
        say(
            "Demo: the shipped stand-in CLIP, without training, on drawn people. "
            "For your own: --model DIR --data SPEC --data_root DIR, or --query_dir DIR --gallery_dir DIR"
        )
    elif args.model == str(DEMO_MODEL):
        say("No --model given: using the shipped stand-in CLIP")

    if args.features:
        sides, images, splits, skipped = read_features(args)
        model = None
    else:
        kind = model_kind(args.model)
        images, splits, skipped = open_images(args) if not args.export_only else (None, [], [])
        check_topk(args, splits)
        if images is not None and images.info.description:
            # Which identities a drawn split tests on.
            say(images.info.description)
        model = open_model(args, kind).to(accelerator.device).eval()
        if args.export and accelerator.is_main_process:
            say(export_onnx(model, Path(args.export[1])))
        if args.export_only:
            return None
        sides = extract(args, accelerator, model, images, splits)

    metrics = None
    if accelerator.is_main_process:
        splits_found = [measure(args, *(side.to(accelerator.device) for side in pair)) for pair in sides]
        findings = splits_found[0]
        metrics = combine(args, splits_found) if findings.result else nothing_measured(findings)
        metrics |= {"model": args.model, "data": data_name(args), "skipped_images": skipped, "versions": versions()}
        pictures = ResultPictures(images, *(rows for rows, *_ in splits[0]), model) if images is not None else None
        report = evaluation_report(metrics, findings, pictures, num_random=args.report_queries, seed=args.seed)
        write_results(args, metrics, findings, report)
        print_summary(say, metrics, args.output_dir)
    accelerator.end_training()
    return metrics


def data_name(args):
    return args.data or args.features or f"{args.query_dir} in {args.gallery_dir}"


# Images and models


def open_images(args):
    """All images as one data set; each split's ((query rows, pids, camids), (the gallery's)); the unreadable.

    The splits of a small set are other choices among the same images: each image is there, and is extracted, once.
    """
    if args.query_dir:
        pairs = [read_folders(args.query_dir, args.gallery_dir)]
    else:
        numbers = [{"split": number} for number in range(args.splits)] if args.splits else [{}]
        pairs = [query_and_gallery(args, number) for number in numbers]
    images = datasets.concatenate_datasets([side for pair in pairs for side in pair])
    rows = list(range(len(images)))
    if len(pairs) > 1:
        first = {}
        rows = [first.setdefault(path, row) for row, path in enumerate(images["path"])]

    images = images.add_column("row", list(range(len(images)))).select(sorted(set(rows)))
    images, skipped = check_images(images, skip_unreadable=args.skip_unreadable, where=data_name(args))
    place = {row: number for number, row in enumerate(images["row"])}
    splits, start = [], 0
    for pair in pairs:
        splits.append([])
        for side, name in zip(pair, ("query", "gallery"), strict=True):
            labelled = zip(rows[start : start + len(side)], side["pid"], side["camid"], strict=True)
            kept = [(place[row], pid, camid) for row, pid, camid in labelled if row in place]
            if not kept:
                raise ValueError(f"{data_name(args)}: no readable {name} image is left")
            splits[-1].append(tuple(map(list, zip(*kept, strict=True))))
            start += len(side)
    return images.remove_columns("row"), splits, [f"{path}: {reason}" for _, path, reason in skipped]


def query_and_gallery(args, number):
    name, options = parse_spec(args.data)
    options |= number
    if args.skip_unreadable or args.protocol == "all":
        # load_reid leaves unreadable images out too, but keeps no list of them; and its queries need another camera.
        data = read_source(name, args.data_root, options)
        check_splits(data, args.data, own_camera=args.protocol == "all")
    else:
        data = load_reid(name, args.data_root, **options)
    if not {"query", "gallery"} <= set(data):
        raise ValueError(f"{args.data} has no query and gallery, only {', '.join(data)}; it cannot be evaluated")
    return data["query"], data["gallery"]


def check_topk(args, splits):
    for _, (rows, *_) in splits:
        if args.topk and args.topk > len(rows):
            raise ValueError(f"--topk {args.topk} is more than the gallery's {len(rows)} images; ask for fewer")


def open_model(args, kind):
    if kind == "file":
        return ReIDModel.from_dcac_checkpoint(args.model, image_size=args.resolution)
    if kind == "backbone":
        # A fresh neck changes no direction: its averages are 0 and 1.
        return ReIDModel.from_backbone(args.model, image_size=args.resolution or (256, 128))
    model = ReIDModel.from_pretrained(args.model, num_ids=0)
    if args.resolution and tuple(args.resolution) != tuple(model.image_size):
        raise ValueError(
            f"{args.model} takes images of {model.image_size[0]} x {model.image_size[1]}; leave out --resolution"
        )
    return model


def model_transform(model):
    return test_transform(model.image_size, model.image_mean, model.image_std, model.resample)


def export_onnx(model, path):
    """Write the model and compare what onnxruntime makes of it with torch's features."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--export onnx needs onnx, onnxscript and onnxruntime ({error}); pip install them") from None
    device, attention = next(model.parameters()).device, model.backbone.config._attn_implementation
    images = torch.randn(3, 3, *model.image_size, generator=torch.Generator().manual_seed(0))
    settings = {"image_size": model.image_size, "mean": model.image_mean, "std": model.image_std}
    # Torch's exporter stumbles over the fused attention of windows.
    model.cpu().backbone.set_attention("eager")
    with write_together(path.parent) as aside:
        try:
            program = torch.onnx.export(
                model,
                (images,),
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ValueError(f"torch cannot export this model: {str(error).splitlines()[0]}") from error
        program.model.metadata_props["diffreid"] = to_json(settings | {"resample": model.resample})
        program.save(aside(path.name), external_data=False)
        session = onnxruntime.InferenceSession(f"{path}.part", providers=["CPUExecutionProvider"])
        differences = []
        for batch in (images[:1], images):
            with torch.inference_mode():
                expected = model(batch)
            answer = torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])
            differences.append(float((expected - answer).abs().max()))
        if not max(differences) < 1e-4:
            raise ValueError(
                f"the features in ONNX differ from torch's by {max(differences):.1e}; nothing was written"
            )
    model.to(device).backbone.set_attention(attention)
    return f"{path}: features equal torch's within {max(differences):.1e}, at batch 1 and 3"


# Features


def extract_or_read(args, accelerator, model, images, splits):
    """Pairs of (queries, gallery): from the output folder if these very features lie there, else from the images."""
    paths = list(images["path"])
    key = extraction_key(
        model,
        image_identities(images),
        image=[model.image_size, model.image_mean, model.image_std, model.resample],
        precision=accelerator.mixed_precision,
        device=accelerator.device.type,
        batch_size=args.eval_batch_size,
        rows=splits,
    )
    kept = Path(args.output_dir) / FEATURES
    if kept.is_file():
        try:
            sides, header = load_features(kept)
        except ValueError:
            header = {}
        if header.get("key") == key:
            accelerator.print(f"Features: {kept}, extracted before")
            return sides
    features = extract(
        model,
        images,
        model_transform(model),
        accelerator=accelerator,
        keep_in=args.output_dir,
        key=key,
        batch_size=args.eval_batch_size,
        num_workers=args.dataloader_num_workers,
    )
    sides = [
        tuple(
            Side(features[rows], torch.tensor(pids), torch.tensor(camids), [paths[row] for row in rows])
            for rows, pids, camids in split
        )
        for split in splits
    ]
    if accelerator.is_main_process:
        keep = [
            (split[0][0], queries, split[1][0], gallery)
            for split, (queries, gallery) in zip(splits, sides, strict=True)
        ]
        with write_together(args.output_dir) as aside:
            save_features(aside(FEATURES), features, keep, key=key, model=args.model, data=data_name(args))
        forget_chunks(args.output_dir)
    return sides


def read_features(args):
    """Pairs of sides from --features, and the images of --data where given."""
    sides, _ = load_features(args.features)
    for queries, gallery in sides:
        evaluation.check_sides(queries, gallery)
    if not args.data:
        return sides, None, [], []
    images, splits, skipped = open_images(args)
    for side, (rows, *_), name in zip(sides[0], splits[0], ("query", "gallery"), strict=True):
        if len(side) != len(rows):
            raise ValueError(
                f"{args.features} has {len(side)} {name} rows, {args.data} {len(rows)}; give the data they are from"
            )
        side.paths = [images["path"][row] for row in rows]
    return sides, images, splits, skipped


# Numbers


def measure(args, queries, gallery):
    """Everything about one split."""
    evaluation.check_sides(queries, gallery)
    if args.topk and args.topk > len(gallery):
        raise ValueError(f"--topk {args.topk} is more than the gallery's {len(gallery)} images; ask for fewer")
    has_cameras = bool((queries.camids >= 0).any() and (gallery.camids >= 0).any())
    protocol = args.protocol or ("market" if has_cameras else "all")
    options = {"protocol": protocol, "backend": args.backend}
    findings = Findings(queries, gallery, protocol)
    k = min(args.topk or MAX_RANK, len(gallery))
    findings.lists = evaluation.ranked_lists(queries, gallery, k, **options)
    if args.rerank:
        reranking = k_reciprocal_rerank(
            queries.features, gallery.features, **rerank_options(args), backend=args.backend
        )
        findings.reranked_lists = evaluation.ranked_lists(queries, gallery, k, reranking=reranking, **options)
    if args.query_dir and not evaluation.can_match(queries, gallery, protocol):
        # A search without labels: nothing can be measured, and nothing is wrong.
        return findings

    findings.result = evaluation.rank(queries, gallery, **options)
    findings.pairs = pair_statistics(queries, gallery, protocol=protocol)
    findings.cameras = evaluation.camera_pairs(queries, gallery, **options)
    findings.confusions = evaluation.confusions(queries, gallery, *findings.lists)
    if args.rerank:
        ids = queries.pids, gallery.pids, queries.camids, gallery.camids
        findings.reranked = reranking.metrics(*ids, max_rank=MAX_RANK, protocol=protocol)
    return findings


def rerank_options(args):
    return {"k1": args.k1, "k2": args.k2, "lambda_value": args.lambda_value, "compat": args.rerank_compat}


def combine(args, splits_found):
    """The content of metrics.json: means over the splits, and beyond the numbers what is known of the first one."""
    findings = splits_found[0]
    metrics = averaged([evaluation.summary(one.result) for one in splits_found])
    thresholds = [one.pairs.thresholds for one in splits_found]
    metrics["thresholds"] = {rate: averaged([one[rate] for one in thresholds]) for rate in thresholds[0]}
    metrics |= described(findings) | {"backend": findings.result.backend}
    metrics["cmc"] = torch.stack([one.result.cmc for one in splits_found]).mean(0)
    if args.rerank:
        reranked = [one.reranked for one in splits_found]
        metrics["reranked"] = averaged([evaluation.summary(one) for one in reranked]) | rerank_options(args)
        metrics["reranked"]["backend"] = reranked[0].backend
        metrics["reranked"]["cmc"] = torch.stack([one.cmc for one in reranked]).mean(0)
    metrics["num_match_pairs"] = findings.pairs.num_matches
    metrics["num_non_match_pairs"] = findings.pairs.num_non_matches
    metrics["threshold_curve"] = findings.pairs.curve
    metrics["camera_pairs"] = dict(zip(("query_cameras", "gallery_cameras", "mAP"), findings.cameras, strict=True))
    if args.splits or len(splits_found) > 1:
        metrics["splits"] = [
            {"split": number, **evaluation.summary(one.result), "thresholds": one.pairs.thresholds}
            for number, one in enumerate(splits_found)
        ]
    return metrics


def averaged(parts):
    """One split's numbers as they are; of several the means, with the sample standard deviations under `std`."""
    if len(parts) == 1:
        return dict(parts[0])
    mean, deviation = evaluation.mean_and_deviation(parts)
    return {**mean, "std": deviation}


def described(findings):
    return {"protocol": findings.protocol, "num_queries": len(findings.queries), "num_gallery": len(findings.gallery)}


def nothing_measured(findings):
    names = ("mAP", "mINP", *(f"rank{rank}" for rank in RANKS), "num_valid", "num_skipped", "thresholds", "backend")
    return dict.fromkeys(names) | described(findings)


# Results


def write_results(args, metrics, findings, report):
    lists = {"rankings.csv": findings.lists, "rankings_reranked.csv": findings.reranked_lists}
    with write_together(args.output_dir) as aside:
        aside("metrics.json").write_text(to_json(metrics))
        aside("args.json").write_text(to_json(run_record(args)))
        for name, ranked in lists.items():
            if ranked is not None:
                rows = ranking_rows(findings.queries, findings.gallery, *ranked)
                write_csv(aside(name), ("query", "rank", "gallery", "distance", "match"), rows)
        report.write(aside("report.html"))
    if findings.reranked_lists is None:
        # One of an earlier run would not belong to these metrics.
        (Path(args.output_dir) / "rankings_reranked.csv").unlink(missing_ok=True)


def ranking_rows(queries, gallery, indices, distances):
    for row, (columns, values) in enumerate(zip(indices.tolist(), distances.tolist(), strict=True)):
        for place, (column, distance) in enumerate(zip(columns, values, strict=True), start=1):
            if column >= 0:
                match = evaluation.is_match(queries, gallery, row, column)
                word = "" if match is None else int(match)
                yield queries.paths[row], place, gallery.paths[column], f"{distance:.6f}", word


def print_summary(say, metrics, output_dir):
    for name, numbers in (("", metrics), ("re-ranked: ", metrics.get("reranked"))):
        if numbers and numbers["mAP"] is not None:
            shown = {"mAP": numbers["mAP"], "mINP": numbers["mINP"]} | {
                f"Rank-{k}": numbers[f"rank{k}"] for k in RANKS
            }
            say(name + ", ".join(f"{key} {percent(value)}" for key, value in shown.items()))
    if metrics["mAP"] is None:
        say("No query has a label that the gallery has too: ranked lists, no metrics")
    say(f"Results: {output_dir}; open {Path(output_dir) / 'report.html'}")


def run_script(args):
    end_with(main, args, "evaluate.py", lean=f"lower --eval_batch_size, now {args.eval_batch_size}")


if __name__ == "__main__":
    run_script(parse_args())
