"""How our parameters appear in checkpoint files: names, stored shapes, number formats, scales.

One description serves reading, writing and counting. Two layouts: "transformers" has our names under `model.`, and for
every family but V4 it is also what the publisher uses; "deepseek" is V4 as published. Our routed experts are stacked;
files have them one by one, except plain V4 in transformers' names. Standard library only; opens no file.
"""

from daedal.layouts.piece import E8M0, FP4, FP4_GROUP, FP8, Piece, Place, Scale, scale_of
from daedal.layouts.recognition import detect, dspark_sign, has_drafting, is_beside, spellings
from daedal.layouts.tensors import (
    DEEPSEEK,
    LAYOUTS,
    TRANSFORMERS,
    choose,
    copies,
    empty_pieces,
    pieces,
    places,
    tensor_count,
)

__all__ = [
    "DEEPSEEK",
    "E8M0",
    "FP4",
    "FP4_GROUP",
    "FP8",
    "LAYOUTS",
    "TRANSFORMERS",
    "Piece",
    "Place",
    "Scale",
    "choose",
    "copies",
    "detect",
    "dspark_sign",
    "empty_pieces",
    "has_drafting",
    "is_beside",
    "pieces",
    "places",
    "scale_of",
    "spellings",
    "tensor_count",
]
