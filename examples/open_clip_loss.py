"""meru_fast's fused loss as open_clip's: the same value and gradients, without the batch x batch matrix.

python examples/open_clip_loss.py
"""

import argparse

import open_clip
import torch
from open_clip.loss import ClipLoss
from plain_pytorch import NAMES
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import interpolate

from meru_fast import ops


class FusedClipLoss(nn.Module):
    """Takes ClipLoss's place in open_clip's training loop."""

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, output_dict: bool = False
    ) -> Tensor | dict[str, Tensor]:
        loss = ops.contrastive_loss(image_features, text_features, 1.0, logit_scale, geometry="cosine")
        return {"contrastive_loss": loss} if output_dict else loss


def tiny_clip() -> open_clip.CLIP:
    """open_clip's architecture in a size for one CPU core."""
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2}
    text = {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    return open_clip.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text)


def main(steps: int = 60) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    labels = torch.tensor(digits.target)
    images = interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, size=32).expand(-1, 3, -1, -1)
    captions = open_clip.SimpleTokenizer(context_length=8)([f"the digit {name}" for name in NAMES])
    model, fused, theirs = tiny_clip(), FusedClipLoss(), ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    worst = 0.0
    for step in range(steps):
        batch = torch.randint(1400, (64,))
        image, text, scale = model(images[batch], captions[labels[batch]])[:3]
        loss = fused(image, text, scale)
        worst = max(worst, (loss - theirs(image, text, scale)).abs().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:2d}  loss {loss.item():.3f}")
    print(f"largest difference to open_clip's ClipLoss: {worst:.1e}")
    with torch.no_grad():
        scores = model.encode_image(images[1400:], normalize=True) @ model.encode_text(captions, normalize=True).T
    print(f"zero-shot accuracy {(scores.argmax(1) == labels[1400:]).float().mean():.1%}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
