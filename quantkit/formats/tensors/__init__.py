"""Formats whose weight becomes several tensors of a safetensors file, as transformers and vLLM load them."""

from quantkit.formats.tensors.base import TensorFormat, TensorLayout, get_tensor_format, tensor_formats

__all__ = ["TensorFormat", "TensorLayout", "get_tensor_format", "tensor_formats"]
