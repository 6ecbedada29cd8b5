"""A model in torch: transformers' modules with weights from any checkpoint or quantized file."""
