"""The arithmetic of the formats, fast: tensors in, tensors out. Triton programs for a GPU (the only place that imports
triton), compiled loops and BLAS for the CPU, and the operators of torch around both."""
