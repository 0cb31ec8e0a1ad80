"""Verl's name for the settings in ``verl.config``; the YAML defaults lie here."""

from verl.config import *  # noqa: F403
