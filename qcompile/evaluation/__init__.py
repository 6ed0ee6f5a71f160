"""How well a model predicts text, and how far it is from another."""

from qcompile.evaluation.evaluate import Evaluation, evaluate
from qcompile.evaluation.models import LogitsModel, as_logits_model

__all__ = ["Evaluation", "LogitsModel", "as_logits_model", "evaluate"]
