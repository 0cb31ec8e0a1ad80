"""kai-verl: on-policy distillation for models whose vocabulary extends their teacher's."""

import os
from typing import TYPE_CHECKING, Any

from verl.utils.import_utils import EXTERNAL_MODULES, import_external_modules

__version__ = "0.1.0"

if TYPE_CHECKING:
    from verl.protocol import DataProto

__all__ = ["DataProto", "__version__"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, and `--help` needs none of it: DataProto is loaded when it is first asked for.
    if name == "DataProto":
        from verl.protocol import DataProto

        return DataProto
    raise AttributeError(f"module 'verl' has no attribute {name!r}")


if os.environ.get(EXTERNAL_MODULES):
    import_external_modules()
