"""BASED language models in PyTorch, for training: docs/training.md. Needs the extra `train`.

>>> model = based.torch.BasedForCausalLM.load("path-or-hub-id")
>>> loss = model(input_ids, labels=input_ids)
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError('based.torch needs PyTorch, which is not installed: pip install "based[train]"') from error

from based.torch import ops
from based.torch.model import BasedForCausalLM, ForTrainer

__all__ = ["BasedForCausalLM", "ForTrainer", "ops"]
