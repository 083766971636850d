"""The network's weights in 4 or 8 bits, for LoRA on small cards."""

import logging

import torch
from torch import nn

from utils.launch import bitsandbytes_module


def quantize(network, bits, dtype, device):
    """Replace the linear layers of the network's blocks by bitsandbytes' layers of `bits`, computing in `dtype`.

    Embeddings, norms, convolutions and the last layer stay as they are. Returns the network, on the device.
    """
    layers = bitsandbytes_module("--base_bits").nn
    # It warns of each layer at each step that 8 bits compute in float16 whatever the type of the input.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and in_a_block(name):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, quantized(layers, module, bits, dtype))
    # So that peft puts its own layers for them around.
    setattr(network, f"is_loaded_in_{bits}bit", True)
    return network.to(device)


def in_a_block(name):
    """Whether a layer of this name belongs to the blocks that a network is a stack of."""
    return any("blocks" in part or part == "mid_block" for part in name.split("."))


def quantized(layers, module, bits, dtype):
    has_bias, size = module.bias is not None, (module.in_features, module.out_features)
    weight = module.weight.detach().to(dtype)
    with torch.device("meta"):
        if bits == 4:
            layer = layers.Linear4bit(*size, bias=has_bias, compute_dtype=dtype, quant_type="nf4")
        else:
            # On a GPU activations have 8 bits too, but for columns with values beyond this.
            layer = layers.Linear8bitLt(*size, bias=has_bias, has_fp16_weights=False, threshold=6.0)
    if bits == 4:
        # On a CPU it would pack the weights when images are drawn, and have no gradient afterwards.
        layer.support_avx512bf16_for_cpu = False
        layer.weight = layers.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    else:
        layer.weight = layers.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    layer.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False) if has_bias else None
    return layer
