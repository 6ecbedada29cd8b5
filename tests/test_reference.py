"""The original kept small: what comes out of the file is what the whole distributions give; llama.cpp's files agree with it."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import subprocess

import numpy as np
import oracle
import pytest
import tiny
import torch

from quantkit.checkpoint import open_checkpoint
from quantkit.errors import CalibrationError, CheckpointError, OutputError
from quantkit.evaluation.breakdown import ExactWindow, judge
from quantkit.evaluation.compare import evaluation_windows
from quantkit.evaluation.llama_reference import (
    LlamaReference,
    is_llama_reference,
    llama_statistics,
    write_llama_reference,
)
from quantkit.evaluation.reference import (
    Reference,
    ReferenceKey,
    ReferenceWriter,
    StoredWindow,
    compress,
    is_reference,
    words_of,
)
from quantkit.evaluation.runners import LlamaRunner, TorchRunner
from quantkit.evaluation.texts import default_texts
from quantkit.metrics import TokenScores, kl_divergence_reference
from quantkit.modeling.text import TextEncoder
from quantkit.planning.standard import uniform_plan
from quantkit.quantizer.pipeline import run


def made_up(vocabulary: int, n: int, seed: int = 1):
    """Logits like a language model's: frequent tokens, some of them fitting, sure and unsure positions."""
    g = torch.Generator().manual_seed(seed)
    frequency = -torch.arange(1, vocabulary + 1).float().log()[torch.randperm(vocabulary, generator=g)]
    sureness = 0.35 + 0.8 * torch.rand(n, 1, generator=g)
    return (frequency + 2.5 * torch.randn(n, vocabulary, generator=g)) / sureness


def noisy(logits, size: float, seed: int = 2):
    """What rounding does: noise that is larger at unlikely tokens, and a less sure model."""
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    rarity = 1 - 0.15 * logits.log_softmax(-1)
    return logits * (1 - size / 5) + size / 3 * noise * rarity


def stored(logits, entries=256, window=0):
    following = np.zeros(len(logits), np.int64)
    return StoredWindow(**compress(logits, following, window, entries))


def other_position(logits):
    return logits.roll(1, 0)


def half_another(logits):
    return ((logits.softmax(-1) + logits.roll(1, 0).softmax(-1)) / 2).log()


WRECKED = {"another position's": other_position, "half of another": half_another}


@pytest.mark.parametrize("size", [0.01, 0.05, 0.2, 0.6, 1.5])
def test_divergence_of_a_large_vocabulary_comes_out_within_one_percent(size):
    original = made_up(32768, 510)
    candidate = noisy(original, size)
    exact = kl_divergence_reference(original.numpy(), candidate.numpy())
    parts = [stored(original[i : i + 255], window=i).divergence(candidate[i : i + 255]) for i in (0, 255)]
    kld, variance = (np.concatenate(column).astype(float) for column in zip(*parts, strict=True))
    assert 1e-5 < exact.mean() < 2
    assert kld.mean() == pytest.approx(exact.mean(), rel=0.01)
    assert abs(kld.mean() - exact.mean()) < 4 * np.sqrt(variance.sum()) / len(kld) < 0.02 * exact.mean()
    assert np.quantile(kld, 0.999) == pytest.approx(np.quantile(exact, 0.999), rel=0.05)


@pytest.mark.parametrize("wreck", WRECKED.values(), ids=WRECKED)
def test_a_wrecked_candidate_comes_out_within_one_percent_too(wreck):
    original = made_up(32768, 255)
    candidate = wreck(original)
    kld = stored(original).divergence(candidate).kld.astype(float)
    exact = kl_divergence_reference(original.numpy(), candidate.numpy())
    assert exact.mean() > 0.5 and kld.mean() == pytest.approx(exact.mean(), rel=0.01)


def test_the_estimate_has_no_bias_and_tells_its_error():
    original = made_up(300, 64)
    candidate = noisy(original, 0.3)
    exact = kl_divergence_reference(original.numpy(), candidate.numpy())
    parts = [stored(original, 24, window).divergence(candidate) for window in range(400)]
    kld, variance = (np.stack(column).astype(float) for column in zip(*parts, strict=True))
    error = kld - exact
    assert abs(error.mean()) < 4 * error.mean(1).std() / 20 and abs(error.mean()) < 0.003 * exact.mean()
    assert 0.3 < (error**2).mean() / variance.mean() < 1.1  # draws without repetition vary less than it says


