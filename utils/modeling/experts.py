"""META's network: one ResNet with norms of its own for each domain, gates between them, and a branch of all domains.

    head = ExpertsHead(backbone, domains=[120, 80, 95])    # identities of each domain; changes the backbone
    pooled = head.pool_of_domain(backbone, images, 1)      # in training: own expert, branch, mixture of the others
    pooled = head.pool(backbone, images)                   # in a test: mixture of all experts, branch

An expert is the whole ResNet with the BatchNorms of one domain. The branch shares the ResNet up to the first block of
its second-last stage, with BatchNorms of its own, and goes on with copies of the rest, in which the last stage has
instance norms. How far an image is from a domain, at each norm l of the domain's expert,

    E_l = sqrt(|mean of the domain - mean of the image|^2 + |std of the domain - std of the image|^2)

gives the domain's gate, Linear(Linear(E)); the softmax of the gates weighs the experts' maps.
"""

import copy

import torch
from torch import nn

from utils.modeling.backbones import ResNetBackbone
from utils.modeling.heads import GeM, classifier, tail
from utils.modeling.reid_model import BNNeck, HeadOutput

GATES = ("learned", "code")
GATE_WIDTH = 512


class ExpertNorm(nn.Module):
    """A BatchNorm of each domain, and one of the branch where it shares the layer; all start as copies."""

    def __init__(self, norm, count):
        super().__init__()
        self.norms = nn.ModuleList(copy.deepcopy(norm) for _ in range(count))
        self.active, self.gaps = 0, None

    def forward(self, maps):
        norm = self.norms[self.active]
        self.gaps = gaps(norm, maps)
        return norm(maps)


@torch.no_grad()
def gaps(norm, maps):
    """E_l of each image of (B, C, h, w): (B,); the variance of an image is the unbiased one."""
    dtype = torch.promote_types(norm.running_mean.dtype, torch.float32)
    with torch.autocast(maps.device.type, enabled=False):
        values = maps.to(dtype).flatten(2)
        mean = (norm.running_mean.to(dtype) - values.mean(2)).square().sum(1)
        deviation = (norm.running_var.to(dtype).sqrt() - values.var(2).sqrt()).square().sum(1)
        return (mean + deviation).sqrt()


class AsExpert(nn.Module):
    """A part of the network with the norms of one expert, also when it is computed again in the backward pass."""

    def __init__(self, part, expert):
        super().__init__()
        self.part, self.expert = part, expert

    def forward(self, maps):
        for norm in expert_norms(self.part):
            norm.active = self.expert
        return self.part(maps)


def expert_norms(module):
    return [part for part in module.modules() if isinstance(part, ExpertNorm)]


def taken_gaps(module):
    """E of the last images at every norm, which is then forgotten."""
    norms = expert_norms(module)
    found = [norm.gaps for norm in norms]
    for norm in norms:
        norm.gaps = None
    return found


def norm_places(module):
    """(owner, attribute, norm) of every BatchNorm2d."""
    return [
        (owner, name, norm)
        for owner in module.modules()
        for name, norm in owner.named_children()
        if isinstance(norm, nn.BatchNorm2d)
    ]


def with_instance_norms(module):
    """In place: instance norms that start with the scale and shift of the BatchNorms they replace."""
    for owner, name, norm in norm_places(module):
        instance = nn.InstanceNorm2d(norm.num_features, eps=norm.eps, affine=True).to(norm.weight.device)
        instance.load_state_dict({key: getattr(norm, key).detach().clone() for key in ("weight", "bias")})
        setattr(owner, name, instance)
    return module


def new_gate(num_norms):
    """Two linear layers with nothing between them, as in the authors' code."""
    layers = nn.Sequential(nn.Linear(num_norms, GATE_WIDTH), nn.Linear(GATE_WIDTH, 1))
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        nn.init.zeros_(layer.bias)
    return layers


