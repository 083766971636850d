"""All tables of benchmarks/README.md, made from `results/`, and the headline rows of the README in the root.

python -m benchmarks.tables            # writes them between their marks
python -m benchmarks.tables --check    # exits with 1 if a README differs from the files

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; `headline` are the rows of the README in the root. A
README without marks stays as it is.
"""

import argparse
import ast
import re
import sys

from benchmarks.common import GIB, RESULTS, ROOT, in_percent, markdown_table, read_result
from benchmarks.speed.reid_features import SIZES
from utils.files import write_together

ROOMS = ("speed", "memory", "quality", "evaluation", "generated", "robustness")


def read(name):
    return read_result(name, RESULTS)


def as_stored(name, words=1):
    """A table as its benchmark wrote it."""

    def lines():
        found = read(name)
        return markdown_table(found["columns"], found["table"], words=words)

    return lines


def index():
    """A row for each benchmark: its command and the first line of its docstring."""
    folder, rows = ROOT / "benchmarks", []
    for path in [folder / "gpu.py", *(path for room in ROOMS for path in sorted((folder / room).glob("*.py")))]:
        text = path.read_text(encoding="utf-8")
        if "write_result(" in text:
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            rows.append([f"`python -m {module}`", ast.get_docstring(ast.parse(text)).splitlines()[0]])
    return markdown_table(["command", "what it measures"], rows, words=2)


def dcac_cost():
    counted, steps = read("dcac_table")["raw"], read("dcac_step_flops")["raw"]["steps"]
    rows = []
    for mode, row in counted.items():
        if mode == "inference":
            continue
        ways = steps[mode]
        paper = f"{ways['paper']['ratio']:.2f} x" if "paper" in ways else ""
        numbers = [f"{row['ours']['params_m']:.2f}", f"{row['ours']['tflops']:.2f}"]
        rows.append([f"`{mode}`", *numbers, f"{ways['ours']['ratio']:.2f} x", paper])
    columns = ["what trains", "million parameters", "TFLOPs forward", "a step, ours", "a step, the paper's way"]
    return markdown_table(columns, rows)


def dcac_curves():
    rows = [
        [variant, *(f"{losses['loss'][kind]:.0e}" for kind in ("absolute", "relative"))]
        for variant, losses in read("dcac_curves")["raw"]["largest"].items()
    ]
    return markdown_table(["compared with the plain run", "largest difference of the loss", "of its value"], rows)


def dcac_steps():
    rows = []
    for name in ("dcac_step_cpu_tiny", "dcac_step_cpu_block"):
        found = read(name)
        columns = ["size", *found["columns"]]
        rows += [[found["raw"]["size"], *row] for row in found["table"]]
    return markdown_table(columns, rows, words=3)


def retrieval():
    works = {"metrics": "mAP, CMC, mINP", "rerank": "re-ranking too"}
    who = {"fastreid": "fast-reid, with faiss", "graph": "graph of neighbours, approximate"}
    rows = []
    for row in read("retrieval")["raw"]["rows"]:
        if row["size"] == "S":
            continue
        queries, gallery = SIZES[row["size"]][:2]
        rows.append([f"{queries:,} x {gallery:,}", works[row["work"]], who.get(row["who"], row["who"])])
        rows[-1] += [f"{row['seconds']:.1f}", f"{row['ratio']:.2f}", f"{row['gib']:.2f}", f"{100 * row['mAP']:.2f}"]
        rows[-1] += [f"{row['correlation']:.4f}" if "correlation" in row else ""]
    columns = ["query x gallery", "", "who", "seconds", "x pure product", "GiB", "mAP %", "rank correlation"]
    return markdown_table(columns, rows, words=3)


def ranked_by(who, size, work="rerank"):
    """A row of the retrieval benchmark, None if there is none."""
    rows = read("retrieval")["raw"]["rows"]
    return next((row for row in rows if (row["size"], row["work"], row["who"]) == (size, work, who)), None)


