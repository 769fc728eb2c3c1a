"""From a picture of any size to the square of pixels that the encoder takes."""

from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

RESIZES = ("crop", "squeeze")


def check_resize(resize: str) -> str:
    """`resize`, if there is such a one. Raises ValueError otherwise."""
    if resize not in RESIZES:
        raise ValueError(f"resize must be one of {', '.join(RESIZES)}, got {resize!r}")
    return resize


class EvalTransform:
    """Picture -> uint8 [3, size, size]; the models take uint8 and scale it themselves.

    Args:
        size: side of the result in pixels.
        resize: "crop" resizes the shorter side to `size` and cuts out the centre (published for classification, the
            linear probe and traversals). "squeeze" resizes both sides to `size` and so changes the aspect ratio
            (published for retrieval). Both are bicubic, with antialiasing.

    Raises:
        ValueError: no such resize.
    """

    def __init__(self, size: int = 224, resize: str = "crop"):
        self.size = size
        self.resize = check_resize(resize)

    def __call__(self, image: Image.Image) -> Tensor:
        image = image.convert("RGB")
        target = self.size if self.resize == "crop" else [self.size, self.size]
        image = tvf.resize(image, target, interpolation=InterpolationMode.BICUBIC)
        return tvf.pil_to_tensor(tvf.center_crop(image, self.size))

    def __repr__(self) -> str:
        return f"{self.resize}{self.size}"
