"""Many prompts on a cluster of Ray: `Completer` for Ray Data.

Needs the extra `ray`. Nothing else in the package imports this one, or Ray.
"""

try:
    import ray.data  # noqa: F401
except ImportError as error:
    raise ImportError(f'based.ray needs Ray ({error}): pip install "based[ray]" installs it') from error

from based.ray._data import Completer

__all__ = ["Completer"]