def starts():
    names = {"few-shot": "{} of each identity's images", "small-scale": "{} of the identities"}
    rows = []
    for name in ("starts", "starts_high_rate"):
        found = read(name)
        rate = re.search(r"--learning_rate (\S+)", found["raw"]["finetune"])[1]
        for setting, *cells in found["table"]:
            kind, _, fraction = setting.partition(":")
            share = f"{100 * float(fraction):.0f} %" if fraction else ""
            rows.append([names.get(kind, "all images").format(share), rate, *cells])
    return markdown_table(["labels", "rate", "", "from scratch", "pre-trained", "gain"], rows, words=3)


def starts_by_epoch():
    """mAP of both starts after some of the epochs, of the runs that measured after each."""
    runs = read("starts_by_epoch")["raw"]["runs"]
    epochs, rows = [0, 1, 2, 5, 10, 20, 40], []
    for start in dict.fromkeys(run["start"] for run in runs):
        histories = [run["history"] for run in runs if run["start"] == start]
        found = ([one["mAP"] for line in histories for one in line if one["epoch"] == epoch] for epoch in epochs)
        rows.append([start, *map(in_percent, found)])
    return markdown_table(["mAP % after epoch", *map(str, epochs)], rows)


def chain():
    usual, smallest = read("chain"), {tuple(row[:2]): row[2:] for row in read("chain_small")["table"]}
    rows = [[*row[:5], *smallest[tuple(row[:2])][:3], row[5]] for row in usual["table"]]
    columns = ["chain", "step", "clock", "processor", "GiB", "smallest: clock", "processor", "GiB", "came out"]
    return markdown_table(columns, rows, words=2)


def own_folder():
    """What is typed in each step of the third chain, without what it takes to resume it."""
    rows, chains = [], read("chain")["raw"]["chains"]
    if "own-folder" not in chains:
        raise ValueError("chain.json has no chain of an own folder: python -m benchmarks.robustness.chain runs all")
    for one in chains["own-folder"]:
        command = one["command"].removesuffix(" --resume_from_checkpoint latest")
        rows.append([one["step"], f"`{command}`", f"{one['cpu_seconds']:.0f} s", one["outcome"]])
    return markdown_table(["step", "what was typed", "processor", "came out"], rows, words=4)


# The headline rows: what, ours, compared with


def reranking_row():
    large, middle = (ranked_by("ours", size) for size in "LM")
    peers = [
        f"{words} {peer['seconds']:.0f} s, {peer['gib']:.1f} GiB"
        for name, words in {"torchreid": "torchreid", "fastreid": "fast-reid"}.items()
        if (peer := ranked_by(name, "M"))
    ]
    matrix = 4 * sum(SIZES["L"][:2]) ** 2 / GIB
    return [
        "mAP, CMC and re-ranking at the size of MSMT17, two CPU cores",
        f"{large['seconds']:.0f} s, {large['gib']:.2f} GiB",
        f"one N x N array of other code: {matrix:.0f} GiB; at the size of Market-1501 {', '.join(peers)}, "
        f"ours {middle['seconds']:.1f} s, {middle['gib']:.2f} GiB",
    ]


def step_row():
    steps = read("dcac_step_flops")["raw"]["steps"]["lora"]
    return [
        "FLOPs, not time, of a DCAC training step with LoRA",
        f"{steps['ours']['ratio']:.2f} x the baseline",
        f"the paper's way: {steps['paper']['ratio']:.2f} x",
    ]


def gain_row():
    """The smallest and largest gain, each with its deviation."""
    rows = [row for row in read("dcac_synthetic")["table"] if row[1] == "mAP %"]
    rows.sort(key=lambda row: float(row[4].split()[0]))
    least, most = rows[0], rows[-1]
    seeds = len({run["seed"] for run in read("dcac_synthetic")["raw"]["runs"]})
    return [
        f"mAP points of DCAC on {len(rows)} unseen targets of the built-in world, tiny stand-in models, {seeds} seeds",
        f"{least[4]} ({least[0]}) to {most[4]} ({most[0]})",
        f"the baseline with the same seed: {least[2]} % and {most[2]} %",
    ]


