"""Typed settings of a run, one file a section; reads and writes no file."""

from verl.config.actor_rollout_ref import *  # noqa: F403
from verl.config.algorithm import *  # noqa: F403
from verl.config.data import *  # noqa: F403
from verl.config.model import *  # noqa: F403
from verl.config.ppo import *  # noqa: F403
from verl.config.trainer import *  # noqa: F403
