"""Flags of all scripts together: one meaning, one name; and everything imports without what is optional."""

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys

import pytest

from tests.runs import ROOT
from utils.launch import SCRIPTS as KNOWN
from utils.launch import check_folder

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
assert [f"{name}.py" for name in SCRIPTS] == sorted(KNOWN)
# What belongs to a script, under a name that others have too: its own words, one model or several, the U-Net's parts.
OWN_KINDS = {"recipe", "method", "setting", "margin", "lr_scheduler", "reid_model", "gradient_checkpointing"}
# Whoever has these has them with the same default.
SAME_DEFAULT = [
    "seed", "mixed_precision", "data_root", "source", "allow_tf32", "skip_unreadable", "single_image_ids",
    "images_per_id", "gradient_accumulation_steps", "optimizer", "adam_beta1", "adam_beta2", "adam_epsilon",
    "use_8bit_adam", "max_train_steps", "eval_batch_size", "rerank", "lambda_value", "checkpointing_steps",
    "checkpoints_total_limit", "resume_from_checkpoint", "log_every", "report_to", "push_to_hub", "hub_model_id",
    "lr_warmup_epochs", "lr_warmup_factor", "lr_gamma", "fraction_seed", "rank", "test_resample",
    "torch_compile", "revision", "enable_xformers_memory_efficient_attention", "pretrained_model_name_or_path",
]  # fmt: skip
# Captions and tuning of one identity are measured in steps, not in epochs.
OTHER_DEFAULT = {("max_train_steps", "train_dreambooth_reid")}
EVERYWHERE = ["seed", "mixed_precision", "output_dir", "data_root", "skip_unreadable", "resolution"]
# A page draws nothing by chance and opens no benchmark.
NOT_IN_APP = {"seed", "data_root"}
# What a reader of diffusers' scripts would not look for.
NOT_THE_NAME = {
    "lr": "learning_rate", "epochs": "num_train_epochs", "num_epochs": "num_train_epochs", "workers":
    "dataloader_num_workers", "num_workers": "dataloader_num_workers", "batch-size": "train_batch_size", "fp16":
    "mixed_precision", "out": "output_dir", "output": "output_dir", "resume": "resume_from_checkpoint", "root":
    "data_root", "steps": "max_train_steps", "weight_decay": "adam_weight_decay", "random_seed": "seed",
}  # fmt: skip
OPTIONAL = [
    "bitsandbytes", "xformers", "deepspeed", "wandb", "tensorboard", "trackio", "triton", "onnx", "onnxruntime",
    "onnxscript", "faiss", "torchreid", "pytest", "gradio",
]  # fmt: skip


def parser_of(name):
    """The parser a script makes, caught where it is about to parse."""

    class Caught(Exception):
        pass

    def catch(self, *arguments, **options):
        raise Caught(self)

    script = importlib.import_module(name)
    if hasattr(script, "build_parser"):
        return script.build_parser()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        try:
            script.parse_args([])
        except Caught as caught:
            return caught.args[0]
    raise AssertionError(f"{name} parses no arguments")


@pytest.fixture(scope="module")
def flags():
    """{flag: {script: its action}}; a flag goes by all its names."""
    found = {}
    for name in SCRIPTS:
        for action in parser_of(name)._actions:
            for option in action.option_strings:
                if option not in ("-h", "--help"):
                    found.setdefault(option.removeprefix("--"), {})[name] = action
    return found


def test_one_name_is_one_kind_of_value(flags):
    for flag, actions in flags.items():
        kinds = {(action.type, action.nargs, type(action)) for action in actions.values()}
        assert len(kinds) == 1 or flag in OWN_KINDS, f"--{flag}: {kinds} in {', '.join(actions)}"
        choices = {tuple(action.choices or ()) for action in actions.values()}
        assert len(choices) == 1 or flag in OWN_KINDS, f"--{flag}: {choices} in {', '.join(actions)}"


def test_what_means_the_same_has_the_same_default(flags):
    for flag in SAME_DEFAULT:
        defaults = {
            name: repr(action.default) for name, action in flags[flag].items() if (flag, name) not in OTHER_DEFAULT
        }
        assert len(set(defaults.values())) == 1, f"--{flag}: {defaults}"
    for flag in EVERYWHERE:
        expected = [name for name in SCRIPTS if name != "app" or flag not in NOT_IN_APP]
        assert sorted(flags[flag]) == expected, f"--{flag} is missing somewhere"
    # Demos do not write into each other's folder.
    folders = [action.default for action in flags["output_dir"].values()]
    assert len(set(folders)) == len(folders) and all(folder.startswith("output/") for folder in folders)


