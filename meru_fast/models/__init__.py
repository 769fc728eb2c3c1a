"""Encoders and the two models, MERU and its CLIP baseline."""

from meru_fast.models.clip import CLIP
from meru_fast.models.meru import MERU
from meru_fast.models.text import TransformerTextEncoder
from meru_fast.models.vision import build_timm_vit

__all__ = ["CLIP", "MERU", "TransformerTextEncoder", "build_timm_vit"]
