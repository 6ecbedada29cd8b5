"""Models on disk: strict readers, streaming atomic writers, names and roles of tensors."""

from quantkit.checkpoint.gguf_checkpoint import GgufCheckpoint
from quantkit.checkpoint.huggingface import HfCheckpoint
from quantkit.checkpoint.opening import open_checkpoint, require_readable
from quantkit.checkpoint.roles import Role
from quantkit.checkpoint.source import Checkpoint, TensorInfo

__all__ = ["Checkpoint", "GgufCheckpoint", "HfCheckpoint", "Role", "TensorInfo", "open_checkpoint", "require_readable"]
