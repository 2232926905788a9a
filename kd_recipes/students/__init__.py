"""Students: from a checkpoint to a trainable model."""

from kd_recipes.students.constraints import Constraints
from kd_recipes.students.student import Student

__all__ = ["Constraints", "Student"]
