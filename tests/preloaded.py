"""What the server of tests.runs imports, once, before it forks."""

import diffusers
import peft
import transformers

import adapt_reid
import evaluate
import filter_generated
import finetune_reid
import pretrain_backbone
import train_dcac
import train_dreambooth_reid

SCRIPTS = (
    adapt_reid, evaluate, filter_generated, finetune_reid, pretrain_backbone, train_dcac, train_dreambooth_reid
)  # fmt: skip
# These libraries load their classes when they are first asked for.
CLASSES = (
    *(peft.LoraConfig, diffusers.AutoencoderKL, diffusers.UNet2DConditionModel, diffusers.StableDiffusionPipeline),
    *(transformers.BertTokenizer, transformers.BlipForQuestionAnswering, transformers.CLIPTokenizer),
    *(transformers.CLIPModel, transformers.CLIPVisionModelWithProjection, transformers.ResNetModel),
    *(transformers.AutoImageProcessor, transformers.SwinModel),
)
