"""From images to numbers: evaluate.py beside torchreid's own evaluation, of the same OSNet and images.

    python -m benchmarks.speed.end_to_end --peer_python PEERS/bin/python

PEERS is the environment of `tests/modeling/peers.py`. The images are drawn people in Market-1501's layout, the network
an OSNet x0.25 with random weights and the averages of these images. Each run is a process of its own, from start to
end; the two take turns. torchreid squares its distances twice before it re-ranks, so its re-ranked numbers are others.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, checked, command_line, run_script, write_result
from utils.datasets.load import load_reid
from utils.reporting.report import text_table

WORKS = {"metrics": [], "rerank": ["--rerank"]}
WHO = ("ours", "torchreid")
PEER_SCRIPT = ROOT / "benchmarks/speed/torchreid_evaluation.py"
COLUMNS = ["images", "work", "who", "seconds", "processor", "GiB", "mAP %", "Rank-1 %"]
SPLITS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}


def write_market(spec, root):
    """Query and gallery of drawn people in the layout of Market-1501, and one image to train on; their number."""
    data, count = load_reid(spec), 0
    for split, name in SPLITS.items():
        folder = root / "market1501" / "Market-1501-v15.09.15" / name
        folder.mkdir(parents=True)
        rows = data[split].select(range(1)) if split == "train" else data[split]
        for number, row in enumerate(rows):
            image = f"{row['pid'] + 1:04d}_c{row['camid'] + 1}s1_{number:06d}_00.jpg"
            row["image"].convert("RGB").save(folder / image, quality=95)
        count += len(rows) if split != "train" else 0
    return count


def ours(root, weights, words, folder):
    common = ["--model", weights, "--data", "market1501", "--data_root", root / "market1501", "--resolution", 256, 128]
    common += ["--report_queries", 0]
    run = checked(run_script("evaluate.py", *common, *words, "--output_dir", folder), "evaluate.py")
    found = json.loads((folder / "metrics.json").read_text())
    return run, found.get("reranked", found)


def torchreid(root, weights, words, python):
    run = checked(run_script(PEER_SCRIPT, root, weights, *words, python=python), "torchreid")
    return run, json.loads(run.output.splitlines()[-1])


def rows_of(raw):
    rows = []
    for work in WORKS:
        for who in WHO:
            runs = raw["runs"][work][who]
            middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            cells = [f"{middle['seconds']:.1f}", f"{middle['cpu']:.1f}", f"{middle['gib']:.2f}"]
            cells += [f"{100 * middle[key]:.2f}" for key in ("mAP", "rank1")]
            rows.append([f"{raw['images']:,}", work, who, *cells])
    return rows


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", required=True, help="Python of an environment that has torchreid")
    spec = "synthetic:domain=a,num_ids=200,images_per_id=12"
    parser.add_argument("--data", default=spec, help=f"the people; default {spec}")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each; the median counts; default 3")
    parser.add_argument("--json", type=Path, default=RESULTS / "end_to_end.json", help="default benchmarks/results")
    return parser.parse_args(input_args)


def main(input_args=None):
    args = parse_args(input_args)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        images, weights = write_market(args.data, place / "data"), place / "osnet.pth"
        making = run_script(PEER_SCRIPT, place / "data", weights, "--make", python=args.peer_python)
        checked(making, "torchreid")
        raw = {"images": images, "runs": {work: {who: [] for who in WHO} for work in WORKS}}
        for number in range(args.rounds):
            for work, words in WORKS.items():
                for who in WHO:
                    own = place / f"{work}-{number}" if who == "ours" else args.peer_python
                    run, found = {"ours": ours, "torchreid": torchreid}[who](place / "data", weights, words, own)
                    print(f"{work}, {who}: {run.seconds:.1f} s", flush=True)
                    numbers = {"seconds": run.seconds, "cpu": run.cpu_seconds, "gib": run.peak_gib}
                    raw["runs"][work][who].append(numbers | {key: found[key] for key in ("mAP", "rank1")})
    rows = rows_of(raw)
    write_result(args.json, command_line(__spec__.name, input_args), COLUMNS, rows, raw)
    print(text_table(COLUMNS, rows))


if __name__ == "__main__":
    main()
