"""Models at the published sizes, and one training step of DCAC, of the modules that `train_dcac.py` trains.

The ways of a step: `ours` (latents from the cache, activations kept), `outer` and `all` (activations computed twice,
as `--gradient_checkpointing` does), `compiled` (ours through torch.compile), and `paper` (the VAE encodes every image;
activations are kept, as in the released code). The size `block` is the first level of the real U-Net, two layers of
the real encoder, and the whole VAE.

The mode `lora-captions` is LoRA with prompts of 77 tokens and the gradient of L_ldm at the features scaled to 0.1 of
that of the other losses, as `--prompt_init captions --prompt_tokens all --ldm_balance 0.1` does.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPVisionConfig

from train_dcac import DCAC, Condition
from utils.diffusion.feedback import GradientBalance, gradients_at_features
from utils.diffusion.latents import encode, sample_latents
from utils.diffusion.schedule import NoiseSchedule
from utils.diffusion.unet import recompute_activations, set_unet_mode
from utils.modeling.backbones import backbone_from_config
from utils.modeling.memories import PrototypeMemory
from utils.modeling.reid_model import ReIDModel
from utils.standins import build
from utils.training.optimizer import build_optimizer

NUM_IDS, BATCH, RANK, TAU = 751, 64, 8, 0.6
IMAGE_SIZE, LATENT_SIZE, WIDTH = (256, 128), (4, 16, 16), 768
CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "image_size": 224,
    "projection_dim": 512,
}
UNET = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": WIDTH,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": LATENT_SIZE[0],
}
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
# Of the U-Net: which parts of it train.
MODES = ("frozen", "lora", "partial-1", "partial-2", "full")
# A mode of the U-Net, tokens of a prompt, and share of L_ldm in the gradient.
CAPTIONED = {"lora-captions": ("lora", 77, 0.1)}


@dataclass
class Size:
    """Configurations, pixels of encoder and VAE, identities, images a batch."""

    clip: dict
    unet: dict
    vae: dict
    image: tuple
    square: tuple
    num_ids: int
    batch: int


def sizes():
    level = UNET | {
        "block_out_channels": UNET["block_out_channels"][:1],
        "down_block_types": UNET["down_block_types"][:1],
        "up_block_types": UNET["up_block_types"][-1:],
    }
    small = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    small |= {"patch_size": 8, "image_size": 64, "projection_dim": 128}
    return {
        "paper": Size(CLIP, UNET, VAE, IMAGE_SIZE, (128, 128), NUM_IDS, BATCH),
        "block": Size(CLIP | {"num_hidden_layers": 2}, level, VAE, IMAGE_SIZE, (128, 128), NUM_IDS, 4),
        "tiny": Size(
            small, dict(build.build_unet().config), dict(build.build_vae().config), (128, 64), (128, 128), 128, 16
        ),
    }


class Step:
    """A step that is ready to run: a mode of the U-Net or of CAPTIONED, or "baseline", and a way."""

    def __init__(self, size, mode, way, *, batch, dtype=torch.float32, device="cpu"):
        self.way, self.dtype, self.device = way, dtype, torch.device(device)
        unet_mode, num_tokens, share = CAPTIONED.get(mode, (mode, 1, None))
        with torch.device(device):
            torch.manual_seed(0)
            balance = None if share is None else GradientBalance(share)
            encoder = ReIDModel(backbone_from_config(CLIPVisionConfig(**size.clip), size.image), size.num_ids)
            memory = PrototypeMemory(torch.randn(size.num_ids, encoder.num_features))
            condition = unet = schedule = self.vae = None
            scale = 2 ** (len(size.vae["block_out_channels"]) - 1)
            shape = (batch, size.vae["latent_channels"], *(side // scale for side in size.square))
            self.batch = {
                "images": torch.randn(batch, 3, *size.image),
                "labels": torch.arange(batch) // 4 % size.num_ids,
            }
            if mode != "baseline":
                width = size.unet["cross_attention_dim"]
                features = encoder.num_features
                condition = Condition(
                    "correlation",
                    "classifier",
                    "none",
                    num_ids=size.num_ids,
                    num_features=features,
                    width=width,
                    tau=TAU,
                    num_tokens=num_tokens,
                )
                unet = UNet2DConditionModel.from_config(size.unet)
                schedule = NoiseSchedule(SCHEDULE)
                if way == "paper":
                    self.vae = AutoencoderKL.from_config(size.vae).requires_grad_(False).eval()
                    for parameter in self.vae.parameters():
                        parameter.data = parameter.data.to(dtype)
                    self.batch["pictures"] = torch.rand(batch, 3, *size.square)
                self.batch |= {
                    "means": torch.randn(shape),
                    "stds": torch.rand(shape),
                    "drawn": torch.randn(shape),
                    "noise": torch.randn(shape),
                    "timesteps": torch.randint(1000, (batch,)),
                }
        if unet is not None:
            set_unet_mode(unet, unet_mode, rank=RANK, dtype=dtype)
            if self.device.type != "meta":
                unet.to(memory_format=torch.channels_last)
            if way in ("outer", "all"):
                recompute_activations(unet, way)
        self.model = DCAC(
            encoder,
            memory,
            condition,
            unet,
            schedule,
            ldm_weight=1.0,
            label_smoothing=0.1,
            pass_size=batch,
            balance=balance,
        ).train()
        if way == "all":
            encoder.enable_gradient_checkpointing()
        if way == "compiled":
            encoder.backbone.compile()
            if unet is not None:
                unet.compile()
        self.optimizer = None

    def prepare(self):
        """Build the optimiser over the parameters as they are now."""
        self.params = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer([{"params": self.params}], "adam", learning_rate=5e-6, weight_decay=1e-4)

    def run(self):
        """Do what `train_dcac.py` does with a batch, and return the loss."""
        batch = self.batch
        with self.autocast():
            loss, _, features, labels = self.model(batch["images"], batch["labels"], **self.diffusion())
        loss.backward()
        if self.model.balance is not None:
            self.balanced = self.model.balance.update(lambda gradients: gradients)
        nn.utils.clip_grad_norm_(self.params, float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.memory.update(features, labels)
        return loss.detach()

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()

    def diffusion(self):
        """Latents, noise and timesteps of the batch; nothing for the baseline."""
        batch = self.batch
        if self.model.unet is None:
            return {}
        mean, std = batch["means"], batch["stds"]
        if self.vae is not None:
            mean, std = encode(self.vae, batch["pictures"])
        latents = sample_latents(mean, std, batch["drawn"], 0.18215)
        return {"latents": latents, "noise": batch["noise"], "timesteps": batch["timesteps"]}

    def gradients(self):
        """How the gradients of L_ldm and of the other losses at the features compare, with the weights as they are."""
        batch = self.batch
        with self.autocast():
            with torch.no_grad():
                features = self.model.encoder.backbone(batch["images"])
            return gradients_at_features(self.model, features, batch["labels"], **self.diffusion())


def configurations(modes, ways):
    """(mode, way) of each step to measure, the baseline first."""
    return [("baseline", "ours"), *((mode, way) for mode in modes for way in ways)]