class ExpertsHead(nn.Module):
    """Experts, branch, gates and necks. The test feature is that of the mixture beside that of the branch.

    `gate`: "learned" weighs all experts by their gates, as in the paper, and the mixture's neck has the averages of
    the mixtures in training. "code" is what the authors' code does in a test: the softmax of the sums of E, so that
    far domains weigh more, and a neck that has never seen an image.
    """

    def __init__(self, backbone, domains=(), gate="learned"):
        super().__init__()
        check_experts(backbone, domains, gate)
        self.domains, self.gate = list(domains), gate
        self.branch = copy.deepcopy(tail(backbone))
        with_instance_norms(self.branch[-1])
        for number, part in enumerate(self.parts(backbone)):
            for owner, name, norm in norm_places(part):
                # The branch shares the parts before its own.
                count = len(domains) + (number < self.num_shared(backbone))
                setattr(owner, name, ExpertNorm(norm, count))
        channels = backbone.num_features
        self.num_features = 2 * channels
        self.pooling = GeM()
        self.pooling.power.requires_grad_(False)
        # Of each expert, and of the branch.
        self.necks = nn.ModuleList(BNNeck(channels) for _ in range(len(domains) + 1))
        self.mixture_neck = BNNeck(channels)
        # No loss is behind it.
        self.mixture_neck.weight.requires_grad_(False)
        self.gates = nn.ModuleList(new_gate(len(expert_norms(backbone))) for _ in domains)
        self.classifiers = None

    def reset_classifiers(self, num_ids):
        """New classifiers, one of each domain's identities and one of all; 0 for none."""
        self.classifiers = None
        if num_ids and num_ids != sum(self.domains):
            raise ValueError(f"experts for {self.domains} identities of each domain cannot have {num_ids} classes")
        if num_ids:
            layers = [classifier(neck.num_features, count) for neck, count in zip(self.necks, self.sizes, strict=True)]
            self.classifiers = nn.ModuleList(layers).to(self.mixture_neck.weight.device)

    @property
    def sizes(self):
        return [*self.domains, sum(self.domains)]

    @staticmethod
    def parts(backbone):
        """The ResNet in the order of its parts: up to the last one that the branch shares, then the others."""
        *stages, parting, last = backbone.model.encoder.stages
        return [backbone.model.embedder, *stages, *parting.layers, last]

    @staticmethod
    def num_shared(backbone):
        return len(backbone.model.encoder.stages)

    def expert_map(self, backbone, images, expert):
        """The map of one expert, and E of each image: (B, C, h, w), (B, norms) float32."""
        maps = self.run(backbone, images, expert, self.parts(backbone))
        return maps, torch.stack(taken_gaps(backbone), dim=1)

    def branch_map(self, backbone, images):
        maps = self.run(backbone, images, len(self.domains), self.parts(backbone)[: self.num_shared(backbone)])
        # Of no use: the branch is of all domains.
        taken_gaps(backbone)
        return backbone.run(self.branch, maps)

    def run(self, backbone, images, expert, parts):
        maps = images.to(backbone.model.embedder.embedder.convolution.weight.dtype)
        for part in parts:
            maps = backbone.run(AsExpert(part, expert), maps)
        return maps

    def weights(self, distances, experts):
        """The share of each of some experts in the mixture: E of each, (B, norms) -> (B, experts)."""
        # In training the gates are learned for both rules.
        if self.gate == "code" and not self.training:
            return torch.stack([distance.sum(1) for distance in distances], dim=1).softmax(1)
        with torch.autocast(distances[0].device.type, enabled=False):
            scores = [
                self.gates[expert](one.to(self.gates[expert][0].weight.dtype))
                for expert, one in zip(experts, distances, strict=True)
            ]
            return torch.cat(scores, dim=1).softmax(1)

    def mixture(self, maps, distances, experts):
        """The weighted mean of the maps of some experts, which get no gradient: (B, C, h, w)."""
        shares = self.weights(distances, experts)[:, :, None, None, None]
        return sum(shares[:, place] * one.detach().to(shares.dtype) for place, one in enumerate(maps))

    def pool_of_domain(self, backbone, images, domain):
        """Features of own expert, branch and mixture of the other experts: (B, 3, C)."""
        others = [expert for expert in range(len(self.domains)) if expert != domain]
        with torch.no_grad():
            found = [self.expert_map(backbone, images, expert) for expert in others]
        own = self.expert_map(backbone, images, domain)[0]
        branch = self.branch_map(backbone, images)
        mixture = self.mixture([maps for maps, _ in found], [distances for _, distances in found], others)
        return torch.stack([self.pooling(maps) for maps in (own, branch, mixture)], dim=1)

    def feature_map(self, backbone, images):
        """The mixture of all experts."""
        experts = range(len(self.domains))
        found = [self.expert_map(backbone, images, expert) for expert in experts]
        return self.mixture([maps for maps, _ in found], [distances for _, distances in found], experts)

    def pool(self, backbone, images, rng=None):
        """Features of the mixture of all experts and of the branch: (B, 2, C)."""
        maps = self.feature_map(backbone, images), self.branch_map(backbone, images)
        return torch.stack([self.pooling(one) for one in maps], dim=1)

    def forward(self, pooled):
        mixture, branch = pooled.unbind(1)
        neck = self.mixture_neck
        if self.gate == "code":
            mixture = mixture.to(neck.weight.dtype) * (1 + neck.eps) ** -0.5
        else:
            mixture = neck(mixture)
        return HeadOutput([], [], torch.cat([mixture, self.necks[-1](branch)], dim=1))


def check_experts(backbone, domains, gate):
    """ValueError if a backbone cannot have experts."""
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(GATES)}, got {gate!r}")
    if len(domains) < 2:
        raise ValueError(f"experts are of two domains or more, got {len(domains)}")
    if type(backbone) is not ResNetBackbone or not norm_places(backbone):
        raise ValueError(f"experts need a plain ResNet, whose norms they have; this is a {backbone.config.model_type}")
    if len(backbone.model.encoder.stages) < 2:
        raise ValueError("the branch parts in the last stage but one, and this ResNet has one stage only")
    weight = next(backbone.parameters())
    was_training = backbone.training
    with torch.no_grad():
        image = torch.zeros(1, 3, *backbone.image_size, device=weight.device, dtype=weight.dtype)
        places = backbone.eval().feature_map(image)[0, 0].numel()
    backbone.train(was_training)
    if places < 2:
        raise ValueError(
            f"images of {' x '.join(map(str, backbone.image_size))} give this ResNet a map of one place, which has no "
            "variance for instance norms: use larger images"
        )
