"""MUVA's first stage: a text of each identity and part, by learned words before CLIP's frozen text encoder."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, CLIPTextModelWithProjection, logging

from utils.diffusion.families.texts import check_vocabulary
from utils.files import one_line, write_together
from utils.modeling.networks import SHORT_NAMES
from utils.modeling.networks.part_tokens import PARTS

PROMPTS, LOG, BEGUN = "muva_prompts.safetensors", "muva_log.jsonl", "muva_begun.safetensors"
FORMAT = "diffreid muva prompts 1"
# In the words of the texts: the whole person and the parts.
GRAINS = ("person", *(f"{part} of a person" for part in PARTS))
BEFORE = "A photo of a"
NUM_WORDS = 4
# Epochs between two writes of what is learned; of it: the words and their moments in Adam.
KEPT_EVERY, STATE = 5, ("words", "exp_avg", "exp_avg_sq")
# The rate of the words rises in so many epochs from FIRST_RATE, then falls to LAST_RATE.
RISE, FIRST_RATE, LAST_RATE, DECAY = 5, 1e-5, 1e-6, 1e-4


class Texts(nn.Module):
    """CLIP's text encoder, frozen, with learned words of each identity: labels (B,) -> (B, grains * width)."""

    def __init__(self, name, num_ids, seed=0, grains=GRAINS):
        super().__init__()
        tokenizer, self.encoder = load_text_side(name)
        before, *afters = (tokenizer(text).input_ids for text in (BEFORE, *grains))
        embedding = self.encoder.text_model.embeddings.token_embedding.weight.detach()
        # Without the end of the first and the start of the others.
        self.register_buffer("before", embedding[before[:-1]].clone(), persistent=False)
        for grain, after in enumerate(afters):
            self.register_buffer(f"after_{grain}", embedding[after[1:]].clone(), persistent=False)
        # The same words, whatever else a training draws before.
        draw = torch.Generator().manual_seed(seed)
        words = torch.randn(num_ids, len(grains), NUM_WORDS, embedding.shape[1], generator=draw)
        self.words = nn.Parameter(0.002 * words)

    def forward(self, labels):
        return torch.cat([self.grain(labels, grain) for grain in range(self.words.shape[1])], dim=1)

    def grain(self, labels, grain):
        around = self.before, getattr(self, f"after_{grain}")
        before, after = (part.expand(len(labels), -1, -1) for part in around)
        tokens = torch.cat([before, self.words[labels, grain], after], dim=1)
        text, length = self.encoder.text_model, tokens.shape[1]
        hidden = tokens + text.embeddings.position_embedding.weight[:length]
        # Of the type of the tokens: torch reads a mask of another one wrongly.
        later = torch.full((1, 1, length, length), -torch.inf, dtype=tokens.dtype, device=tokens.device).triu(1)
        hidden = text.encoder(inputs_embeds=hidden, attention_mask=later).last_hidden_state
        # The end token.
        return self.encoder.text_projection(text.final_layer_norm(hidden[:, -1]))

    @torch.no_grad()
    def of_all(self, batch_size=64):
        labels = torch.arange(len(self.words), device=self.words.device)
        return torch.cat([self(part) for part in labels.split(batch_size)])


def load_text_side(name):
    """(tokenizer, text encoder) of a whole CLIP: a folder, a Hub id or a short name."""
    verbosity, name = logging.get_verbosity(), SHORT_NAMES.get(name, name)
    options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    # transformers would list the tensors of the image tower.
    logging.set_verbosity(logging.CRITICAL)
    try:
        encoder, report = CLIPTextModelWithProjection.from_pretrained(name, **options)
    except Exception as error:
        raise ValueError(f"the text encoder of {name!r} cannot be loaded: {one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{name!r} has no weights of a text encoder: {', '.join(missing[:3])} are missing")
    return load_tokenizer(name), encoder.requires_grad_(False).eval()


def load_tokenizer(name):
    name = SHORT_NAMES.get(name, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"the tokenizer of {name!r} cannot be loaded: {one_line(error)}") from error
    return check_vocabulary(tokenizer, name)


