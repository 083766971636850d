"""Families of text-to-image models, one file each: all that fine-tuning and drawing must know about a model.

A family's file has TITLE; NETWORK, the class of what denoises, and PART, its folder; TEXTS, the folders of text
encoders and tokenizers; LORA_TARGETS; SOLVERS; GUIDED, whether two predictions are mixed by --guidance_scale;
VAE_OVERFLOWS_IN_FLOAT16. Its functions: `check` from configurations alone, `encode`, `unguided`, `schedule_of`,
`prepared_solver`; its `Denoiser` is called as Stable Diffusion's U-Net is. A condition is one tensor (B, T, width);
where there is a pooled vector too, it is the last row. For others: `family_of`.
"""

from utils import opened_when_used

__getattr__ = opened_when_used(__name__, {"kinds": "family_of"})
