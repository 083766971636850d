"""README's tables, made from the files in `benchmarks/results/`.

python -m benchmarks.tables            # writes them between their marks
python -m benchmarks.tables --check    # exits with 1 where README and files differ
"""

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks.quality import dcac_synthetic
from benchmarks.speed.reid_features import SIZES
from utils.files import write_together

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FILES = ("README.md", "benchmarks/README.md")
CARDS = (8, 12, 16, 24)
# GiB of a card that CUDA's context, workspaces and gaps between tensors take.
ASIDE = 1.5


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(columns, rows, *, words=1):
    """Lines of a Markdown table; all but the first `words` columns are numbers."""
    marks = ["---"] * words + ["---:"] * (len(columns) - words)
    return [f"| {' | '.join(map(str, row))} |" for row in (columns, marks, *rows)]


def dcac_cost():
    counted, steps = read("dcac_table"), read("dcac_step_flops")["steps"]
    rows = []
    for mode, row in counted.items():
        if mode == "inference":
            continue
        ways = steps[mode]
        paper = f"{ways['paper']['ratio']:.2f} x" if "paper" in ways else ""
        numbers = [f"{row['ours']['params_m']:.2f}", f"{row['ours']['tflops']:.2f}"]
        rows.append([f"`{mode}`", *numbers, f"{ways['ours']['ratio']:.2f} x", paper])
    return table(
        ["what trains", "million parameters", "TFLOPs forward", "a step, ours", "a step, the paper's way"], rows
    )


def dcac_cards():
    counted = read("dcac_memory")["counted"]
    rows = []
    for mode, ways in counted.items():
        for way, flag in (("ours", ""), ("outer", "outer"), ("all", "all")):
            if way in ways:
                gib = {int(batch): value for batch, value in ways[way].items()}
                held = [max((batch for batch in gib if gib[batch] + ASIDE <= card), default=None) for card in CARDS]
                rows.append([f"`{mode}`", flag, f"{gib[64]:.1f}", *(batch or "-" for batch in held)])
    columns = ["what trains", "recomputed", "GiB at batch 64", *(f"{card} GB card" for card in CARDS)]
    return table(columns, rows, words=2)


def generation_cards():
    rows = []
    for way, sizes in read("generation_memory")["counted"].items():
        for size, gib in sizes.items():
            card = min((card for card in CARDS if max(gib.values()) + ASIDE <= card), default=None)
            parts = [f"{gib[part]:.1f}" for part in ("fine_tuning", "drawing")]
            rows.append([way, size, *parts, f"{card} GB" if card else "-"])
    return table(["what trains", "pixels", "GiB fine-tuning", "GiB drawing", "smallest card"], rows, words=2)


def retrieval():
    rows, peers = [], read("retrieval_peers")["rows"]
    words = {"metrics": "mAP, CMC, mINP", "rerank": "re-ranking too"}
    for row in read("retrieval")["rows"]:
        if row["size"] == "S":
            continue
        cells = [f"{row['seconds']:.1f} s", f"{row['gib']:.2f}"]
        for name in ("torchreid", "faiss"):
            found = [
                peer for peer in peers if (peer["size"], peer["work"], peer["who"]) == (row["size"], row["work"], name)
            ]
            cells += [f"{found[0]['seconds']:.1f} s", f"{found[0]['gib']:.2f}"] if found else ["-", "-"]
        queries, gallery = SIZES[row["size"]][:2]
        rows.append([f"{queries:,} x {gallery:,}", words[row["work"]], *cells])
    columns = ["query x gallery", "", "ours", "GiB", "torchreid", "GiB", "faiss + k-reciprocal", "GiB"]
    return table(columns, rows, words=2)


def clustering():
    by_size = {}
    for row in read("clustering")["rows"]:
        by_size.setdefault(row["images"], {})[row["who"]] = row
    rows = []
    for images, who in by_size.items():
        cells = []
        for name in ("ours", "published"):
            cells += [f"{who[name]['cpu_seconds']:.0f} s", f"{who[name]['gib']:.1f}"]
        rows.append([f"{images:,}", *cells])
    return table(["images", "ours, one core", "GiB", "SpCL's code", "GiB"], rows)


def dcac_curves():
    rows = []
    for variant, losses in read("dcac_curves")["largest"].items():
        rows.append([variant, *(f"{losses['loss'][kind]:.0e}" for kind in ("absolute", "relative"))])
    return table(["against the plain run", "largest difference of the loss", "of its value"], rows)


def loading():
    rows = [[row["source"], f"{row['images_a_second']:.0f}"] for row in read("loading")["rows"]]
    return table(["images", "a second"], rows)


def dcac_on_drawn_people():
    return table(dcac_synthetic.COLUMNS, dcac_synthetic.rows_of(read("dcac_synthetic")["runs"]), words=2)


def filter_truth():
    found = read("filter_truth")
    return table(found["columns"], found["table"], words=2)


def filtering():
    rows = []
    for row in read("filtering")["rows"]:
        again = f"{row['choose_again_seconds']:.0f} s"
        rows.append([f"{row['images']:,}", f"{row['images_a_second']:.0f}", f"{row['peak_mib'] / 1024:.2f}", again])
    return table(["images", "scored a second", "GiB", "choosing again"], rows)


