"""Verl's name for the workers' settings in ``verl.config``."""

from verl.config import *  # noqa: F403
from verl.config import __all__ as __all__
