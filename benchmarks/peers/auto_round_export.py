"""Runs inside AutoRound's environment: one GGUF of one mix, calibrated on the windows it is given.

    python auto_round_export.py MODEL WINDOWS.npy FORMAT ITERS SAMPLES PRE OUT_FOLDER

WINDOWS.npy holds token ids, int64 (n, window). FORMAT is AutoRound's name, for instance q4_k_m. ITERS 0 is its
search without tuning; above 0 its tuning with the algorithm meant for GGUF (``enable_alg_ext``). PRE is llama.cpp's
name of the pre-tokenizer: the converter inside AutoRound knows only hashes of published vocabularies.
"""

from __future__ import annotations

import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", AR_DISABLE_DATASET_SUBPROCESS="1")

import numpy as np
import torch


def name_pre_tokenizer(model: str, name: str) -> None:
    """Let the converter inside AutoRound write the name it cannot look up."""
    from auto_round.export.export_to_gguf.llama_cpp_conversion import get_conversion

    base = sys.modules[get_conversion(model).ModelBase.__module__]
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: name


def main() -> None:
    """Read the arguments, quantize, write the file into the folder."""
    model, windows, kind, iters, samples, pre, out = sys.argv[1:]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name_pre_tokenizer(model, pre)
    ids = torch.from_numpy(np.load(windows))[: int(samples)]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    loader = torch.utils.data.DataLoader(rows, batch_size=8, shuffle=False)
    tuning = {"enable_alg_ext": True} if int(iters) else {}
    rounder = AutoRound(
        AutoModelForCausalLM.from_pretrained(model, dtype="auto"), AutoTokenizer.from_pretrained(model),
        scheme=f"gguf:{kind}", iters=int(iters), dataset=loader, nsamples=len(rows), seqlen=ids.shape[1], batch_size=8,
        device_map="cpu", enable_torch_compile=False, **tuning,
    )  # fmt: skip
    rounder.quantize_and_save(out, format=f"gguf:{kind}")


if __name__ == "__main__":
    main()
