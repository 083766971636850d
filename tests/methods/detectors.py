"""Tiny open-vocabulary detectors with random weights, as transformers folders."""

import torch
import transformers
from transformers import AutoTokenizer


def save_detector(kind, clip, folder):
    torch.manual_seed(0)
    {"owlv2": owlv2, "grounding-dino": grounding_dino}[kind](clip, folder)


def owlv2(clip, folder):
    tokenizer = AutoTokenizer.from_pretrained(clip, trust_remote_code=False)
    tokenizer.model_max_length = 16
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**sizes, **ends, "vocab_size": len(tokenizer) + 1, "max_position_embeddings": 16}
    vision = {**sizes, "image_size": 64, "patch_size": 16}
    config = transformers.Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
    transformers.Owlv2ForObjectDetection(config).save_pretrained(folder)
    images = transformers.Owlv2ImageProcessor(size={"height": 64, "width": 64})
    transformers.Owlv2Processor(images, tokenizer).save_pretrained(folder)


def grounding_dino(clip, folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "head", "of", "person", "upper", "body"]
    words += ["legs", "."]
    tokenizer = transformers.BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})
    backbone = transformers.SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_indices=[2, 3, 4], image_size=64
    )
    text = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.GroundingDinoConfig(
        backbone_config=backbone,
        text_config=text | {"intermediate_size": 32, "vocab_size": len(words)},
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
        num_feature_levels=4,
        max_text_len=16,
    )
    transformers.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    images = transformers.GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    transformers.GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)
