"""The token of an identity, and all weights that are tuned to one identity after the other."""

from dataclasses import dataclass

import torch
from torch import nn

from utils.diffusion.text_to_image import TextToImage


class IdentityToken(nn.Module):
    """The embedding of new tokens, stored apart from the vocabulary, so that no other row is trained."""

    def __init__(self, text_encoder, first_id, noun_id):
        super().__init__()
        embedding = text_encoder.get_input_embeddings()
        self.first_id, self.noun_id, self.places = first_id, noun_id, None
        self.row = nn.Parameter(embedding.weight[noun_id].detach().float().clone())
        embedding.register_forward_pre_hook(self.find)
        embedding.register_forward_hook(self.put)

    def find(self, module, inputs):
        self.places = inputs[0] >= self.first_id
        return (inputs[0].masked_fill(self.places, self.noun_id),)

    def put(self, module, inputs, output):
        return torch.where(self.places[..., None], self.row.to(output.dtype), output)


@dataclass(frozen=True)
class Tunable:
    """The model, its trained `weights`, with the token's row if the token is new, and their initial values `start`."""

    model: TextToImage
    token: IdentityToken
    weights: list
    start: list

    @classmethod
    def of(cls, model, token, *, with_token):
        weights = model.trained_weights() + ([token.row] if with_token else [])
        # In the host's memory: a whole U-Net takes 3.2 GiB and is needed once for each identity.
        return cls(model, token, weights, [weight.detach().to("cpu", copy=True) for weight in weights])

    def restore(self):
        """Reset all trained weights to their initial values, in place."""
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.start)
