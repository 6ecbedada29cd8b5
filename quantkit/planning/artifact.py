"""What the finished file will look like before it is written: metadata, tensor specs, exact size."""

from __future__ import annotations

from quantkit.checkpoint import Checkpoint
from quantkit.checkpoint import gguf_values as gv
from quantkit.checkpoint.gguf_writer import TensorSpec, file_bytes
from quantkit.encoders.stats import ActivationStats
from quantkit.formats import get_format
from quantkit.planning.plan import Plan
from quantkit.versions import DISTRIBUTION, package_versions

QUANTIZATION_VERSION = 2
HASH_BYTES = 16  # of each tensor's SHA-256, kept in the file itself
HASHES = "quantkit.tensor_sha256_128"
PLAN_NAME = "quantkit.plan"
VERSION_KEY = "quantkit.version"

# llama_ftype numbers: llama.cpp, include/llama.h. MXFP4 alone has none: MXFP4_MOE's, as in llama-quantize --pure.
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12,
    "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "Q2_K_S": 21,
    "IQ3_XS": 22, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28, "IQ2_M": 29, "IQ4_XS": 30,
    "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4_MOE": 38, "MXFP4": 38, "NVFP4": 39, "Q1_0": 40, "Q2_0": 41,
}  # fmt: skip


def tensor_specs(checkpoint: Checkpoint, plan: Plan) -> list[TensorSpec]:
    """Tensors of the output in file order."""
    return [TensorSpec(info.name, info.shape, get_format(plan.tensors[info.name].format)) for info in checkpoint.tensors.values()]


def output_metadata(checkpoint: Checkpoint, plan: Plan, stats: ActivationStats | None) -> gv.Metadata:
    """Metadata of the output; the place of the hashes is zeros of the right length."""
    out = checkpoint.metadata()
    out["general.quantization_version"] = gv.u32(QUANTIZATION_VERSION)
    out["general.file_type"] = gv.u32(FILE_TYPES.get(plan.label, 0))
    if stats is not None and plan.use_importance:
        out["quantize.imatrix.file"] = gv.string("imatrix.gguf")
        out["quantize.imatrix.dataset"] = gv.string(", ".join(stats.datasets))
        out["quantize.imatrix.entries_count"] = gv.u32(len(stats.tensors))
        out["quantize.imatrix.chunks_count"] = gv.u32(stats.chunks)
    out[VERSION_KEY] = gv.string(package_versions().get(DISTRIBUTION, "0"))
    out[PLAN_NAME] = gv.string(plan.name)
    out[HASHES] = gv.array(gv.U8, list(bytes(HASH_BYTES * len(checkpoint.tensors))))
    return out


def stock_bytes(checkpoint: Checkpoint, plan: Plan, stats: ActivationStats | None) -> int:
    """Size of the same tensors as llama-quantize would write them, without quantkit's own metadata."""
    metadata = output_metadata(checkpoint, plan, stats)
    plain = {key: value for key, value in metadata.items() if not key.startswith("quantkit.")}
    return file_bytes(plain, tensor_specs(checkpoint, plan))


def planned_bytes(checkpoint: Checkpoint, plan: Plan, stats: ActivationStats | None) -> int:
    """Exact size of the file that ``plan`` becomes."""
    return file_bytes(output_metadata(checkpoint, plan, stats), tensor_specs(checkpoint, plan))


def bits_per_weight(checkpoint: Checkpoint, plan: Plan) -> float:
    """8 × bytes of tensor data ÷ weights, as llama.cpp prints it."""
    return 8 * sum(spec.nbytes for spec in tensor_specs(checkpoint, plan)) / checkpoint.n_weights
