"""One model card for a repository of many files: of one base only, measured alike, each name in its place."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from test_card import NONE, card_of, front, rewritten

from quantkit.analysis.imatrix import write_imatrix
from quantkit.api import quantize
from quantkit.checkpoint import gguf_values as gv
from quantkit.checkpoint import open_checkpoint
from quantkit.checkpoint.adapter import write_adapter
from quantkit.encoders.stats import ActivationStats, TensorStats
from quantkit.errors import OutputError, PlanError
from quantkit.evaluation.board import Board, Hardware, Row, best_for_size
from quantkit.evaluation.card.card import CardOptions, write_card
from quantkit.evaluation.card.collection import read_collection
from quantkit.metrics import Divergence
from quantkit.planning.standard import uniform_plan
from quantkit.quantizer.manifest import Manifest, manifest_path
from quantkit.quantizer.pipeline import run


@pytest.fixture
def repository(tiny_gguf, tmp_path):
    """A folder with three quantized files of one model, with their manifests, an imatrix and an adapter."""
    out = tmp_path / "repository"
    out.mkdir()
    for fmt in ("Q4_0", "Q5_0", "Q8_0"):
        source = tiny_gguf("llama", fmt)
        shutil.copy(source, out / source.name)
        shutil.copy(manifest_path(source), out / manifest_path(source).name)
    name, (rows, columns) = "blk.0.attn_q.weight", open_checkpoint(out / "llama-Q4_0.gguf").info("blk.0.attn_q.weight").shape
    one = TensorStats(np.ones((1, columns), np.float32), np.ones(1, np.float32))
    write_imatrix(out / "imatrix.gguf", ActivationStats({name: one}, ("a|b.txt",)))
    write_adapter(out / "adapter.gguf", "llama", {name: (np.ones((4, columns), np.float32), np.ones((rows, 4), np.float32))})
    return out


def measured(path, kld: float, **changes) -> Row:
    """A row of a board about a file, of a comparison that was not run."""
    divergence = Divergence(2040, kld, kld / 50, kld / 2, 0.1, 0.2, 0.3, 20.0, 19.0, 1.05, 0.01, 0.9, 0.02)
    made = Row(
        reference="llama", reference_identity="r" * 16, reference_bytes=5000, architecture="llama", texts=("wiki.txt",),
        text_identity="t" * 64, window=512, tokens=2040, runtime="torch", device="cpu", name=path.name, identity="", sha256=None,
        file_bytes=path.stat().st_size, bpw=4.5, divergence=divergence, estimate_error=0.0, predicted_kld=None,
        versions={"quantkit-llm": "0.1.0"}, commit=None, hardware=Hardware("a processor", None), date="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    return replace(made, sha256=Manifest.read(manifest_path(path)).file_sha256, **changes)


def boarded(path, *rows: Row):
    """A board of rows."""
    path.write_text(Board(rows).to_json())
    return path


def lines_of(text: str) -> dict[str, list[str]]:
    """The table of all files: its cells by the name in the link, in the order of the card."""
    rows = re.findall(r"^\| \[(.*?)\]\([^)]*\)(.*) \|$", text.split("## How to run it")[0], re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split(" | ")[1:]] for name, cells in rows}


def test_a_card_of_many_files_has_a_row_for_each_and_its_fields_once(repository, tmp_path):
    files = sorted(repository.glob("*.gguf"))
    q4, q5, q8 = (repository / f"llama-{fmt}.gguf" for fmt in ("Q4_0", "Q5_0", "Q8_0"))
    board = boarded(tmp_path / "board.json", measured(q4, 0.5), measured(q8, 0.004))
    out, card = write_card(files, None, CardOptions(base_model="org/tiny", board=board))
    assert out == repository / "README.md" and "# tiny, quantized\n" in card.text
    assert front(card.text) == {
        "base_model": "org/tiny", "base_model_relation": "quantized", "library_name": "gguf",
        "tags": ["gguf", "quantized", "llama", "quantkit"],
    }  # fmt: skip
    rows = lines_of(card.text)
    assert list(rows) == [q8.name, q5.name, q4.name, "adapter.gguf", "imatrix.gguf"]
    assert rows[q4.name] == ["Q4_0", f"{q4.stat().st_size:,}", f"{Manifest.read(manifest_path(q4)).bpw:.3f}",
                             "0.50000 ± 0.01000", "1.0500 ± 0.0100", "90.00 %"]  # fmt: skip
    assert rows[q5.name][3:] == ["–", "–", "–"] and rows[q8.name][3] == "0.00400 ± 0.00008"
    assert rows["adapter.gguf"][0] == "LoRA adapter of rank 4 for 1 tensor" and rows["adapter.gguf"][2:] == ["–"] * 4
    assert rows["imatrix.gguf"][0] == r"activation statistics (imatrix) of 1 tensor from a\|b.txt"
    assert any(f"no numbers of {q5.name}" in note for note in card.notes) and "not measured in this setting" in card.text
    for path in (q4, q5, q8):
        assert card.text.count(f"<summary>{path.name}: ") == 1 and Manifest.read(manifest_path(path)).file_sha256 in card.text
        assert f"--no-imatrix -o {path.name}" in card.text
    assert "<details open>" not in card.text and "<details open>" in card_of(q4).text


@pytest.mark.parametrize(
    "klds", [(0.5, 0.1, 0.004), (0.1, 0.5, 0.004), (0.1, 0.2, 0.3), (0.1, 0.1, 0.1), (float("nan"), 0.2, 0.1)]
)
def test_the_choice_is_what_the_board_calls_best_for_its_size(klds, repository, tmp_path):
    files = [repository / f"llama-{fmt}.gguf" for fmt in ("Q4_0", "Q5_0", "Q8_0")]
    rows = [measured(path, kld) for path, kld in zip(files, klds, strict=True)]
    text = card_of(*files, options=CardOptions(board=boarded(tmp_path / "board.json", *rows))).text
    (line,) = re.findall(r"^\*\*Which to choose:\*\* (.*)$", text, re.MULTILINE)
    assert re.findall(r"\[([^]]*)\]\(", line) == [row.name for row in best_for_size(rows)]


def test_there_is_no_choice_without_two_measured_files(repository, tmp_path):
    files = sorted(repository.glob("llama-*.gguf"))
    board = boarded(tmp_path / "board.json", measured(files[0], 0.5))
    assert "Which to choose" not in card_of(*files, options=CardOptions(board=board)).text
    unmeasured = card_of(*files).text
    assert "Which to choose" not in unmeasured and "\nNot measured.\n" in unmeasured and "nats" not in unmeasured


def test_only_numbers_of_one_setting_stand_in_the_table(repository, tmp_path):
    q4, q5, q8 = (repository / f"llama-{fmt}.gguf" for fmt in ("Q4_0", "Q5_0", "Q8_0"))
    other = {"text_identity": "u" * 64, "texts": ("other.txt",)}
    board = boarded(tmp_path / "board.json", measured(q4, 0.5), measured(q8, 0.004), measured(q5, 0.3, **other), measured(q4, 0.7, **other))  # fmt: skip
    rows = [measured(q4, 0.5), measured(q8, 0.004)]
    card = card_of(q4, q5, q8, options=CardOptions(board=board))
    assert {name: cells[3] for name, cells in lines_of(card.text).items()} == {
        q4.name: "0.50000 ± 0.01000", q5.name: "–", q8.name: "0.00400 ± 0.00008",
    }  # fmt: skip
    details = card.text.split("## Each file")[1]
    assert "0.30000 ± 0.00600" in details and "0.70000" in details and any("another setting" in note for note in card.notes)
    choice = re.search(r"Which to choose:.*", card.text)[0]
    assert q5.name not in choice and all(row.name in choice for row in best_for_size(rows))


def test_files_of_another_base_are_refused_by_name(repository, tiny_gguf, tiny_folder, tmp_path):
    import tiny

    q4 = repository / "llama-Q4_0.gguf"
    other = tiny.build("llama", tmp_path / "elsewhere", hidden_size=128)
    run(checkpoint := open_checkpoint(other), uniform_plan(checkpoint, "Q8_0", None), repository / "small.gguf")
    for path, why in ((tiny_gguf("qwen3", "Q8_0"), "architecture qwen3, not llama"), (repository / "small.gguf", r"is \[")):
        with pytest.raises(PlanError, match=rf"is of another base than .*{why}") as caught:
            write_card([q4, path], tmp_path / "README.md", NONE)
        assert path.name in str(caught.value) and not (tmp_path / "README.md").exists()


def test_the_original_in_the_manifest_decides_but_rescaled_weights_are_of_the_same_base(repository, tmp_path):
    q4, q8 = repository / "llama-Q4_0.gguf", repository / "llama-Q8_0.gguf"
    sidecar = manifest_path(q8)
    data = json.loads(sidecar.read_text())
    data["source"]["identity"] = "f" * 16  # rescaled
    sidecar.write_text(json.dumps(data))
    assert len(read_collection([q4, q8]).members) == 2
    data["source"]["original"] = "f" * 16
    sidecar.write_text(json.dumps(data))
    refused = r"llama-Q8_0.gguf is of another base than llama-Q4_0.gguf: made from llama \(ffff.*, not llama \("
    with pytest.raises(PlanError, match=refused):
        read_collection([q4, q8])
    del data["source"]["original"]  # as an older quantkit wrote it
    sidecar.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=refused):
        read_collection([q4, q8])
    data["plan"]["name"] = "dynamic-8.50bpw"
    sidecar.write_text(json.dumps(data))
    assert lines_of(card_of(q4, q8).text)[q8.name][0] == "dynamic-8.50bpw"
    data["source"]["name"] = "another"
    sidecar.write_text(json.dumps(data))
    with pytest.raises(PlanError, match="made from another"):
        read_collection([q4, q8])


@pytest.mark.parametrize(
    ("key", "first", "second", "words"),
    [("general__source__repo_url", "org/one", "org/two", "another base than .* org/two, not org/one"),
     ("general__license", "mit", "apache-2.0", "has the license apache-2.0, .* mit")],
)  # fmt: skip
def test_files_whose_metadata_disagree_are_refused_until_it_is_said(key, first, second, words, repository, tmp_path):
    files = [
        rewritten(repository / "llama-Q4_0.gguf", tmp_path / f"{n}.gguf", **{key: gv.string(said)})
        for n, said in enumerate((first, second))
    ]
    with pytest.raises(PlanError, match=words):
        card_of(*files)
    said = front(card_of(*files, options=CardOptions(base_model="org/said", license="bsd")).text)
    assert (said["base_model"], said["license"]) == ("org/said", "bsd")


def test_companions_of_another_model_are_refused(repository):
    q4 = repository / "llama-Q4_0.gguf"
    wrong = {
        "a.gguf": ("llama", {"blk.0.attn_q.weight": (np.ones((4, 32), np.float32), np.ones((32, 4), np.float32))}),
        "b.gguf": ("llama", {"blk.99.attn_q.weight": (np.ones((4, 32), np.float32), np.ones((32, 4), np.float32))}),
        "c.gguf": ("qwen3", {}),
    }
    for name, (architecture, pairs) in wrong.items():
        write_adapter(repository / name, architecture, pairs)
        with pytest.raises(PlanError, match=f"{name} is not for llama-Q4_0.gguf: "):
            read_collection([q4, repository / name])
    write_imatrix(repository / "d.gguf", ActivationStats({"blk.0.attn_q.weight": TensorStats(np.ones((1, 7), np.float32), np.ones(1, np.float32))}))  # fmt: skip
    with pytest.raises(PlanError, match="d.gguf is not for"):
        read_collection([q4, repository / "d.gguf"])
    with pytest.raises(PlanError, match="no quantized model"):
        read_collection([repository / "imatrix.gguf"])


def test_a_card_lies_beside_its_files_or_where_it_is_told(repository, tiny_folder, tmp_path):
    (repository / "small").mkdir()
    q4, q8 = repository / "small" / "llama-Q4_0.gguf", repository / "llama-Q8_0.gguf"
    (repository / "llama-Q4_0.gguf").rename(q4)
    with pytest.raises(OutputError, match="several folders: .*-o"):
        write_card([q4, q8], None, NONE)
    _, card = write_card([q4, q8], repository / "README.md", NONE)
    assert (
        "| [small/llama-Q4_0.gguf](small/llama-Q4_0.gguf) |" in card.text and "quantkit verify small/llama-Q4_0.gguf" in card.text
    )
    _, card = write_card([q4, q8], tmp_path / "README.md", NONE)
    assert "(repository/small/llama-Q4_0.gguf)" in card.text
    (tmp_path / "other").mkdir()
    shutil.copy(q4, tmp_path / "other" / q8.name)
    with pytest.raises(PlanError, match=r"would both be llama-Q8_0.gguf in one repository"):
        write_card([q8, tmp_path / "other" / q8.name], repository / "small" / "README.md", NONE)
    w4, _ = quantize(tiny_folder("llama"), tmp_path / "w4", "uniform:W4A16_G32")
    mixed = card_of(w4, q8, folder=tmp_path)
    assert set(front(mixed.text)["tags"]) == {"gguf", "safetensors", "quantized", "llama", "compressed-tensors", "quantkit"}
    assert "(w4/model.safetensors)" in mixed.text and "vllm serve w4" in mixed.text and "llama-cli -m" in mixed.text


def test_parts_and_repeated_names_count_as_one_file(tiny_folder, tmp_path):
    checkpoint = open_checkpoint(tiny_folder("llama"))
    run(checkpoint, uniform_plan(checkpoint, "Q8_0", None), tmp_path / "x.gguf", split_bytes=500_000)
    parts = sorted(tmp_path.glob("x-*.gguf"))
    assert card_of(*parts, parts[0]).text == card_of(parts[0]).text
    assert f"and {len(parts) - 1} more" in card_of(*parts).text


class Tags(HTMLParser):
    """Elements of HTML, and the text inside summaries."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.links: list[str] = []
        self.summaries: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.links += [value for name, value in attrs if name == "href"]
        if tag == "summary":
            self.summaries.append("")
        self._inside = tag == "summary"

    def handle_data(self, data):
        if self._inside:
            self.summaries[-1] += data


