"""A hyperbolic image-text model in a plain PyTorch loop: handwritten digits, captions of two kinds, seconds on a CPU.

python examples/plain_pytorch.py
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from meru_fast import ops

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORDS = {word: index for index, word in enumerate(["a", "handwritten", "digit", "the", *NAMES])}
GENERAL = "a handwritten digit"


class Encoders(nn.Module):
    """Two small towers with the learnable scalars of MERU, which are stored as logarithms."""

    def __init__(self, dim: int = 64):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, dim))
        self.text = nn.Sequential(nn.EmbeddingBag(len(WORDS), 256), nn.Linear(256, dim))
        self.log_alpha = nn.Parameter(torch.full([2], dim**-0.5).log())
        self.log_curv = nn.Parameter(torch.zeros(1))
        self.log_scale = nn.Parameter(torch.full([1], 1 / 0.07).log())

    def forward(self, pixels: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
        words = [[WORDS[word] for word in caption.split()] for caption in captions]
        offsets = torch.tensor([0, *map(len, words[:-1])]).cumsum(0)
        flat = torch.tensor([word for caption in words for word in caption])
        return self.image(pixels), self.text[1](self.text[0](flat, offsets))

    def loss(self, image: Tensor, text: Tensor, group=None) -> Tensor:
        alphas, curv = self.log_alpha.clamp(max=0).exp(), self.log_curv.clamp(-2.3, 2.3).exp()
        scale = self.log_scale.clamp(max=4.6).exp()
        return ops.meru_loss(image, text, alphas[0], alphas[1], curv, scale, entail_weight=0.2, group=group)[0]


def dataset() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    return torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)


def caption(label: int) -> str:
    """One caption in eight says only that it is a digit."""
    return GENERAL if torch.rand(()) < 1 / 8 else f"the digit {NAMES[label]}"


@torch.no_grad()
def report(model: Encoders, pixels: Tensor, labels: Tensor) -> None:
    captions = [f"the digit {name}" for name in NAMES] + [GENERAL]
    images, texts = model(pixels, captions)
    curv, alphas = model.log_curv.exp(), model.log_alpha.exp()
    images, texts = ops.exp_map0(images, curv, scale=alphas[0]), ops.exp_map0(texts, curv, scale=alphas[1])
    nearest = ops.pairwise_inner(images, texts[:-1], curv).argmax(1)
    print(f"zero-shot accuracy {(nearest == labels).float().mean():.1%}")
    for what, points in (("images", images), ("'the digit ...'", texts[:-1]), (f"'{GENERAL}'", texts[-1:])):
        print(f"distance from the root: {ops.log_map0(points, curv).norm(dim=-1).mean():.3f}  {what}")


def main(steps: int = 400) -> None:
    torch.manual_seed(0)
    pixels, labels = dataset()
    model = Encoders()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        batch = torch.randint(1400, (128,))
        loss = model.loss(*model(pixels[batch], [caption(label) for label in labels[batch].tolist()]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}  curvature {model.log_curv.exp().item():.3f}")
    report(model, pixels[1400:], labels[1400:])


if __name__ == "__main__":
    main()