def test_one_meaning_has_one_name(flags):
    for other, name in NOT_THE_NAME.items():
        assert other not in flags, f"--{other} of {', '.join(flags.get(other, ()))}: call it --{name}"
    for pair in (("batch_size", "eval_batch_size"), ("clip_model", "clip_model_name_or_path")):
        other, name = (flags.get(one, {}) for one in pair)
        # An older name may stay beside the common one.
        assert set(other) <= set(name), f"--{pair[0]} of {', '.join(other)}: call it --{pair[1]}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_everything_does(name, capsys):
    parser = parser_of(name)
    for action in parser._actions:
        flag = "/".join(action.option_strings)
        assert action.help or action.choices, f"{name} {flag} has no help"
        # As it is printed: the formatter adds defaults.
        told = parser.formatter_class("x")._get_help_string(action)
        # Of a number that can only be 1, and of switches, no more is to be said.
        plain = action.default in (None, False, 1, argparse.SUPPRESS)
        assert plain or "default" in told.lower(), f"{name} {flag} does not say that {action.default} is its default"
        assert "TODO" not in told and told.replace("%%", "").count("%") == told.count("%("), f"{name} {flag}: {told}"
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).parse_args(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and importlib.import_module(name).__doc__.strip().splitlines()[0] in said
    assert f"{name}.py" in said and "--output_dir" in said


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_a_mistyped_flag_wait_for_no_library(name):
    """By processor time, which other work on the machine does not change much."""
    for words, code in ((["--help"], 0), (["--nonsense"], 2)):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = subprocess.run([sys.executable, f"{name}.py", *words], cwd=ROOT, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run.returncode == code, run.stderr
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


BAD = [
    ("--seed", ["x"], "must be a whole number, got 'x'"),
    ("--seed", [str(2**32)], "must be 0 or more, and below 2^32, got 4294967296"),
    ("--mixed_precision", ["fp8"], "invalid choice: 'fp8'"),
    ("--resolution", ["256"], "expected 2 arguments"),
    ("--nonsense", ["1"], "unrecognized arguments: --nonsense 1"),
    ("--dataloader_num_workers", ["-1"], "got -1"),
    ("--eval_batch_size", ["0"], "got 0"),
    ("--adam_beta1", ["1.5"], "between 0 and 1, and below 1, got 1.5"),
    ("--adam_beta2", ["1"], "below 1, got 1.0"),
    ("--learning_rate", ["inf"], "above 0, got inf"),
    ("--adam_beta2", ["-1"], "between 0 and 1, and below 1, got -1"),
    ("--output_dir", [], "expected one argument"),
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_values_that_cannot_be_end_in_one_line(name, capsys, flags):
    for flag, values, words in BAD:
        if flag != "--nonsense" and name not in flags[flag[2:]]:
            continue
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(name).parse_args([flag, *values])
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and words in line and flag.strip("-") in line, f"{name} {flag}: {line}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_folder_of_another_script_is_left_alone(name, tmp_path):
    """Refused before anything is read or written; what was copied from a script and changed may continue there."""
    script, record = importlib.import_module(name), tmp_path / "args.json"
    run = getattr(script, "run_script", None) or script.start
    args = script.parse_args(["--output_dir", str(tmp_path)])
    other = "evaluate.py" if name != "evaluate" else "train_dcac.py"
    for command in ([other, "--seed", "1"], f"accelerate launch {other} --seed 1"):
        record.write_text(json.dumps({"command": command}))
        with pytest.raises(SystemExit) as ended:
            run(args)
        assert ended.value.code == f"{name}.py: {tmp_path} holds what {other} left; give another --output_dir"
    assert [path.name for path in tmp_path.iterdir()] == ["args.json"]
    for command in ([f"{name}.py"], ["my_own.py"], f"accelerate launch {name}.py --seed 1", []):
        record.write_text(json.dumps({"command": command}))
        check_folder(tmp_path, f"{name}.py")


BLOCKED = """
import importlib, pkgutil, sys


class Without:
    # Finds what another finder finds, but for the packages that are to be absent.

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        absent = name.split(".")[0] in sys.argv[1].split(",")
        return None if absent else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
names = sys.argv[2].split(",")
for package in ("utils", "kernels"):
    names += [one.name for one in pkgutil.walk_packages([package], f"{package}.")]
# Kernels themselves are Triton's; what calls them imports without it.
for name in names:
    if not name.endswith("_triton"):
        importlib.import_module(name)
print(len(names), *sorted(set(sys.argv[1].split(",")) & set(sys.modules)))
"""


def test_everything_imports_without_what_is_optional():
    command = [sys.executable, "-W", "ignore", "-c", BLOCKED, ",".join(OPTIONAL), ",".join(SCRIPTS)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    count, *imported = run.stdout.split()
    assert int(count) > 60 and imported == []


@pytest.mark.parametrize(
    "name, words, idle",
    [
        ("finetune_reid.py", "--lr_scheduler delayed_cosine --lr_milestones 3 --lr_warmup_factor 0.2",
         "--lr_milestones (--lr_scheduler delayed_cosine)"),
        ("finetune_reid.py", "--method meta --groups mean", "--groups (--method meta)"),
        ("pretrain_backbone.py", "--objective dino --padding 2 --erasing 0.1",
         "--padding (--objective dino has its own crops), --erasing (--objective dino has its own crops)"),
        ("adapt_reid.py", "--target x --single_image_ids drop", "--single_image_ids (no --source)"),
        ("adapt_reid.py", "--method hhcl --memory_update instances --mean_weight 0.3",
         "--mean_weight (--memory_update instances)"),
    ],
)  # fmt: skip
def test_flags_that_a_choice_does_not_read_are_said(name, words, idle):
    """All of them and no other."""
    args = importlib.import_module(name.removesuffix(".py")).parse_args(words.split())
    assert [line for line in args.notes if line.startswith("Without effect")] == [f"Without effect: {idle}"]
