"""The two chains on the built-in world, by the scripts' own commands: wall time and peak memory of each step.

    python -m benchmarks.robustness.chain
    python -m benchmarks.robustness.chain --small --chains generation --output_dir output/chain-small

    generation      captions -> fine-tuning an identity, images -> filter -> pre-train -> few-shot -> evaluate
    generalisation  train DCAC on one domain -> evaluate on two it has not seen -> adapt to one of them, unlabelled

Each under ten minutes on two cores. A step that is done is not run again, one that was stopped continues.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, environment
from utils.files import to_json, write_together
from utils.reporting.report import text_table

LAST_LINES = 12
# A process counts as its own what the one that forked it held: so a small one stands between.
MEASURED = """
import json, resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    json.dump([used.ru_utime + used.ru_stime, used.ru_maxrss], file)
sys.exit(code if code >= 0 else 128 - code)
"""


@dataclass
class Step:
    """`{name}` in the command is another step's folder; `small` is added for the smallest run that is of use."""

    name: str
    command: str
    small: str
    folder: str = ""

    def __post_init__(self):
        self.folder = self.folder or self.name


PEOPLE = "synthetic:domain=a,num_ids=8,images_per_id=12"
FEW_PEOPLE = "synthetic:domain=a,num_ids=4,images_per_id=6"
GENERATE = "train_dreambooth_reid.py --max_train_steps 60 --num_images 12 --num_reference_images 8"
GENERATE_SMALL = "--max_train_steps 2 --num_images 4 --num_reference_images 2 --num_inference_steps 2"
GENERATE_SMALL += " --train_batch_size 2 --max_sequence_images 4"
UNSEEN, FEW_UNSEEN = "synthetic:domain=b", "synthetic:domain=b,num_ids=8,images_per_id=6"
CHAINS = {
    "generation": [
        Step("captions", f"{GENERATE} --source {PEOPLE} --captions_only", f"{GENERATE_SMALL} --source {FEW_PEOPLE}"),
        Step("images", f"{GENERATE} --source {PEOPLE}", f"{GENERATE_SMALL} --source {FEW_PEOPLE}", "captions"),
        Step(
            "filter",
            "filter_generated.py --generated {captions} --keep_fraction 0.8",
            "--num_train_epochs 1 --classifier_epochs 1 --resolution 64 32",
        ),
        Step(
            "pretrain",
            f"pretrain_backbone.py --source {{filter}}/dataset --target {UNSEEN} --train_batch_size 16 "
            "--num_train_epochs 8 --eval_every 8",
            f"--num_train_epochs 2 --target {FEW_UNSEEN} --resolution 64 32 --train_batch_size 4",
        ),
        Step(
            "finetune",
            "finetune_reid.py --method agw --setting few-shot --fraction 0.3 --backbone {pretrain}/backbone "
            "--source synthetic:domain=b,num_ids=32,images_per_id=12 --eval_every 4",
            f"--source {FEW_UNSEEN} --num_train_epochs 1 --train_batch_size 8 --resolution 64 32",
        ),
        Step(
            "evaluate",
            f"evaluate.py --model {{finetune}}/model --data {UNSEEN} --rerank",
            f"--data {FEW_UNSEEN} --k1 4 --k2 2",
        ),
    ],
    "generalisation": [
        Step(
            "dcac",
            f"train_dcac.py --source synthetic:domain=a,num_ids=64 --target {UNSEEN}",
            f"--source {FEW_PEOPLE} --target {FEW_UNSEEN} --num_train_epochs 1 --train_batch_size 8 "
            "--validation_ids 2",
        ),
        Step(
            "unseen-b", f"evaluate.py --model {{dcac}}/model --data {UNSEEN} --rerank", f"--data {FEW_UNSEEN} --k1 4"
        ),
        Step(
            "unseen-c",
            "evaluate.py --model {dcac}/model --data synthetic:domain=c --rerank",
            "--data synthetic:domain=c,num_ids=4,images_per_id=6 --k1 4",
        ),
        Step(
            "adapted-b",
            f"adapt_reid.py --target {UNSEEN} --backbone {{dcac}}/model --num_train_epochs 4 --lr_milestones 3",
            f"--target {FEW_UNSEEN} --num_train_epochs 1 --train_batch_size 8 --cluster_k1 6 --min_samples 2 "
            "--steps_per_epoch 2",
        ),
    ],
}
# Trainings continue from their checkpoints by this, the others without being told.
RESUMED = ("pretrain_backbone.py", "finetune_reid.py", "train_dcac.py", "adapt_reid.py")


