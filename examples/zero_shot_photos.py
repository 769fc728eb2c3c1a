"""What is on my photos? Zero-shot classification with labels of your own.

python examples/zero_shot_photos.py runs/demo photos/*.jpg --labels "a dog" "a cat" "a beach"
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from meru_fast.checkpoint import CheckpointError, load_model
from meru_fast.evaluation.transforms import EvalTransform
from meru_fast.evaluation.zeroshot import class_embeddings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run folder, an exported file, or a published .pth")
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--labels", nargs="+", required=True, help="what may be on them")
    parser.add_argument("--prompts", nargs="+", default=["i took a picture : {}."], help="phrases with {} for a label")
    args = parser.parse_args()
    try:
        model, _ = load_model(args.checkpoint)
        transform = EvalTransform(model.visual.patch_embed.img_size[0])
        images = torch.stack([transform(Image.open(photo)) for photo in args.photos])
    except (CheckpointError, OSError) as error:
        raise SystemExit(f"error: {error}") from None

    with torch.inference_mode():
        labels = class_embeddings(model, args.labels, args.prompts)
        scores = model.similarity(model.encode_image(images), labels)
        shares = (scores * model.scalar("logit_scale")).softmax(-1)
    for photo, share in zip(args.photos, shares, strict=True):
        order = share.argsort(descending=True)[:3].tolist()
        print(f"{photo}: " + ", ".join(f"{args.labels[i]} ({share[i]:.0%})" for i in order))


if __name__ == "__main__":
    main()
