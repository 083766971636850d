"""A memory of source identities and target images, whose classes are the means of their rows."""

import torch
import torch.nn.functional as F

from utils.modeling.memories import PrototypeMemory


class HybridMemory(PrototypeMemory):
    """A row of each source identity and of each target image, and a label of each row, from 0.

    A label's prototype is the mean of its rows, not normalised: `loss = CE(u means^T / temperature)`. In the update
    the images of the batch move their own rows, one after the other. `floor` is added to the probability before its
    logarithm: the loss of an image is then at most -log(floor), and such an image has hardly a gradient.
    """

    def __init__(self, rows, temperature=0.05, momentum=0.2, floor=0.0):
        super().__init__(rows, temperature, momentum)
        self.floor = floor
        self.register_buffer("labels", torch.arange(len(rows)))

    def forward(self, features, rows):
        with torch.autocast(features.device.type, enabled=False):
            sums, counts = self.sums()
            # A label without rows is not a class.
            empty = counts == 0
            means = sums / counts.clamp(min=1)[:, None]
            logits = F.normalize(features.float(), dim=1) @ means.t() / self.temperature
            logits = logits.masked_fill(empty, -torch.inf)
            if not self.floor:
                return F.cross_entropy(logits, self.labels[rows])
            return F.nll_loss((logits.softmax(1) + self.floor).log(), self.labels[rows])

    @torch.no_grad()
    def sums(self):
        """For each label: the sum of its rows and the number of its rows."""
        sums = torch.zeros_like(self.prototypes).index_add_(0, self.labels, self.prototypes)
        return sums, self.labels.bincount(minlength=len(sums)).to(sums.dtype)

    @torch.no_grad()
    def update(self, features, rows):
        with torch.autocast(features.device.type, enabled=False):
            move_in_turn(self.prototypes, rows, F.normalize(features.float(), dim=1), self.momentum)


def move_in_turn(memory, rows, unit, momentum):
    """In place: `memory[row] <- momentum memory[row] + (1 - momentum) u`, unit length, one image after the other."""
    # [B, B]: how many earlier images of the batch move the same row.
    turn = (rows[:, None] == rows[None, :]).tril(-1).sum(1)
    for number in range(int(turn.max()) + 1):
        now = turn == number
        memory[rows[now]] = F.normalize(torch.lerp(unit[now], memory[rows[now]], momentum), dim=1)
