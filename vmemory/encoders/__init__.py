"""Small encoders with weights from Python packages: visual tokens, sentence vectors, and a joint space."""

from vmemory.encoders.assets import AssetError
from vmemory.encoders.conse import center, class_vectors, conse_embedding, imagenet_classes
from vmemory.encoders.efficientnet import EfficientNetLite, preprocess
from vmemory.encoders.frames import Concept, FrameEncoder
from vmemory.encoders.minilm import SentenceEncoder

__all__ = [
    "AssetError",
    "Concept",
    "EfficientNetLite",
    "FrameEncoder",
    "SentenceEncoder",
    "center",
    "class_vectors",
    "conse_embedding",
    "imagenet_classes",
    "preprocess",
]
