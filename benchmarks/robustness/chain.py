"""All chains on the built-in world, by the scripts' own commands: seconds, memory and the number of each step.

    python -m benchmarks.robustness.chain
    python -m benchmarks.robustness.chain --small --output_dir output/chain-small

    generation      captions -> fine-tuning an identity, images -> filter -> pre-train -> few-shot -> evaluate
    generalisation  train DCAC on one domain -> evaluate on two it has not seen -> adapt to one of them, unlabelled
    own-folder      plain folders of images -> hold out -> fine-tune -> calibrate -> search with decisions -> groups

Each takes less than ten minutes on two cores. A finished step is not run again, a stopped one resumes. A step whose
result cannot be right, such as a training that loses, stops the chain.
"""

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, command_line, revision, run_script, write_json, write_result
from benchmarks.robustness import outcomes
from utils.reporting.report import text_table

LAST_LINES = 12
COLUMNS = ["chain", "step", "clock", "processor", "GiB", "came out"]


@dataclass
class Step:
    """`{name}` in the command is another step's folder; `small` is added for the smallest useful run.

    `outcome` checks what the step left and returns its number; `output` is the flag of its folder.
    """

    name: str
    command: str
    small: str
    outcome: Callable
    folder: str = ""
    output: str = "--output_dir"

    def __post_init__(self):
        self.folder = self.folder or self.name


PEOPLE = "synthetic:domain=a,num_ids=8,images_per_id=12"
FEW_PEOPLE = "synthetic:domain=a,num_ids=4,images_per_id=6"
GENERATE = "train_dreambooth_reid.py --max_train_steps 60 --num_images 12 --num_reference_images 8"
GENERATE_SMALL = "--max_train_steps 2 --num_images 4 --num_reference_images 2 --num_inference_steps 2"
GENERATE_SMALL += " --train_batch_size 2 --max_sequence_images 4"
UNSEEN, FEW_UNSEEN = "synthetic:domain=b", "synthetic:domain=b,num_ids=8,images_per_id=6"
OWN = "{own}/people:holdout=0.5"
CHAINS = {
    "generation": [
        Step(
            "captions",
            f"{GENERATE} --source {PEOPLE} --captions_only",
            f"{GENERATE_SMALL} --source {FEW_PEOPLE}",
            outcomes.captioned,
        ),
        Step(
            "images",
            f"{GENERATE} --source {PEOPLE}",
            f"{GENERATE_SMALL} --source {FEW_PEOPLE}",
            outcomes.drawn,
            folder="captions",
        ),
        Step(
            "filter",
            "filter_generated.py --generated {captions} --keep_fraction 0.8",
            "--num_train_epochs 1 --classifier_epochs 1 --resolution 64 32",
            outcomes.filtered,
        ),
        Step(
            "pretrain",
            f"pretrain_backbone.py --source {{filter}}/dataset --target {UNSEEN} --train_batch_size 16 "
            "--num_train_epochs 8 --eval_every 8",
            f"--num_train_epochs 2 --target {FEW_UNSEEN} --resolution 64 32 --train_batch_size 4",
            outcomes.trained,
        ),
        Step(
            "finetune",
            "finetune_reid.py --method agw --setting few-shot --fraction 0.3 --backbone {pretrain}/backbone "
            "--source synthetic:domain=b,num_ids=32,images_per_id=12 --eval_every 4",
            f"--source {FEW_UNSEEN} --num_train_epochs 1 --train_batch_size 8 --resolution 64 32",
            outcomes.improved,
        ),
        Step(
            "evaluate",
            f"evaluate.py --model {{finetune}}/model --data {UNSEEN} --rerank",
            f"--data {FEW_UNSEEN} --k1 4 --k2 2",
            outcomes.evaluated,
        ),
    ],
    "generalisation": [
        Step(
            "dcac",
            f"train_dcac.py --source synthetic:domain=a,num_ids=64 --target {UNSEEN}",
            f"--source {FEW_PEOPLE} --target {FEW_UNSEEN} --num_train_epochs 1 --train_batch_size 8 "
            "--validation_ids 2",
            outcomes.improved,
        ),
        Step(
            "unseen-b",
            f"evaluate.py --model {{dcac}}/model --data {UNSEEN} --rerank",
            f"--data {FEW_UNSEEN} --k1 4",
            outcomes.as_trained("dcac"),
        ),
        Step(
            "unseen-c",
            "evaluate.py --model {dcac}/model --data synthetic:domain=c --rerank",
            "--data synthetic:domain=c,num_ids=4,images_per_id=6 --k1 4",
            outcomes.evaluated,
        ),
        Step(
            "adapted-b",
            f"adapt_reid.py --target {UNSEEN} --backbone {{dcac}}/model --num_train_epochs 4 --lr_milestones 3",
            f"--target {FEW_UNSEEN} --num_train_epochs 1 --train_batch_size 8 --cluster_k1 6 --min_samples 2 "
            "--steps_per_epoch 2",
            outcomes.improved,
        ),
    ],
    "own-folder": [
        Step(
            "draw",
            "-m utils.synthetic --domain d --num_ids 160",
            "--num_ids 16 --images_per_id 6",
            outcomes.own_folders,
            folder="own",
            output="--folders",
        ),
        Step("hold-out", f"-m utils.datasets {OWN}", "", outcomes.held_out, folder="held-out", output="--save_to"),
        Step(
            "finetune",
            "finetune_reid.py --source {own}/people --holdout 0.5 --eval_every 4",
            "--num_train_epochs 1 --train_batch_size 8 --resolution 64 32",
            outcomes.fine_tuned,
        ),
        Step(
            "calibrate",
            f"evaluate.py --model {{finetune}}/model --data {OWN} --calibrate",
            "",
            outcomes.calibrated,
        ),
        Step(
            "search",
            "evaluate.py --model {finetune}/model --query_dir {own}/wanted --gallery_dir {own}/camera2 "
            "--false_alarm_rate 0.1",
            "",
            outcomes.searched,
        ),
        Step(
            "groups",
            "evaluate.py --model {finetune}/model --group_dir {own}/tracklets",
            "",
            outcomes.grouped,
        ),
    ],
}
# Scripts that resume only with --resume_from_checkpoint; the others always do.
RESUMED = ("pretrain_backbone.py", "finetune_reid.py", "train_dcac.py", "adapt_reid.py")