def test_every_kept_token_below_the_threshold_is_a_fair_draw():
    logits = made_up(300, 8)
    p = logits.double().softmax(-1).numpy()
    counts, chances = np.zeros((8, 300)), None
    for window in range(2000):
        found = stored(logits, 24, window)
        for row in range(8):
            counts[row, found.ids[row].astype(int)] += 1
        chances = chances if chances is not None else np.minimum(1, p / (found.tail / (24 - found.head))[:, None])
    assert counts.sum() == 8 * 24 * 2000
    spread = np.sqrt(chances * (1 - chances) / 2000)
    assert (np.abs(counts / 2000 - chances) < 5 * spread + 3 / 2000).all()


def test_all_tokens_kept_is_exact():
    original = made_up(50, 20)
    candidate = noisy(original, 0.5)
    found = stored(original, 256).divergence(candidate)
    assert found.kld == pytest.approx(kl_divergence_reference(original.numpy(), candidate.numpy()), rel=1e-5, abs=1e-9)
    assert found.variance == pytest.approx(0, abs=1e-12)


def test_the_original_against_itself_has_no_divergence():
    original = made_up(5000, 100)
    assert stored(original).divergence(original).kld.max() < 1e-7


def test_impossible_tokens_and_a_sure_original_are_no_trouble():
    original = made_up(500, 6)
    original[:, 40:] = -torch.inf  # padding of the vocabulary
    original[0] = torch.full((500,), -300.0)
    original[0, 7] = 0.0
    candidate = noisy(original.clamp_min(-400), 0.3)
    candidate[:, 40:] = -torch.inf
    found = stored(original, 64).divergence(candidate)
    p, q = original.double().log_softmax(-1)[:, :40], candidate.double().log_softmax(-1)[:, :40]
    assert found.kld == pytest.approx((p.exp() * (p - q)).sum(-1).numpy(), rel=1e-4, abs=1e-7)


def test_logits_that_are_not_numbers_are_refused():
    logits = made_up(50, 3)
    logits[1, 4] = torch.nan
    with pytest.raises(CheckpointError, match="not numbers"):
        stored(logits)


WINDOW = 512


@pytest.fixture(scope="module")
def original():
    """(checkpoint, windows, key, its logits at the scored positions of each window)."""
    checkpoint = open_checkpoint(tiny.DENSE)
    windows = evaluation_windows(checkpoint, default_texts(), WINDOW, 8 * WINDOW)
    key = ReferenceKey.of(checkpoint, windows, [("excerpt", len(windows))], "torch")
    return checkpoint, windows, key, run_over(checkpoint, windows)


