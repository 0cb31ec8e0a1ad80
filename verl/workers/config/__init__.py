"""Verl's name for the workers' settings in ``verl.config``."""

from verl.config import *  # noqa: F403
