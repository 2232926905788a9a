"""Students: from a checkpoint to a trainable model."""

from kd_recipes.students.student import Student

__all__ = ["Student"]
