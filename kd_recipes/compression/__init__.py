"""Make models smaller: steps from checkpoint to checkpoint, and constraints on a student in training."""

from kd_recipes.compression.budget import Budget
from kd_recipes.compression.checkpoint import HFCheckpoint, read_checkpoint, sections, write_checkpoint
from kd_recipes.compression.checkpointer import CompressedCheckpointer
from kd_recipes.compression.constraint import Constraint
from kd_recipes.compression.convert import form_of
from kd_recipes.compression.dense import ToDense
from kd_recipes.compression.depth import DepthPruning, block_influence, choose_blocks
from kd_recipes.compression.form import Form
from kd_recipes.compression.low_rank import LowRank, TensorDecomposition
from kd_recipes.compression.quantization import Quantization, QuantizationAwareTraining
from kd_recipes.compression.smoothing import Smoothing
from kd_recipes.compression.sparsity import GradualSparsity, KeepZeros, Sparsification
from kd_recipes.compression.step import Step
from kd_recipes.compression.stream import Stream, Text, cross_entropy
from kd_recipes.compression.torchao_tensors import to_torchao
from kd_recipes.compression.width import WidthPruning, choose_width

__all__ = [
    "Budget",
    "CompressedCheckpointer",
    "Constraint",
    "DepthPruning",
    "Form",
    "GradualSparsity",
    "HFCheckpoint",
    "KeepZeros",
    "LowRank",
    "Quantization",
    "QuantizationAwareTraining",
    "Smoothing",
    "Sparsification",
    "Step",
    "Stream",
    "TensorDecomposition",
    "Text",
    "ToDense",
    "WidthPruning",
    "block_influence",
    "choose_blocks",
    "choose_width",
    "cross_entropy",
    "form_of",
    "read_checkpoint",
    "sections",
    "to_torchao",
    "write_checkpoint",
]
