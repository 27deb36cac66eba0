# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""LrcSSM for Hugging Face. Importing this package registers the model with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    AutoModelForTokenClassification,
)

from .cells import Cell, register_cell
from .configuration_lrcssm import LrcSSMConfig
from .modeling_lrcssm import (
    LrcSSMForCausalLM,
    LrcSSMForSequenceClassification,
    LrcSSMForSequenceModeling,
    LrcSSMModel,
    LrcSSMPreTrainedModel,
)
from .recurrence import LrcParameters, cell_scan, lrc_scan, lrc_step, prefix_scan
from .series import series_statistics
from .solvers import ScanInfo


AutoConfig.register("lrcssm", LrcSSMConfig)
AutoModel.register(LrcSSMConfig, LrcSSMModel)
AutoModelForCausalLM.register(LrcSSMConfig, LrcSSMForCausalLM)
AutoModelForSequenceClassification.register(LrcSSMConfig, LrcSSMForSequenceClassification)
AutoModelForTokenClassification.register(LrcSSMConfig, LrcSSMForSequenceModeling)
AutoModelForTimeSeriesPrediction.register(LrcSSMConfig, LrcSSMForSequenceModeling)

__version__ = "0.1.0"

__all__ = [
    "Cell",
    "LrcParameters",
    "LrcSSMConfig",
    "LrcSSMForCausalLM",
    "LrcSSMForSequenceClassification",
    "LrcSSMForSequenceModeling",
    "LrcSSMModel",
    "LrcSSMPreTrainedModel",
    "ScanInfo",
    "cell_scan",
    "lrc_scan",
    "lrc_step",
    "prefix_scan",
    "register_cell",
    "series_statistics",
]
