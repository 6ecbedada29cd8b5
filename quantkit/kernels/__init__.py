"""The arithmetic of the formats on a GPU: Triton programs, tensors in, tensors out. The only place that imports triton."""