def test_hostile_names_stay_names_in_links_and_summaries(repository, tmp_path):
    from markdown_it import MarkdownIt

    hostile = ["a](http:evil.gguf", "javascript:alert(1).gguf", "<script>x</script>.gguf".replace("/", "_"), "b) $$x$$ \\(y\\) *z*|`.gguf", "n\n\n<img src=q>.gguf", "\udc80&lt;.gguf"]  # fmt: skip
    folder = tmp_path / "names"
    folder.mkdir()
    files = [folder / name for name in hostile]
    for path in files:
        shutil.copy(repository / "llama-Q4_0.gguf", path)
    text = card_of(*files).text
    shown = Tags(MarkdownIt("commonmark", {"html": True}).enable("table").render(text.split("\n---\n", 1)[1]))
    assert set(shown.names) <= {"h1", "h2", "h3", "p", "table", "thead", "tbody", "tr", "th", "td", "a", "ul", "li", "pre", "code",
                                "details", "summary", "strong"}  # fmt: skip
    assert {unquote_to_bytes(link) for link in shown.links} == {path.name.encode("utf-8", "surrogateescape") for path in files}
    assert not any(re.match(r"[a-z]+:|/", link) for link in shown.links)
    wanted = {" ".join(name.split()).encode("utf-8", "replace").decode() for name in hostile}
    assert {" ".join(summary.partition(".gguf: ")[0].split()) + ".gguf" for summary in shown.summaries} == wanted
    assert "$$" not in "".join(re.findall("<summary>.*", text))


def test_the_command_writes_a_card_of_all_that_is_given(repository):
    from click.testing import CliRunner

    from quantkit.cli import main

    files = [str(path) for path in sorted(repository.glob("*.gguf"))]
    done = CliRunner().invoke(main, ["card", *files, "--base-model", "org/tiny"])
    assert done.exit_code == 0 and (repository / "README.md").exists(), done.output
    again = CliRunner().invoke(main, ["card", *files, "--base-model", "org/tiny"])
    assert again.exit_code == 1 and "--force" in again.output and "Traceback" not in again.output
