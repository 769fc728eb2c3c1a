"""Search one's own captions: those nearest to a picture or a phrase, or the ladder of captions whose cones contain it.

python examples/caption_search.py runs/demo captions.txt --image photo.jpg
python examples/caption_search.py runs/demo captions.txt --text "a dog on a beach" --cones
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from meru_fast import ops
from meru_fast.checkpoint import CheckpointError, load_model
from meru_fast.evaluation.transforms import EvalTransform
from meru_fast.tokenizer import Tokenizer


def embed_query(model: nn.Module, picture: Image.Image | None, text: str | None) -> Tensor:
    if picture is None:
        return model.encode_text(Tokenizer()([text]))
    pixels = EvalTransform(model.visual.patch_embed.img_size[0])(picture)
    return model.encode_image(pixels[None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="of a MERU model: a run folder, an exported file, or a published .pth")
    parser.add_argument("captions", type=Path, help="text file, a caption a line")
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--image", type=Path)
    query.add_argument("--text")
    parser.add_argument("--cones", action="store_true", help="only captions whose cone contains the query")
    parser.add_argument("-k", type=int, default=5, help="how many (default: %(default)s)")
    args = parser.parse_args()
    try:
        captions = [line.strip() for line in args.captions.read_text().splitlines() if line.strip()]
        picture = Image.open(args.image) if args.image else None
        model, _ = load_model(args.checkpoint)
    except (CheckpointError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    if model.geometry != "lorentz":
        raise SystemExit(f"error: {args.checkpoint} is a CLIP model, and cones need a MERU model")

    with torch.inference_mode():
        curv = model.scalar("curv")
        batches = [model.encode_text(Tokenizer()(captions[i : i + 256])) for i in range(0, len(captions), 256)]
        point = embed_query(model, picture, args.text)
        cones = model.min_radius if args.cones else None
        _, nearest = ops.topk(point, torch.cat(batches), args.k, curv, entailment=cones)
    found = [captions[index] for index in nearest[0].tolist() if index >= 0]
    print("\n".join(found) if found else "no caption's cone contains it")


if __name__ == "__main__":
    main()