def rate_of(epoch, epochs, highest):
    """The rate of the prompts in an epoch, counted from 1."""
    if epoch < RISE:
        return FIRST_RATE + (highest - FIRST_RATE) * epoch / RISE
    return LAST_RATE + (highest - LAST_RATE) / 2 * (1 + math.cos(math.pi * epoch / epochs))


def text_loss(texts, centres, labels):
    """L_cmp: texts (B, D) raw, centres (N, D) of unit length."""
    return F.cross_entropy(F.normalize(texts, dim=1) @ centres.t(), labels)


class Begun:
    """What a first stage has learned so far, in the folder of the run, so that a killed one goes on.

    `settings` name all that it depends on; a file of others is not looked at.
    """

    def __init__(self, folder, settings, *, resume, writes):
        self.folder, self.settings, self.writes = Path(folder), settings, writes
        self.lines, self.tensors = [], None
        try:
            with safe_open(self.folder / BEGUN, "pt") as file:
                if resume and file.metadata()["settings"] == self.settings:
                    self.tensors = {name: file.get_tensor(name) for name in STATE}
                    self.lines = json.loads(file.metadata()["lines"])
        except (OSError, SafetensorError, KeyError, ValueError):
            self.tensors, self.lines = None, []

    @torch.no_grad()
    def restore(self, words, optimizer):
        """The epochs and steps that are done."""
        if self.tensors is None:
            return 0
        words.copy_(self.tensors["words"])
        moments = {name: self.tensors[name].to(words.device) for name in STATE[1:]}
        optimizer.state[words] = moments | {"step": torch.tensor(float(len(self.lines)))}
        return self.lines[-1]["epoch"]

    def keep(self, words, optimizer):
        if self.writes:
            tensors = {"words": words.detach()} | {name: optimizer.state[words][name] for name in STATE[1:]}
            tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            with write_together(self.folder) as part:
                save_file(tensors, part(BEGUN), metadata={"settings": self.settings, "lines": json.dumps(self.lines)})

    def end(self):
        if self.writes:
            (self.folder / BEGUN).unlink(missing_ok=True)


def learn_words(texts, centres, labels, sampler, *, epochs, rate, begun):
    """Learn `texts.words`; returns the lines of the log. `sampler` gives batches of image numbers."""
    words, lines = texts.words, begun.lines
    optimizer = torch.optim.Adam([words], lr=rate, weight_decay=DECAY)
    first = 1 + begun.restore(words, optimizer)
    for epoch in tqdm(range(first, epochs + 1), desc="prompts", unit="epoch"):
        optimizer.param_groups[0]["lr"] = now = rate_of(epoch, epochs, rate)
        losses = []
        for numbers in sampler.global_batches(epoch):
            # Several images of an identity have one text.
            distinct, places = labels[numbers].to(centres.device).unique(return_inverse=True)
            loss = text_loss(texts(distinct)[places], centres, distinct[places])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        for value in torch.stack(losses).tolist():
            lines.append({"step": len(lines) + 1, "epoch": epoch, "lr": now, "loss": value})
            if not math.isfinite(value):
                raise ValueError(f"the loss of the prompts is {value} at step {len(lines)}: lower --muva_rate")
        if epoch % KEPT_EVERY == 0:
            begun.keep(words, optimizer)
    return lines


def read_prompts(path):
    """{words, text_features, part_tokens, data} of a file of stage 1."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise ValueError("it has another format")
            tensors = {name: file.get_tensor(name) for name in ("words", "text_features", "part_tokens")}
            return tensors | {"data": json.loads(about["data"]), "settings": about.get("settings")}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"--muva_prompts {path} cannot be read: {one_line(error)}; give {PROMPTS} of a run with --encoder muva"
        ) from None


def check_prompts(path, given, backbone):
    for name, tensor, wanted in (
        ("part tokens", given["part_tokens"], tuple(backbone.model.part_tokens.shape)),
        ("texts", given["text_features"][:1], (1, backbone.num_features)),
    ):
        if tuple(tensor.shape) != wanted:
            sizes = (" x ".join(map(str, shape)) for shape in (tensor.shape, wanted))
            raise ValueError(
                f"--muva_prompts {path} has {name} of {next(sizes)}, and the encoder's are of {next(sizes)}: it is of "
                "another --backbone"
            )
