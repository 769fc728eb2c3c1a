"""CLIPBaseline, MERU and HyCoCLIP with linear encoders, and the published forward passes for one process."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import lorentz as L
from .lorentz import exp_map0

DIM = 16


class CLIPBaseline(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual, self.textual = nn.Linear(12, DIM), nn.Embedding(50, DIM)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, images, project):
        features = self.visual(images.flatten(1))
        return F.normalize(features, dim=-1) if project else features

    def encode_text(self, tokens, project):
        features = torch.stack([self.textual(ids).mean(0) for ids in tokens])
        return F.normalize(features, dim=-1) if project else features

    def forward(self, images, tokens):
        self.logit_scale.data.clamp_(max=4.6052)
        image, text = self.encode_image(images, project=True), self.encode_text(tokens, project=True)
        scale = self.logit_scale.exp()
        loss = (find(scale * image @ text.T) + find(scale * text @ image.T)) / 2
        return {"loss": loss, "logging": {"contrastive_loss": loss, "logit_scale": scale}}


class MERU(CLIPBaseline):
    def __init__(self, curv_init=1.0, entail_weight=0.2):
        super().__init__()
        self.curv = nn.Parameter(torch.tensor(math.log(curv_init)))
        self._curv_minmax = {"max": math.log(curv_init * 10), "min": math.log(curv_init / 10)}
        self.visual_alpha = nn.Parameter(torch.tensor(math.log(DIM**-0.5)))
        self.textual_alpha = nn.Parameter(torch.tensor(math.log(DIM**-0.5)))
        self.entail_weight = entail_weight

    def encode_image(self, images, project):
        features = super().encode_image(images, False)
        return L.exp_map0(features * self.visual_alpha.exp(), self.curv.exp()) if project else features

    def encode_text(self, tokens, project):
        features = super().encode_text(tokens, False)
        return exp_map0(features * self.textual_alpha.exp(), self.curv.exp()) if project else features

    def clamp(self):
        self.curv.data.clamp_(**self._curv_minmax)
        self.visual_alpha.data.clamp_(max=0.0)
        self.textual_alpha.data.clamp_(max=0.0)
        self.logit_scale.data.clamp_(max=4.6052)

    def output(self, contrastive, entailment):
        loss = contrastive + self.entail_weight * entailment
        logging = {"contrastive_loss": contrastive, "entailment_loss": entailment}
        return {"loss": loss, "logging": logging | {"logit_scale": self.logit_scale.exp(), "curv": self.curv.exp()}}

    def logits(self, x, y):
        return -self.logit_scale.exp() * L.pairwise_dist(x, y, self.curv.exp())

    def outside(self, apex, inside, width=1.0):
        angle = L.oxy_angle(apex, inside, self.curv.exp())
        return (angle - width * L.half_aperture(apex, self.curv.exp())).clamp(min=0).mean()

    def forward(self, images, tokens):
        self.clamp()
        image, text = self.encode_image(images, True), self.encode_text(tokens, True)
        contrastive = (find(self.logits(image, text)) + find(self.logits(text, image))) / 2
        return self.output(contrastive, self.outside(text, image))


class HyCoCLIP(MERU):
    def forward(self, images, box_images, tokens, box_tokens):
        self.clamp()
        image, box_image = self.encode_image(images, True), self.encode_image(box_images, True)
        text, box_text = self.encode_text(tokens, True), self.encode_text(box_tokens, True)
        contrastive = 0
        for query, gallery in ((image, text), (text, image), (box_image, text), (box_text, image)):
            contrastive = contrastive + find(self.logits(query, gallery)) / 4
        entailment = self.outside(text, image, 0.7) + self.outside(box_text, box_image, 0.7)
        entailment = entailment + self.outside(box_image, image, 1.2) + self.outside(box_text, text, 1.2)
        return self.output(contrastive, entailment / 2)


def find(logits):
    return F.cross_entropy(logits, torch.arange(len(logits)))
