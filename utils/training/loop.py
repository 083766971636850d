"""The loop of every training: starts or resumes, runs epoch by epoch, logs, saves, stops at SIGTERM and Ctrl-C.

training = Training(args, accelerator, sampler, train, script="train_x.py", data=digest_of(train, labels))
model, optimizer = accelerator.prepare(model, optimizer_of(args, parameters))
training.begin(model, optimizer, rates_of(args, optimizer, training.num_steps))
for epoch in training.epochs():
    for batch in training.batches(loader):
        training.log(training_step(...))
    if training.measures(epoch):
        training.measure(epoch, model, targets)
return training.end(report)
"""

import random
import shlex
import signal
from pathlib import Path

import torch
from tqdm.auto import tqdm

from utils.batches.transforms import test_transform
from utils.evaluation.targets import evaluate_target, results
from utils.files import run_record, to_json, write_together
from utils.launch import tracked, whole_weights
from utils.modeling.folder import training_card
from utils.reporting.report import text_table
from utils.training.checkpoints import load_checkpoint, open_state, save_checkpoint
from utils.training.log import StepLog, StopSignal
from utils.training.optimizer import LearningRate, build_optimizer
from utils.training.report import before_and_after, training_report

SHOWN_IMAGES = 64


class Training:
    """A training and its progress: `state` holds the step, the epoch, the batches done in it, and the measurements.

    Create it before the model: a checkpoint that is absent, damaged or has other arguments raises at once. `images` is
    the data set whose row numbers are the batches' `indices`; `data` identifies it in a checkpoint. With `num_steps`
    the training ends after so many steps, however many epochs they are.
    """

    def __init__(
        self, args, accelerator, sampler, images, *, script, data, free=None, batch_size=None, num_steps=None
    ):
        self.args, self.accelerator, self.sampler, self.images = args, accelerator, sampler, images
        self.script = script
        self.batch_size = batch_size or sampler.batch_size
        known = {"effective_batch_size": self.batch_size, "data": data, "precision": accelerator.mixed_precision}
        free = args.free_on_resume if free is None else free
        self.path, self.state = open_state(args, script, **known, free=free, say=accelerator.print)
        self.ends_by_steps = num_steps is not None
        self.num_steps = num_steps or sampler.steps_of(args.num_train_epochs)
        self.stopped_at = None

    @property
    def resumed(self):
        return self.path is not None

    @property
    def step(self):
        """Number of completed steps."""
        return self.state["step"]

    @property
    def epoch(self):
        return self.state["epoch"]

    @property
    def in_mid_epoch(self):
        """Whether batches of this epoch are done already: the checkpoint then holds its prototypes and clusters."""
        return self.state["batch"] > 0

    def begin(self, model, optimizer, rates, *, kept=None):
        """Load the checkpoint into the prepared model and optimizer; write args.json and start the trackers.

        `kept` is the module whose tensors a checkpoint holds, if it is not `model`.
        """
        self.model, self.kept, self.optimizer, self.rates = model, kept or model, optimizer, rates
        if self.resumed:
            load_checkpoint(self.path, self.kept, optimizer, accelerator=self.accelerator)
        if self.accelerator.is_main_process:
            with write_together(self.args.output_dir) as part:
                part("args.json").write_text(to_json(run_record(self.args)))
        name = Path(self.script).stem.removeprefix("train_").split("_")[0]
        self.accelerator.init_trackers(f"diffreid-{name}", config=tracked(self.args))

    def epochs(self):
        """The remaining epochs; the last checkpoint is written after them."""
        args, accelerator, state = self.args, self.accelerator, self.state
        path = Path(args.output_dir) / "log.jsonl"
        self.lines = StepLog(path, accelerator, every=args.log_every, describe=self.name_images)
        # A run may resume another run's checkpoint in a new folder.
        self.lines.cut(self.step, beside=self.path.parent / "log.jsonl" if self.resumed else None)
        self.signal, self.saved = StopSignal(), self.step
        self.bar = tqdm(
            total=min(self.num_steps, args.max_train_steps or self.num_steps),
            initial=self.step,
            desc="training",
            disable=None if accelerator.is_main_process else True,
        )
        while (self.ends_by_steps or state["epoch"] <= args.num_train_epochs) and not self.is_cut and not self.stopped:
            self.sampler.set_epoch(state["epoch"], done=state["batch"])
            yield state["epoch"]
        if not self.stopped:
            if self.step > self.saved:
                self.save()
            self.bar.close()
            self.signal.close()

    def batches(self, loader):
        """The remaining batches of the epoch. After each batch, call `log` before taking the next one."""
        args, state, epoch = self.args, self.state, self.epoch
        for batch in loader:
            self.rate = self.rates.set(epoch, self.step)
            # Swin drops paths with torch's global generator, which measurements and loaders use too.
            torch.manual_seed(dropout_seed(args.seed, self.step, self.accelerator.process_index))
            self.rows, expected = batch["indices"], self.step + 1
            yield batch
            assert self.step == expected, "every batch needs one call of training.log(values)"
            # Processes have to ask at the same places.
            if (self.written or self.accelerator.num_processes == 1) and self.signal.asked(self.accelerator):
                self.stopped_at = self.save()
                return
            if self.is_cut:
                return
            if self.step % args.checkpointing_steps == 0:
                self.save()
        state["epoch"], state["batch"] = epoch + 1, 0

    def log(self, values):
        """Log a completed step; `values` are its numbers as tensors on the device."""
        self.state["step"], self.state["batch"] = self.step + 1, self.state["batch"] + 1
        self.bar.update()
        self.written = self.lines.add(self.step, self.epoch, self.rate, values, self.rows)
        if self.written:
            last = self.lines.last
            self.bar.set_postfix({name: f"{last[name]:.3f}" for name in values}, refresh=False)

    def measures(self, epoch):
        """Whether targets are measured after this epoch."""
        if self.stopped:
            return False
        self.lines.flush()
        return epoch % self.args.eval_every == 0 or epoch == self.args.num_train_epochs or self.is_cut

    def measure(self, epoch, model, targets, *, in_float32=False):
        """Measure each target; write the numbers to the history, metrics.json, the console and the trackers."""
        args, accelerator, state = self.args, self.accelerator, self.state
        options = {"batch_size": args.eval_batch_size, "num_workers": args.dataloader_num_workers}
        options |= {"accelerator": accelerator, "rerank": reranking_of(args), "in_float32": in_float32}
        with whole_weights(self.model, accelerator):
            found = [(target, evaluate_target(model, target, transform_of(model), **options)) for target in targets]
        for target, metrics in found:
            place = {"epoch": epoch, "target": target.spec}
            # A run that resumes in the middle of an epoch measures that epoch again, at its end.
            others = [entry for entry in state["history"] if {key: entry[key] for key in place} != place]
            state["history"] = [*others, place | metrics]
            more = f", means of {len(metrics['splits'])} splits" if "splits" in metrics else ""
            accelerator.print(
                f"epoch {epoch}: {target.spec} mAP {100 * metrics['mAP']:.1f} %, "
                f"Rank-1 {100 * metrics['rank1']:.1f} %{more}"
            )
            numbers = {f"{target.spec}/{name}": value for name, value in metrics.items() if isinstance(value, float)}
            accelerator.log(numbers, step=self.step)
        self.write_results()

    def note(self, epoch, **notes):
        """Keep numbers of a method, {name: value}, in a list of metrics.json beside the history; main process only."""
        for name, numbers in notes.items():
            kept = self.state.setdefault("notes", {})
            others = [entry for entry in kept.get(name, []) if entry["epoch"] != epoch]
            kept[name] = [*others, {"epoch": epoch} | numbers]
            shown = ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())
            self.accelerator.print(f"epoch {epoch}: {name}: {shown}")
            self.accelerator.log({f"{name}/{key}": value for key, value in numbers.items()}, step=self.step)
        self.write_results()

    def write_results(self):
        if self.accelerator.is_main_process:
            with write_together(self.args.output_dir) as part:
                part("metrics.json").write_text(to_json(self.results))

    @property
    def results(self):
        """The content of metrics.json."""
        return results(self.state["history"]) | self.state.get("notes", {})

    def card(self, title, text, *, library_name="diffreid", **details):
        """The model card: `text` says what the model is, `details` are facts beside the number of training images."""
        details = {"images": len(self.images)} | details
        more = {"metrics": self.results["targets"], "details": details, "library_name": library_name}
        return training_card(title, text, self.script, vars(self.args), **more)

    def report(self, title, lead, facts, **more):
        """The `Report` of the training; `facts` come before those that every training has."""
        facts = [*facts, ("Steps", f"{self.step:,}"), ("Batch", self.batch_size), ("Seed", self.args.seed)]
        return training_report(title, self.args.output_dir, self.state["history"], lead=lead, facts=facts, **more)

    @property
    def is_cut(self):
        """Whether --max_train_steps ends the training here; the place in the epoch is kept for a run that resumes."""
        most = self.args.max_train_steps
        return (most is not None and self.step >= most) or (self.ends_by_steps and self.step >= self.num_steps)

    @property
    def stopped(self):
        """Whether SIGTERM or Ctrl-C ended the training."""
        return self.stopped_at is not None

    def save(self):
        self.lines.flush()
        self.saved = self.step
        options = {"accelerator": self.accelerator, "limit": self.args.checkpoints_total_limit}
        return save_checkpoint(self.args.output_dir, self.step, self.state, self.kept, self.optimizer, **options)

    def name_images(self, rows):
        """The names of a batch's images on all processes, for an error; only the first ones of a large batch."""
        rows = sorted(set(self.accelerator.gather(rows.to(self.accelerator.device)).tolist()))
        more = f" and {len(rows) - SHOWN_IMAGES} others" if len(rows) > SHOWN_IMAGES else ""
        return f"Images of that batch: {', '.join(self.images[row]['path'] for row in rows[:SHOWN_IMAGES])}{more}. "

    def end(self, report=None, *, upload=None):
        """Write the report, print the table of results, upload; returns the exit code.

        `report()` returns a `Report` and is called by one process only; `upload(repo_id)` returns an address.
        """
        args, accelerator = self.args, self.accelerator
        accelerator.wait_for_everyone()
        with whole_weights(self.model, accelerator):
            if self.stopped:
                why = signal.Signals(self.signal.number).name
                words = f"{why}: {self.stopped_at} is written; resume with --resume_from_checkpoint latest"
                accelerator.print(words)
            elif accelerator.is_main_process:
                output_dir, history = Path(args.output_dir), self.state["history"]
                with write_together(output_dir) as part:
                    report().write(part("report.html"))
                if history:
                    print(text_table(["target", "number", "before", "after", "points"], before_and_after(history)))
                print(f"Results: {output_dir}; open {output_dir / 'report.html'}")
                if (model := output_dir / "model").is_dir():
                    model = shlex.quote(str(model))
                    print(f"Search: python evaluate.py --model {model} --query_dir DIR --gallery_dir DIR")
                    if spec := next((entry["target"] for entry in history if "holdout=" in entry["target"]), None):
                        words = f"--model {model} --data {shlex.quote(spec)} --calibrate"
                        print(f"Decide, by those held out: python evaluate.py {words}")
                if args.push_to_hub:
                    print(f"Uploaded: {upload(args.hub_model_id or output_dir.resolve().name)}")
        accelerator.end_training()
        return 128 + self.signal.number if self.stopped else 0


