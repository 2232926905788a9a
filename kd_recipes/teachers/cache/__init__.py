"""A teacher's signal on disk: written once, read by every distillation after."""

from kd_recipes.teachers.cache.encodings import Encoding, RandomSampling, TopK
from kd_recipes.teachers.cache.source import Cache, CachedTeacher

__all__ = ["Cache", "CachedTeacher", "Encoding", "RandomSampling", "TopK"]
