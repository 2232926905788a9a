"""Teachers: from a batch to a signal."""

from kd_recipes.teachers.cache import CachedTeacher, RandomSampling, TopK
from kd_recipes.teachers.mixture import Mixture
from kd_recipes.teachers.online import OnlineTeacher
from kd_recipes.teachers.remote import RemoteTeacher
from kd_recipes.teachers.teacher import Surroundings, Teacher, TeacherSource

__all__ = [
    "CachedTeacher",
    "Mixture",
    "OnlineTeacher",
    "RandomSampling",
    "RemoteTeacher",
    "Surroundings",
    "Teacher",
    "TeacherSource",
    "TopK",
]