def command_of(step, folder, small):
    """The words after `python`; a later flag wins over an earlier one."""
    words = shlex.split(step.command.format_map(Folders(folder)))
    if small:
        words = [word for word in words if word != "--captions_only"] + shlex.split(step.small)
        words += ["--captions_only"] if "--captions_only" in step.command else []
    words += ["--output_dir", str(folder / step.folder)]
    return words + (["--resume_from_checkpoint", "latest"] if words[0] in RESUMED else [])


class Folders(dict):
    def __init__(self, folder):
        self.folder = folder

    def __missing__(self, name):
        return str(self.folder / name)


def run(step, folder, small):
    """A step's record: read where it is done, else made."""
    command = command_of(step, folder, small)
    record = folder / "steps" / f"{step.name}.json"
    shown = shlex.join(["python", *command]).replace(f"{folder}/", "")
    if record.is_file():
        before = json.loads(record.read_text(encoding="utf-8"))
        if before["command"] != shown:
            raise ValueError(f"{folder} holds another chain, {before['command']}; give another --output_dir")
        return before
    print(f"\n{step.name}: {shown}", flush=True)
    record.parent.mkdir(parents=True, exist_ok=True)
    log = record.with_suffix(".log")
    before = time.perf_counter()
    usage = record.with_suffix(".usage")
    with open(log, "w", encoding="utf-8") as said, open(record.with_suffix(".err"), "w", encoding="utf-8") as listed:
        words = [sys.executable, "-S", "-c", MEASURED, str(usage), sys.executable, *command]
        code = subprocess.run(words, cwd=ROOT, stdout=said, stderr=listed).returncode
    seconds = time.perf_counter() - before
    lines = log.read_text(encoding="utf-8").splitlines()
    print("\n".join(lines[-LAST_LINES:]), flush=True)
    if code:
        end = record.with_suffix(".err").read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise ValueError(f"{command[0]} stopped with {code}: {' '.join(end)}; the same command continues from there")
    cpu_seconds, kilobytes = json.loads(usage.read_text(encoding="utf-8"))
    found = {
        "step": step.name,
        "command": shown,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_gib": round(kilobytes / 2**20, 2),
        "said": [line.replace(f"{folder}/", "") for line in lines[-LAST_LINES:]],
    }
    with write_together(record.parent) as part:
        part(record.name).write_text(to_json(found), encoding="utf-8")
    return found


def rows_of(chains):
    return [
        [chain, one["step"], one["command"].split()[1], f"{one['seconds']:.0f}", f"{one['cpu_seconds']:.0f}",
         f"{one['peak_gib']:.2f}"]
        for chain, steps in chains.items()
        for one in steps
    ]  # fmt: skip


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", nargs="+", choices=CHAINS, default=list(CHAINS), help="default both")
    parser.add_argument("--small", action="store_true", help="each script's smallest run that is of use")
    parser.add_argument("--output_dir", type=Path, default=Path("output/chain"), help="default output/chain")
    parser.add_argument("--json", type=Path, default=RESULTS / "chain.json", help="default benchmarks/results")
    args = parser.parse_args(input_args)
    args.output_dir = args.output_dir.absolute()
    return args


def main(input_args=None):
    args = parse_args(input_args)
    columns = ["chain", "step", "script", "seconds", "CPU seconds", "peak GiB"]
    chains = {}
    for chain in args.chains:
        chains[chain] = [run(step, args.output_dir / chain, args.small) for step in CHAINS[chain]]
    rows = rows_of(chains)
    print(f"\n{text_table(columns, rows)}")
    size = "small" if args.small else "usual"
    # Both sizes stand in one file.
    content = json.loads(args.json.read_text(encoding="utf-8")) if args.json.is_file() else {}
    kept = content.get(size, {}).get("chains", {})
    content[size] = {"environment": environment(), "chains": kept | chains}
    content[size]["columns"], content[size]["table"] = columns, rows_of(content[size]["chains"])
    with write_together(args.json.parent) as part:
        part(args.json.name).write_text(to_json(content), encoding="utf-8")
    print(f"Pages: report.html in the folders of {args.output_dir}; numbers: {args.json}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"benchmarks.robustness.chain: {error}")