def dropout_seed(seed, step, process):
    """The seed of dropout in a step on one process: the same after a resume."""
    return random.Random(f"paths/{seed}/{step}/{process}").getrandbits(62)


def transform_of(model):
    """The transform of a model's images for measurements."""
    return test_transform(model.image_size, model.image_mean, model.image_std, model.resample)


def reranking_of(args):
    if not getattr(args, "rerank", False):
        return None
    return {name: getattr(args, name) for name in ("k1", "k2", "lambda_value")}


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def optimizer_of(args, groups):
    """The optimizer set by the flags, over parameter groups."""
    return build_optimizer(
        groups,
        getattr(args, "optimizer", "adamw"),
        learning_rate=args.learning_rate,
        weight_decay=args.adam_weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        epsilon=args.adam_epsilon,
        use_8bit=args.use_8bit_adam,
        nesterov=getattr(args, "nesterov", False),
    )


def rates_of(args, optimizer, num_steps, schedule=None):
    """The learning rates of --lr_scheduler, or of `schedule`, a function of epoch and step."""
    options = {"warmup_epochs": args.lr_warmup_epochs, "warmup_factor": args.lr_warmup_factor}
    options |= {"milestones": args.lr_milestones, "gamma": args.lr_gamma, "warmup_steps": args.lr_warmup_steps}
    return LearningRate(optimizer, schedule or args.lr_scheduler, **options, num_steps=num_steps)


def norm_of(norm, device):
    """The gradient norm as a tensor; DeepSpeed returns None before its first step, FSDP2 a share of a sum."""
    whole = getattr(norm, "full_tensor", lambda: 0.0 if norm is None else norm)()
    return torch.as_tensor(whole, device=device)