def answerer():
    rows = [
        [key.replace("_", ", "), f"{100 * one['accuracy']:.0f} %", f"{100 * one['commonest']:.0f} %"]
        for key, one in read("standins")["question_answerer"].items()
    ]
    return table(["", "right", "the commonest answer"], rows)


def starts():
    names = {"few-shot": "{} of each identity's images", "small-scale": "{} of the identities"}
    rows = []
    for name in ("starts", "starts_high_rate"):
        found = read(name)
        rate = re.search(r"--learning_rate (\S+)", found["finetune"])[1]
        for setting, *cells in found["table"]:
            kind, _, fraction = setting.partition(":")
            share = f"{100 * float(fraction):.0f} %" if fraction else ""
            rows.append([names.get(kind, "all images").format(share), rate, *cells])
    return table(["labels", "rate", "", "from scratch", "pre-trained", "gain"], rows, words=3)


def adaptation():
    found = read("adaptation")
    return table(found["columns"], found["table"], words=3)


def faults():
    found = read("faults")
    return table(found["columns"], found["table"])


def chain():
    found = read("chain")
    smallest = {one["step"]: one for steps in found["small"]["chains"].values() for one in steps}
    rows = []
    for name, steps in found["usual"]["chains"].items():
        for step in steps:
            cells = [
                text
                for one in (step, smallest[step["step"]])
                for text in (f"{one['seconds']:.0f} s", f"{one['cpu_seconds']:.0f} s", f"{one['peak_gib']:.1f}")
            ]
            rows.append([name, step["step"], *cells])
    columns = ["chain", "step", "clock", "processor", "GiB", "smallest: clock", "processor", "GiB"]
    return table(columns, rows, words=2)


def headline():
    """Five rows for the README: what, ours, compared with what."""
    ours = {(row["size"], row["work"]): row for row in read("retrieval")["rows"]}
    peers = {(row["size"], row["work"], row["who"]): row for row in read("retrieval_peers")["rows"]}
    steps = read("dcac_step_flops")["steps"]["lora"]
    seeds = {tuple(row[:2]): row[2:] for row in dcac_synthetic.rows_of(read("dcac_synthetic")["runs"])}
    baseline, dcac, gain = seeds["a -> b", "mAP %"]
    kept = {tuple(row[:2]): row[2:] for row in read("filter_truth")["table"]}
    killed = read("faults")
    kills, lost = (killed["columns"].index(name) for name in ("kills", "lost"))

    def shown(row):
        return f"{row['seconds']:.1f} s, {row['gib']:.1f} GiB"

    rows = [
        [
            "ranking and re-ranking at the size of Market-1501, two CPU cores",
            shown(ours["M", "rerank"]),
            f"torchreid {shown(peers['M', 'rerank', 'torchreid'])}",
        ],
        ["the same at the size of MSMT17", shown(ours["L", "rerank"]), "no room for its matrices in 24 GB"],
        [
            "a DCAC step, counted in steps of the baseline",
            f"{steps['ours']['ratio']:.2f} x",
            f"as the paper does it {steps['paper']['ratio']:.2f} x",
        ],
        ["DCAC on drawn people of an unseen domain, mAP %", dcac, f"baseline {baseline}, gain {gain}"],
        [
            "Re-ID filter: AUC of right generated images against all others, drawn people",
            kept["one or two", "Re-ID CTF"][0],
            f"CLIP filter {kept['one or two', 'CLIP'][0]}",
        ],
        [
            "jobs killed at random moments",
            f"{sum(int(row[kills]) for row in killed['table'])} kills",
            f"lost: {', '.join(sorted({row[lost] for row in killed['table']}))}",
        ],
    ]
    return ["| what | ours | beside |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]


TABLES = {
    "headline": headline,
    "dcac-cost": dcac_cost,
    "dcac-cards": dcac_cards,
    "dcac-curves": dcac_curves,
    "dcac-synthetic": dcac_on_drawn_people,
    "generation-cards": generation_cards,
    "retrieval": retrieval,
    "loading": loading,
    "clustering": clustering,
    "filter-truth": filter_truth,
    "filtering": filtering,
    "answerer": answerer,
    "starts": starts,
    "adaptation": adaptation,
    "faults": faults,
    "chain": chain,
}


def with_tables(text):
    """A text with every marked table made anew; ValueError for a mark that no table has."""

    def made(match):
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"a README marks a table {name!r}; known are {', '.join(TABLES)}")
        return "\n".join([f"<!-- table: {name} -->", *TABLES[name](), "<!-- end -->"])

    return re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only tell whether both READMEs are as the files are")
    args = parser.parse_args(input_args)
    made = {name: with_tables((ROOT / name).read_text(encoding="utf-8")) for name in FILES}
    changed = [name for name, text in made.items() if text != (ROOT / name).read_text(encoding="utf-8")]
    if args.check:
        sys.exit(f"{', '.join(changed)}: not as benchmarks/results, run python -m benchmarks.tables" if changed else 0)
    for name in changed:
        with write_together((ROOT / name).parent) as part:
            part(Path(name).name).write_text(made[name], encoding="utf-8")


if __name__ == "__main__":
    main()