def run_over(checkpoint, windows):
    runner = TorchRunner(checkpoint)
    return [runner.logits(ids)[WINDOW // 2 : -1] for ids in windows]


def following(windows, index):
    return windows[index, WINDOW // 2 + 1 :]


def write(path, original, stop=None, **options):
    checkpoint, windows, key, logits = original
    with ReferenceWriter(path, key, windows, words_of(checkpoint), **options) as writer:
        for index in list(writer.missing):
            if index == stop:
                raise KeyboardInterrupt
            writer.add(index, logits[index])


@pytest.fixture(scope="module")
def kept(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "dense.reference"
    write(path, original)
    return path


def test_what_is_known_of_the_original_is_exact(original, kept):
    checkpoint, windows, key, logits = original
    found = Reference(kept)
    assert found.key == key and (found.windows == windows).all() and len(found) == len(windows)
    assert found.words == words_of(checkpoint) and found.share < 0.11 and is_reference(kept)
    for index in range(len(windows)):
        ours, exact = found.window(index), ExactWindow.of(logits[index], following(windows, index))
        assert (ours.top1 == exact.top1).all()
        for name in ("next_logp", "top1_logp", "entropy"):
            assert getattr(ours, name) == pytest.approx(getattr(exact, name), abs=3e-5), name


@pytest.mark.parametrize("fmt", ["Q8_0", "Q4_K", "Q2_K"])
def test_a_comparison_out_of_the_file_equals_the_whole_one(fmt, original, kept, tmp_path):
    checkpoint, windows, _, logits = original
    run(checkpoint, uniform_plan(checkpoint, fmt, None), tmp_path / "q.gguf")
    candidate = run_over(open_checkpoint(tmp_path / "q.gguf"), windows)
    found = Reference(kept)
    exact, ours = (
        TokenScores.join([judge(know(i), candidate[i], following(windows, i)).scores for i in range(len(windows))])
        for know in (lambda i: ExactWindow.of(logits[i], following(windows, i)), found.window)
    )
    assert ours.kld.astype(float).mean() == pytest.approx(exact.kld.astype(float).mean(), rel=0.005)
    assert np.quantile(ours.kld, 0.999) == pytest.approx(np.quantile(exact.kld, 0.999), rel=0.05)
    assert ours.reference_logp.mean() == pytest.approx(exact.reference_logp.mean(), rel=1e-6)
    assert (ours.same_top == exact.same_top).all() and (ours.logp == exact.logp).all()


def test_an_interrupted_run_goes_on_where_it_stopped(original, kept, tmp_path):
    checkpoint, windows, key, logits = original
    path = tmp_path / "x.reference"
    with pytest.raises(KeyboardInterrupt):
        write(path, original, stop=5)
    assert not path.exists()
    part = tmp_path / ".x.reference.part"
    raw = bytearray(part.read_bytes())
    entry = compress(logits[3], following(windows, 3), 3)["ids"].tobytes()
    raw[raw.index(entry)] ^= 1
    part.write_bytes(raw)
    with pytest.raises(ValueError, match="4 windows were not written"), ReferenceWriter(path, key, windows, words_of(checkpoint)) as writer:  # fmt: skip
        assert writer.missing == [3, 5, 6, 7]
    write(path, original)
    assert path.read_bytes() == kept.read_bytes() and not part.exists()


def test_two_runs_do_not_write_the_same_file(original, tmp_path):
    checkpoint, windows, key, _ = original
    ReferenceWriter(tmp_path / "x", key, windows, words_of(checkpoint))
    with pytest.raises(OutputError, match="being written by another process"):
        ReferenceWriter(tmp_path / "x", key, windows, words_of(checkpoint))


def test_what_another_run_left_is_not_overwritten(original, tmp_path):
    checkpoint, windows, key, _ = original
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x", original, stop=2)
    other = dataclasses.replace(key, window=256, text="0" * 64)
    with pytest.raises(CheckpointError, match=r"\.x\.part belongs to something else: .*window \(512 there, 256 here\)"):
        ReferenceWriter(tmp_path / "x", other, windows[:, :256], words_of(checkpoint))
    write(tmp_path / "x", original)


def test_a_file_is_never_replaced_unasked_and_a_full_disk_leaves_none(original, kept, tmp_path, monkeypatch):
    with pytest.raises(OutputError, match="exists"):
        write(kept, original)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="No space left"):
        write(tmp_path / "x", original)
    monkeypatch.undo()
    assert not (tmp_path / "x").exists()
    write(tmp_path / "x", original)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"identity": "f" * 16}, "the original"),
        ({"stamp": "f" * 16}, "the files of the original"),
        ({"tokenizer": "f" * 64}, "the tokenizer"),
        ({"vocabulary": 5}, "the vocabulary (4096 there, 5 here)"),
        ({"window": 256}, "the window (512 there, 256 here)"),
        ({"text": "f" * 64}, "the text"),
        ({"runtime": "llama"}, "the runtime (torch there, llama here)"),
    ],
)
def test_a_file_of_something_else_is_refused_by_name(change, said, original, kept):
    _, _, key, _ = original
    Reference(kept).key.require(dataclasses.replace(key, name="renamed"), kept.name)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        Reference(kept).key.require(dataclasses.replace(key, **change), kept.name)