def filter_row():
    auc = {row[1]: row[2] for row in read("filter_truth")["table"] if row[0] == "one or two"}
    return [
        "AUC of right generated images against wrong, broken and near-missed ones, unseen drawn people",
        f"answers about attributes {auc['attributes']}, Re-ID filter {auc['Re-ID CTF']}",
        f"image classifier {auc['CCTF']}, CLIP {auc['CLIP']}",
    ]


def faults_row():
    found = read("faults")
    rows = [dict(zip(found["columns"], row, strict=True)) for row in found["table"]]
    lost = [row["job"] for row in rows if row["lost"] != "nothing"]
    return [
        f"{sum(row['kills'] for row in rows)} kills of {len(rows)} kinds of long jobs, and a full disk for each",
        f"lost: {', '.join(lost) or 'nothing'}",
        f"undisturbed runs: {sum(row['ends like one piece'] for row in rows)} of the stopped runs were compared at "
        "their end, all equal byte for byte",
    ]


HEADLINE = (reranking_row, step_row, gain_row, filter_row, faults_row)


def headline():
    return markdown_table(["what", "ours", "compared with"], [row() for row in HEADLINE], words=3)


TABLES = {
    "headline": headline,
    "benchmarks": index,
    "dcac-cost": dcac_cost,
    "dcac-cards": as_stored("dcac_memory", words=2),
    "dcac-steps": dcac_steps,
    "dcac-curves": dcac_curves,
    "dcac-synthetic": as_stored("dcac_synthetic", words=2),
    "generation-parts": as_stored("generation"),
    "generation-cost": as_stored("generation_cost"),
    "drawing-ways": as_stored("drawing_ways"),
    "generation-cards": as_stored("generation_memory", words=2),
    "generation-families": as_stored("family_memory"),
    "gpu-dcac": as_stored("gpu/dcac_step", words=2),
    "gpu-pretraining": as_stored("gpu/pretraining", words=2),
    "gpu-retrieval": as_stored("gpu/retrieval", words=4),
    "retrieval": retrieval,
    "end-to-end": as_stored("end_to_end", words=3),
    "ring": as_stored("ring", words=2),
    "ring-threads": as_stored("ring_threads"),
    "loading": as_stored("loading"),
    "loading-augmentation": as_stored("loading_augmentation"),
    "clustering": as_stored("clustering"),
    "labels": as_stored("labels"),
    "filter-truth": as_stored("filter_truth", words=2),
    "filtering": as_stored("filtering"),
    "answerer": as_stored("standins"),
    "starts": starts,
    "starts-by-epoch": starts_by_epoch,
    "scales": as_stored("scales", words=3),
    "generated-starts": as_stored("generated_starts"),
    "objectives": as_stored("pretraining_objectives"),
    "generalisation": as_stored("generalisation", words=3),
    "methods": as_stored("methods", words=2),
    "thresholds": as_stored("thresholds", words=3),
    "coverage": as_stored("coverage", words=4),
    "grouping": as_stored("grouping", words=2),
    "real-people": as_stored("real_people_gt", words=2),
    "real-people-rough": as_stored("real_people", words=2),
    "faults": as_stored("faults"),
    "chain": chain,
    "own-folder": own_folder,
}


def with_tables(text):
    """A README with every marked table made anew; ValueError for a mark without a table."""

    def made(match):
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"a README marks a table {name!r}; known are {', '.join(TABLES)}")
        return "\n".join([f"<!-- table: {name} -->", *TABLES[name](), "<!-- end -->"])

    return re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)


READMES = ("README.md", "benchmarks/README.md")


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a README differs")
    args = parser.parse_args(input_args)
    changed = []
    for name in READMES:
        path = ROOT / name
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        made = with_tables(text)
        if made == text:
            continue
        changed.append(name)
        if not args.check:
            with write_together(path.parent) as part:
                part(path.name).write_text(made, encoding="utf-8")
    if args.check:
        sys.exit(
            f"{', '.join(changed)} differs from benchmarks/results: python -m benchmarks.tables" if changed else 0
        )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"benchmarks.tables: {error}")
