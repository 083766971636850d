"""Settings of generation that depend on the family of the model."""

from transformers import T5EncoderModel

from utils.diffusion.families import sdxl, stable_diffusion
from utils.diffusion.families.solvers import FLOW_EULER
from utils.diffusion.families.texts import load_tokenizer
from utils.files import one_line

RARE_WORD = "sks"


def fitted(family, network, settings, given):
    """({name: value} of the settings that become others, lines that say so); ValueError for a flag that cannot be.

    network: the configuration of what denoises. settings: identity_token, solver, guidance_scale, snr_gamma,
    train_text_encoder, fast_lora, mixed_precision, enable_xformers_memory_efficient_attention. given: names of the
    settings that a flag gave, also of others.
    """
    changed, lines = {}, []
    of_flow = FLOW_EULER in family.SOLVERS
    is_new = settings["identity_token"].startswith("<")
    if len(family.TEXTS) > 1 and is_new:
        if "identity_token" in given:
            raise ValueError(
                f"--identity_token {settings['identity_token']}: {family.TITLE} has {len(family.TEXTS)} text "
                f"encoders, and a new token is one encoder's; give a rare word without brackets, such as {RARE_WORD}"
            )
        changed["identity_token"] = RARE_WORD
        lines.append(f"{family.TITLE} has several text encoders: --identity_token {RARE_WORD}, a word they know")
    if len(family.TEXTS) > 1 and "token_learning_rate" in given:
        raise ValueError(
            f"--token_learning_rate is that of a new token, which {family.TITLE} does not have; leave it out"
        )
    if not family.GUIDED:
        for flag in ("negative_prompt", "guidance_share"):
            if flag in given:
                raise ValueError(f"--{flag} is of predictions with and without prompt; {family.TITLE} predicts once")
        usual, why = family.usual_drawing(network)
        if usual["guidance_scale"] == 1 and "guidance_scale" in given:
            raise ValueError(f"--guidance_scale: {why}, and has no guidance; leave it out")
        usual = {name: value for name, value in usual.items() if name not in given}
        changed |= usual
        if usual:
            lines.append(f"{why}: {', '.join(f'--{name} {value}' for name, value in usual.items())}")
        if settings["enable_xformers_memory_efficient_attention"]:
            raise ValueError(
                f"--enable_xformers_memory_efficient_attention does not fit {family.TITLE}, whose queries and values "
                "differ in type; leave it out, torch's attention is as lean"
            )
    if settings["solver"] not in family.SOLVERS:
        if "solver" in given:
            raise ValueError(
                f"--solver {settings['solver']} does not fit {family.TITLE}; it takes {', '.join(family.SOLVERS)}"
            )
        changed["solver"] = family.SOLVERS[0]
        lines.append(f"{family.TITLE} learned by flow matching: --solver {family.SOLVERS[0]}")
    if settings["train_text_encoder"] and len(family.TEXTS) > 1:
        raise ValueError(
            f"--train_text_encoder trains the one text encoder of {stable_diffusion.TITLE}; {family.TITLE} has "
            f"{len(family.TEXTS)}; leave it out"
        )
    if of_flow and settings["mixed_precision"] == "fp16":
        lines.append(f"{family.TITLE} was trained in bfloat16: if something is not finite, use --mixed_precision bf16")
    if settings["snr_gamma"] is not None and of_flow:
        raise ValueError(f"--snr_gamma weighs steps of a noise schedule; {family.TITLE} has none; leave it out")
    if settings["fast_lora"] and family not in (stable_diffusion, sdxl):
        raise ValueError(
            f"--fast_lora is a LoRA of a U-Net, of {stable_diffusion.TITLE} or XL; {family.TITLE} has a transformer; "
            "leave it out"
        )
    return changed, lines


def check_steps(family, config, solver, steps):
    """ValueError for more steps than a solver takes."""
    try:
        # The size of the latents makes no difference.
        family.prepared_solver(solver, config, steps, (16, 64, 32))
    except ValueError as error:
        raise ValueError(f"--solver {solver} --num_inference_steps {steps}: {one_line(error)}") from error


def clip_tokenizers(family, name, revision):
    """The tokenizers of the CLIP text encoders: T5's splits rare words anyway."""
    parts = [part for part, _, encoder in family.TEXTS if encoder is not T5EncoderModel]
    return [load_tokenizer(name, revision, part) for part in parts]


def said_of_word(word, tokenizers):
    """A line if the rare word is several tokens of a tokenizer, else None; a new token is one."""
    if word.startswith("<") and word.endswith(">"):
        return None
    counts = [len(tokenizer(word, add_special_tokens=False).input_ids) for tokenizer in tokenizers]
    if max(counts) == 1:
        return None
    return f"--identity_token {word} is {max(counts)} tokens: a word of one token is learned more easily"