def test_damaged_files_are_refused(kept, tmp_path):
    raw = kept.read_bytes()
    (tmp_path / "short").write_bytes(raw[:-100])
    (tmp_path / "weights").write_bytes((tiny.DENSE / "model.safetensors").read_bytes())
    (tmp_path / "none").write_bytes(b"x")
    for name in ("short", "weights", "none"):
        with pytest.raises(CheckpointError, match=f"{name} is not a stored reference"):
            Reference(tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot read"):
        Reference(tmp_path / "missing")
    flipped = bytearray(raw)
    flipped[raw.index(Reference(kept).window(6).ids.tobytes()) + 9] ^= 4
    (tmp_path / "flipped").write_bytes(flipped)
    found = Reference(tmp_path / "flipped")
    found.window(5)
    with pytest.raises(CheckpointError, match="damaged in window 6"):
        found.window(6)
    assert not is_reference(tmp_path / "weights") and not is_reference(tmp_path / "none") and not is_reference(tmp_path)


def test_a_text_shorter_than_a_window_is_refused(original, tmp_path):
    checkpoint, windows, _, _ = original
    with pytest.raises(CalibrationError, match="shorter than one window"):
        ReferenceKey.of(checkpoint, windows[:0], [], "torch")
    with pytest.raises(CalibrationError, match="shorter than one window"):
        write_llama_reference(tmp_path / "x.kld", windows[:0], 4096, [])


CHUNK = 128


def perplexity_tool(*arguments):
    """What llama-perplexity prints, on chunks of 128 tokens, without its shortcuts in attention."""
    tool = oracle.build_llama.cache_dir() / "runtime" / "llama-perplexity"
    if not tool.exists():
        oracle.missing(str(tool))
    plain = ["-c", CHUNK, "-b", CHUNK, "-ub", CHUNK, "-ctk", "f32", "-ctv", "f32", "-fa", "off", "-t", "2"]
    for _ in range(20):  # one time in ten it ends without its last lines
        done = subprocess.run([str(a) for a in (tool, *arguments, *plain)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        said = done.stdout + done.stderr
        if "Final estimate" in said or "Same top p:" in said:
            return said
    pytest.fail(f"llama-perplexity never came to its end: {said[-300:]}")


@pytest.fixture(scope="module")
def theirs(tiny_folder, tiny_gguf, tmp_path_factory):
    """(llama.cpp's file of a tiny model, the model, a Q4_0 of it, what llama.cpp says of that)."""
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        oracle.missing("llama-cpp-python")
    folder = tmp_path_factory.mktemp("theirs")
    checkpoint = open_checkpoint(tiny_folder("llama"))
    run(checkpoint, uniform_plan(checkpoint, "F32", None), folder / "f32.gguf")
    text = folder / "text.txt"
    text.write_text((tiny.EXAMPLES.parent / "text" / "tinystories.txt").read_text()[:6000])
    base, candidate = folder / "base.kld", tiny_gguf("llama", "Q4_0")
    perplexity_tool("-m", folder / "f32.gguf", "-f", text, "--kl-divergence-base", base)
    said = perplexity_tool("-m", candidate, "--kl-divergence-base", base, "--kl-divergence")
    return base, folder / "f32.gguf", candidate, said


def number(said: str, name: str) -> float:
    return float(re.search(re.escape(name) + r"\s*:\s*(-?[\d.]+)", said).group(1))


def llama_logits(path, windows):
    checkpoint = open_checkpoint(path)
    runner = LlamaRunner(checkpoint, CHUNK)
    out = [runner.logits(ids)[CHUNK // 2 : -1] for ids in windows]
    runner.close()
    return out


def agrees(found, said):
    """Their table and our numbers, each within a thousandth, or within the last digit that they print."""
    for name, ours, digits in (
        ("Mean    KLD", found.mean_kld, 6), ("Mean PPL(Q)", found.perplexity, 6), ("Mean PPL(base)", found.base_perplexity, 6),
        ("Maximum KLD", found.max_kld, 6), ("99.9%   KLD", found.p999_kld, 6), ("99.0%   KLD", found.p99_kld, 6),
        ("Median  KLD", found.median_kld, 6), ("Mean ln(PPL(Q)/PPL(base))", found.log_ratio, 6),
        ("RMS Δp", 100 * found.delta_p, 3), ("Same top p", 100 * found.same_top, 3),
    ):  # fmt: skip
        assert ours == pytest.approx(number(said, name), rel=1e-3, abs=10**-digits), name


def judged_like_llama(reference, logits):
    parts = [judge(reference.chunk(i), logits[i], reference.tokens[i, CHUNK // 2 + 1 :]).scores for i in range(len(reference))]
    return llama_statistics(TokenScores.join(parts))


def test_their_file_read_by_us_gives_their_numbers(theirs):
    base, model, candidate, said = theirs
    reference = LlamaReference(base)
    windows = reference.windows(TextEncoder(open_checkpoint(model)).bos)
    reference.require_vocabulary(4096, "candidate")
    assert len(reference) >= 8 and reference.window == CHUNK and is_llama_reference(base)
    found = judged_like_llama(reference, llama_logits(candidate, windows))
    assert found.tokens == len(reference) * (CHUNK // 2 - 1) and found.mean_kld > 0.01
    agrees(found, said)


def test_our_file_read_by_them_gives_the_same_numbers(theirs, tmp_path):
    base, model, candidate, said = theirs
    reference = LlamaReference(base)
    windows = reference.windows(TextEncoder(open_checkpoint(model)).bos)
    logits = llama_logits(model, windows)
    write_llama_reference(tmp_path / "ours.kld", reference.tokens, 4096, logits)
    ours = LlamaReference(tmp_path / "ours.kld")
    assert (tmp_path / "ours.kld").stat().st_size == base.stat().st_size
    assert np.abs(ours.chunk(3).logp - reference.chunk(3).logp).max() < 1e-3
    told = perplexity_tool("-m", candidate, "--kl-divergence-base", tmp_path / "ours.kld", "--kl-divergence")
    for name in ("Mean    KLD", "Mean PPL(Q)", "Mean PPL(base)", "99.9%   KLD"):
        assert number(told, name) == pytest.approx(number(said, name), rel=1e-3)
    exact = [
        judge(ExactWindow.of(p, w[CHUNK // 2 + 1 :]), q, w[CHUNK // 2 + 1 :]).scores
        for p, q, w in zip(logits, llama_logits(candidate, windows), reference.tokens, strict=True)
    ]
    assert TokenScores.join(exact).kld.mean() == pytest.approx(number(said, "Mean    KLD"), rel=0.01)


def test_their_rounding_and_floor_are_kept(tmp_path):
    logits = made_up(4097, 7) * 2  # an odd vocabulary, log-probabilities far below −16
    tokens = np.arange(16)[None]
    write_llama_reference(tmp_path / "x.kld", tokens, 4097, [logits])
    found = LlamaReference(tmp_path / "x.kld").chunk(0)
    exact = logits.double().log_softmax(-1).numpy()
    highest = exact.max(-1, keepdims=True)
    assert (exact < highest - 17).any()
    assert found.logp == pytest.approx(np.maximum(exact, highest - 16), abs=16 / 65535)
    assert (found.top1 == exact.argmax(-1)).all() and (found.following == np.arange(9, 16)).all()


def test_their_files_are_refused_when_they_are_not_whole(theirs, tmp_path):
    base, *_ = theirs
    raw = base.read_bytes()
    chunks = len(LlamaReference(base))
    for name, data, said in (
        ("short", raw[:-7], f"holds {chunks - 1} of {chunks} chunks"),
        ("head", raw[:18], "does not hold llama.cpp's log-probabilities"),
        ("tokens", raw[:100], f"holds 0 of {chunks} chunks"),
        ("long", raw + b"x", "is longer than its chunks"),
        ("other", b"_LOGITS_" + raw[8:], "does not hold llama.cpp's log-probabilities"),
        ("zero", raw[:16] + b"\0" * 4 + raw[20:], "says 0 chunks"),
        ("token", raw[:20] + b"\xff\xff\xff\x7f" + raw[24:], "token ids outside its vocabulary"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=said):
            LlamaReference(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"small\.gguf has 512 tokens, base\.kld was made with 4096"):
        LlamaReference(base).require_vocabulary(512, "small.gguf")
    with pytest.raises(CheckpointError, match="cannot read"):
        LlamaReference(tmp_path / "missing")
    assert not is_llama_reference(tmp_path / "missing")
