"""DINO (Caron et al., 2021): a student agrees with its running mean about crops of one image, without labels.

p_teacher = softmax((g_teacher(whole) - centre) / t_teacher)
p_student = softmax(g_student(crop) / t_student)
L = mean over wholes and other crops of CE(p_teacher, p_student)

`pretrain_backbone.py --objective dino` trains with it, and `solider` on top of it.
"""

import torch
import torch.nn.functional as F
from torch import nn


class SelfDistillation(nn.Module):
    """DINO's student: backbone, head and prototypes; `forward` is the loss of a batch against a teacher's scores.

    Prototypes and what they are compared with have unit length, as in DINO with a last layer of norm 1.
    """

    def __init__(self, backbone, prototypes, width, student_temperature=0.1):
        super().__init__()
        self.backbone, self.student_temperature = backbone, student_temperature
        # 256 of 2048, as published: in fewer dimensions the scores of few prototypes differ enough.
        bottleneck = max(2, width // 8)
        # A ResNet's features are nearly the same for all images at first, and scores that are so stay so: where the
        # backbone has norms of the batch, the head has them too.
        normed = any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
        norms = [nn.BatchNorm1d(width) if normed else nn.Identity() for _ in range(2)]
        norms.append(nn.BatchNorm1d(bottleneck, affine=False) if normed else nn.Identity())
        self.head = nn.Sequential(
            *(nn.Linear(backbone.num_features, width, bias=not normed), norms[0], nn.GELU()),
            *(nn.Linear(width, width, bias=not normed), norms[1], nn.GELU()),
            *(nn.Linear(width, bottleneck, bias=not normed), norms[2]),
        )
        self.prototypes = nn.Linear(bottleneck, prototypes, bias=False)
        for layer in (*self.head, self.prototypes):
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.register_buffer("centre", torch.zeros(prototypes))

    def scores(self, crops, *weights):
        """Cosines with the prototypes: (B, crops, 3, H, W) -> (crops, B, prototypes) float32.

        `weights` are those of SOLIDER, one for each image, (B,).
        """
        weights = [one.repeat_interleave(crops.shape[1]) for one in weights]
        return self.scores_of(self.backbone(crops.flatten(0, 1), *weights), crops.shape[:2])

    def scores_of(self, features, shape):
        with torch.autocast(features.device.type, enabled=False):
            code = F.normalize(self.head(features.float()), dim=1)
            scores = F.linear(code, F.normalize(self.prototypes.weight, dim=1))
        return scores.unflatten(0, shape).transpose(0, 1)

    def forward(self, crops, teacher_scores, teacher_temperature):
        student = torch.cat([self.scores(crops["whole"]), self.scores(crops["parts"])])
        return self.loss_of(student, teacher_scores, teacher_temperature)

    def loss_of(self, student_scores, teacher_scores, teacher_temperature):
        with torch.autocast(student_scores.device.type, enabled=False):
            loss, entropy = distillation_loss(
                student_scores, teacher_scores, self.centre, self.student_temperature, teacher_temperature
            )
        return loss, {"loss": loss.detach(), "teacher_entropy": entropy}


def distillation_loss(student, teacher, centre, student_temperature, teacher_temperature):
    """Scores of the student's crops, whole ones first, and of the teacher's: loss, and mean entropy of the teacher."""
    wanted = ((teacher - centre) / teacher_temperature).softmax(-1)
    listed = (student / student_temperature).log_softmax(-1)
    # [teacher's crops, student's crops]: means over the batch; a crop is not compared with itself.
    losses = -torch.einsum("tbk,sbk->ts", wanted, listed) / wanted.shape[1]
    itself = torch.eye(*losses.shape, dtype=torch.bool, device=losses.device)
    loss = losses.masked_fill(itself, 0.0).sum() / (losses.numel() - len(losses))
    return loss, torch.special.entr(wanted).sum(-1).mean()
