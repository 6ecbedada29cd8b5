"""Models on disk: strict readers, streaming atomic writers, names and roles of tensors."""

from quantkit.checkpoint.roles import Role
from quantkit.checkpoint.source import Checkpoint, GgufCheckpoint, HfCheckpoint, TensorInfo, open_checkpoint, require_readable

__all__ = ["Checkpoint", "GgufCheckpoint", "HfCheckpoint", "Role", "TensorInfo", "open_checkpoint", "require_readable"]
