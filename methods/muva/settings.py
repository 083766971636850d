"""Flags and published values of MUVA, the encoder with part tokens; imports nothing large.

`train_dcac.py` reads them before torch is imported.
"""

from utils.ranges import above_zero, at_least, not_negative

CLIP, MUVA = "clip", "muva"
STAGES = ("both", "prompts")
# Of the method's own probabilities of identities: from texts, the mean with the classifier's, one of each token.
PROBABILITIES = ("text", "text-mean", "parts")
# What MUVA's authors train with; a flag or a recipe wins.
USUAL = {"padding": 0, "erasing": 0.0, "memory_resample": "bilinear"}
ROWS = "rows"


def recipes(published):
    """The released configurations, without diffusion; `published`: those of train_dcac.py by name.

    The number of heads is known of two of them, and the others take that of Market-1501.
    """
    names = {
        "muva-ma-ms": ("ma-ms", 2),
        "muva-ms-ma": ("ms-ma", 8),
        "muva-d-ma": ("d-ma", 2),
        "muva-c3-ma": ("c3-ma", 2),
    }
    names["muva-multi"] = ("multi", 2)
    more = {
        "encoder": MUVA,
        "diffusion": "none",
        "test_resample": "bilinear",
        "muva_epochs": 120,
        "text_temperature": 1.0,
    } | USUAL
    return {name: published[base] | more | {"mask_heads": heads} for name, (base, heads) in names.items()}


def add_flags(parser):
    group = parser.group("encoder")
    words = "clip: the backbone as it is; muva: with part tokens, under masks that it predicts"
    group.add("--encoder", choices=(CLIP, MUVA), default=CLIP, help=words)
    group.add(
        "--memory_resample",
        choices=["bilinear", "bicubic"],
        default="bicubic",
        help="resizing of the images that prototypes are made of; default bicubic, of muva bilinear",
    )

    group = parser.group("muva", idle=(lambda args: args.encoder != MUVA, "no --encoder muva"))
    words = "files of `python -m utils.datasets.part_masks`, or `rows`, the same rows for all images; default: the "
    words += "true boxes of drawn people"
    group.add("--part_masks", nargs="+", free=True, help=words)
    group.add("--mask_heads", type=at_least(1), default=2, help="heads of the attention in a mask predictor")
    words = "masks of the images that prototypes are made of: those given, or those predicted"
    group.add("--memory_masks", choices=["given", "predicted"], default="given", help=words)
    group.add("--mask_weight", type=not_negative, default=1.0, help="weight of the losses of the masks")
    words = "temperature of the loss of the texts, for the stand-ins; published, for CLIP: 1; default 50"
    group.add("--text_temperature", type=above_zero, default=50.0, help=words)
    group.add("--text_weight", type=not_negative, default=1.0, help="weight of the loss of the texts")
    group.add("--mask_lr_multiplier", type=above_zero, default=10.0, help="factor on the rate of the predictors")
    words = "prompts: only the prompts of the texts are learned, which come before the encoder, then the training ends"
    group.add("--muva_stage", choices=STAGES, default=STAGES[0], help=words)
    given = (lambda args: bool(args.muva_prompts), "--muva_prompts is given")
    words = "prompts of an earlier run on the same images, muva_prompts.safetensors; default: they are learned"
    group.add("--muva_prompts", metavar="FILE", free=True, help=words)
    group.add("--muva_epochs", type=at_least(1), default=20, idle=given, help="epochs in which prompts are learned")
    group.add("--muva_rate", type=above_zero, default=3.5e-4, idle=given, help="highest rate of the prompts")
    idle = (
        lambda args: args.probabilities not in PROBABILITIES[:2],
        lambda args: f"--probabilities {args.probabilities}",
    )
    group.add("--text_tau", type=above_zero, default=1.0, idle=idle, help="of the probabilities from texts")


class WithoutParts:
    """An encoder as it is: nothing to do at the places where `training.Parts` takes part in a training."""

    def open(self, train, num_ids, data, say):
        """No masks."""

    def encoder(self, encoder):
        return encoder

    def prompts(self):
        """Options of DCAC's prompts."""
        return {}

    def module(self, model_class, *modules, **options):
        return model_class(*modules, **options)

    def start(self, model, labels, accelerator, batch_size):
        """No first stage; the training goes on."""
        return False

    def loader(self, loader):
        return loader

    def extract(self, extract, encoder, *arguments, **options):
        return extract(encoder, *arguments, **options)

    def note(self, training, epoch, encoder, targets):
        """Nothing."""

    def illustrate(self, report, encoder, targets):
        return report


def name_of(args):
    """The method's name for people."""
    name = "Baseline" if args.diffusion == "none" else "DCAC"
    return name if args.encoder != MUVA else f"MUVA with {name}" if name == "DCAC" else "MUVA"


def parts_of(args):
    """How part tokens take part in a training; checks what they are made from."""
    if args.encoder != MUVA:
        return WithoutParts()
    # Code that no other run needs.
    from methods.muva.training import Parts

    return Parts(args)


def settle(args):
    """MUVA's values in place of the script's defaults."""
    if args.encoder == MUVA:
        values = USUAL | ({"prompt_init": "random", "prompt_tokens": "end"} if args.probabilities == "parts" else {})
        vars(args).update({name: value for name, value in values.items() if args.origin[name] == "default"})
        if args.muva_stage == "prompts":
            # Nothing is denoised.
            args.diffusion, args.origin["diffusion"] = "none", "default"


def check_args(parser, args):
    """What the arguments alone show to be wrong."""
    if args.encoder != MUVA:
        if args.probabilities in PROBABILITIES:
            parser.error(f"--probabilities {args.probabilities} are of MUVA's texts and parts: give --encoder muva")
        return
    if args.recipe and not args.recipe.startswith(MUVA):
        parser.error(
            f"--recipe {args.recipe} has DCAC's images and rates: give one of MUVA's, as muva-ma-ms, and "
            "--diffusion ldm for the feedback"
        )
    if args.muva_stage == "prompts" and args.muva_prompts:
        parser.error("--muva_stage prompts learns what --muva_prompts FILE already has; give one of them")
    if args.probabilities == "parts" and (args.prompt_init != "random" or args.prompt_tokens != "end"):
        parser.error(
            "--probabilities parts has a random prompt for each part token: leave out --prompt_init and tokens"
        )
    if args.part_masks and ROWS in args.part_masks and len(args.part_masks) > 1:
        parser.error("--part_masks rows stands for all images; give it alone, or files only")