def command_of(step, folder, small):
    """The words after `python`; a later flag replaces an earlier one."""
    words = shlex.split(step.command.format_map(Folders(folder)))
    if small:
        words = [word for word in words if word != "--captions_only"] + shlex.split(step.small)
        words += ["--captions_only"] if "--captions_only" in step.command else []
    words += [step.output, str(folder / step.folder)]
    return words + (["--resume_from_checkpoint", "latest"] if words[0] in RESUMED else [])


class Folders(dict):
    def __init__(self, folder):
        self.folder = folder

    def __missing__(self, name):
        return str(self.folder / name)


def run(step, folder, small):
    """Run a step and return its record; of a finished step only read the record."""
    command = command_of(step, folder, small)
    record = folder / "steps" / f"{step.name}.json"
    shown = shlex.join(["python", *command]).replace(f"{folder}/", "")
    if record.is_file():
        before = json.loads(record.read_text(encoding="utf-8"))
        if (before["command"], before.get("revision")) != (shown, revision()):
            raise ValueError(
                f"{folder} holds another chain, or one of other code, {before['command']} at "
                f"{before.get('revision')}; give another --output_dir"
            )
        return before
    print(f"\n{step.name}: {shown}", flush=True)
    if command[0] == "-m":
        # These write a new folder at once: what is there, was not recorded.
        shutil.rmtree(folder / step.folder, ignore_errors=True)
    run = run_script(*command, logs=folder / "steps" / step.name, folder=ROOT)
    lines = run.output.splitlines()
    print("\n".join(lines[-LAST_LINES:]), flush=True)
    if run.code:
        name = " ".join(command[:2]) if command[0] == "-m" else command[0]
        raise ValueError(f"{name} stopped with {run.code}: {run.last_line}; the same command continues")
    outcome = step.outcome(folder, folder / step.folder, small)
    print(f"{step.name}: {outcome}", flush=True)
    found = {
        "step": step.name,
        "command": shown,
        "revision": revision(),
        "seconds": round(run.seconds, 1),
        "cpu_seconds": round(run.cpu_seconds, 1),
        "peak_gib": round(run.peak_gib, 2),
        "outcome": outcome,
        "said": [line.replace(f"{folder}/", "") for line in lines[-LAST_LINES:]],
    }
    write_json(record, found)
    return found


def rows_of(chains):
    return [
        [
            chain,
            one["step"],
            f"{one['seconds']:.0f} s",
            f"{one['cpu_seconds']:.0f} s",
            f"{one['peak_gib']:.1f}",
            # Of records that were written before steps had a number.
            one.get("outcome", "-"),
        ]
        for chain, steps in chains.items()
        for one in steps
    ]


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", nargs="+", choices=CHAINS, default=list(CHAINS), help="default all")
    parser.add_argument("--small", action="store_true", help="the smallest useful run of each script")
    parser.add_argument("--output_dir", type=Path, default=Path("output/chain"), help="default output/chain")
    parser.add_argument("--json", type=Path, help="default benchmarks/results/chain.json or chain_small.json")
    args = parser.parse_args(input_args)
    args.output_dir = args.output_dir.absolute()
    args.json = args.json or RESULTS / ("chain_small.json" if args.small else "chain.json")
    return args


def main(input_args=None):
    args = parse_args(input_args)
    chains = json.loads(args.json.read_text(encoding="utf-8"))["raw"]["chains"] if args.json.is_file() else {}
    for chain in args.chains:
        chains[chain] = [run(step, args.output_dir / chain, args.small) for step in CHAINS[chain]]
    print(f"\n{text_table(COLUMNS, rows_of({chain: chains[chain] for chain in args.chains}))}")
    # The other chains stay in the file, if they are of the same code.
    here = {
        chain: steps for chain, steps in chains.items() if all(step.get("revision") == revision() for step in steps)
    }
    raw = {"chains": {chain: here[chain] for chain in CHAINS if chain in here}}
    write_result(args.json, command_line(__spec__.name, input_args), COLUMNS, rows_of(raw["chains"]), raw)
    print(f"Reports: report.html in the folders of {args.output_dir}; result: {args.json}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"benchmarks.robustness.chain: {error}")
