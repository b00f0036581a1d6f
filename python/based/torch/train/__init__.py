"""Training of BASED language models: `based train CONFIG.yaml`, docs/training.md.

>>> result = train(read_config(Path("config.yaml")))
>>> based.load(result.model)
"""

from based.torch.train.config import Config, read_config
from based.torch.train.log import Meter
from based.torch.train.loop import Result, Stopped, train
from based.torch.train.world import is_first_process

__all__ = ["Config", "Meter", "Result", "Stopped", "is_first_process", "read_config", "train"]
