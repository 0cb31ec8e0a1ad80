"""The single controller on Ray: one actor per rank."""

from verl.single_controller.ray.base import RayClassWithInitArgs, RayWorkerGroup, create_colocated_worker_cls
from verl.single_controller.ray.resource_pool import RayResourcePool

__all__ = ["RayClassWithInitArgs", "RayResourcePool", "RayWorkerGroup", "create_colocated_worker_cls"]
