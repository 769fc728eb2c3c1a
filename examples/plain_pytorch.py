"""A hyperbolic image-text model in a plain PyTorch loop: handwritten digits, captions of two kinds, seconds on a CPU.

python examples/plain_pytorch.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from meru_fast import ops

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CAPTIONS = [f"the digit {name}" for name in NAMES] + ["a handwritten digit"]


class Encoders(nn.Module):
    """Stand-ins for two towers (a caption is its number), and MERU's learnable scalars, stored as logarithms."""

    def __init__(self, dim: int = 64):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, dim))
        self.text = nn.Embedding(len(CAPTIONS), dim)
        self.log_alpha = nn.Parameter(torch.full([2], dim**-0.5).log())
        self.log_curv = nn.Parameter(torch.zeros(1))
        self.log_scale = nn.Parameter(torch.full([1], 1 / 0.07).log())

    def forward(self, pixels: Tensor, captions: Tensor) -> tuple[Tensor, ...]:
        alphas, curv = self.log_alpha.clamp(max=0).exp(), self.log_curv.clamp(-2.3, 2.3).exp()
        return self.image(pixels), self.text(captions), *alphas, curv, self.log_scale.exp()


def main(steps: int = 400) -> None:
    torch.manual_seed(0)
    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
    model, pixels = Encoders(), pixels.float() / 16
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        batch = torch.randint(1400, (128,))
        vague = torch.rand(128) < 1 / 8  # one caption in eight says only that it is a digit
        captions = labels[batch].masked_fill(vague, len(NAMES))
        loss, contrastive, entailment = ops.meru_loss(*model(pixels[batch], captions), entail_weight=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:3d}  contrastive {contrastive:.3f}  entailment {entailment:.3f}")
    with torch.no_grad():
        image, text, image_alpha, text_alpha, curv, _ = model(pixels[1400:], torch.arange(len(CAPTIONS)))
        image, text = ops.exp_map0(image, curv, scale=image_alpha), ops.exp_map0(text, curv, scale=text_alpha)
        right = ops.pairwise_inner(image, text[:-1], curv).argmax(1) == labels[1400:]
        print(f"zero-shot accuracy {right.float().mean():.1%}")
        for what, points in (("images", image), ("'the digit ...'", text[:-1]), (CAPTIONS[-1], text[-1:])):
            print(f"distance from the root: {ops.log_map0(points, curv).norm(dim=-1).mean():.3f}  {what}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
