"""Runs inside GPTQModel's environment: every linear map packed as GGUF blocks.

    python gptqmodel_export.py MODEL TYPES.json OUT_FOLDER

TYPES.json maps module names to GPTQModel's names of types, for instance ``q4_k``. GPTQModel has no calibration for
these and writes its own safetensors checkpoint, not a GGUF file: peers.py puts the blocks into one.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1")

import torch


def main() -> None:
    """Read the arguments, pack, save GPTQModel's checkpoint into the folder."""
    model, types, out = sys.argv[1:]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    from gptqmodel import GPTQModel
    from gptqmodel.quantization.config import GGUFConfig

    wanted: dict[str, str] = json.loads(Path(types).read_text())
    usual = Counter(wanted.values()).most_common(1)[0][0]
    other = {
        f"+:^{re.escape(name)}$": {"bits": int(kind[1]), "format": f"q_{kind[3:]}"}
        for name, kind in wanted.items()
        if kind != usual
    }
    loaded = GPTQModel.load(model, GGUFConfig(bits=usual, dynamic=other or None))
    loaded.quantize()
    loaded.save(out)


if __name__ == "__main__":
    main()
