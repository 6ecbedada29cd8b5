"""Model cards: the Hub's fields, nothing that was not measured, nothing that breaks out of its place."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import yaml

from quantkit.api import Options, compare, quantize
from quantkit.checkpoint import gguf_values as gv
from quantkit.checkpoint import open_checkpoint
from quantkit.checkpoint.gguf_reader import GgufFile
from quantkit.checkpoint.gguf_writer import TensorSpec, write_gguf
from quantkit.errors import CheckpointError, OutputError, PlanError, QuantkitError
from quantkit.evaluation.board import append, markdown, rows_of
from quantkit.evaluation.card.artifact import read_artifact
from quantkit.evaluation.card.card import Card, CardOptions, make_card, write_card
from quantkit.evaluation.card.collection import default_target, read_collection
from quantkit.evaluation.card.hub import base_models, hub_name
from quantkit.planning.standard import uniform_plan
from quantkit.quantizer.manifest import Manifest, manifest_path
from quantkit.quantizer.pipeline import run

LIMIT = 512
NONE = CardOptions()


@pytest.fixture
def packed(tiny_gguf, tmp_path):
    """A quantized GGUF with its manifest in a folder of its own."""
    source = tiny_gguf("llama", "Q4_0")
    shutil.copy(source, tmp_path / source.name)
    shutil.copy(manifest_path(source), tmp_path / manifest_path(source).name)
    return tmp_path / source.name


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """A safetensors folder in W4A16_G32, and its manifest."""
    return quantize(tiny_folder("llama"), tmp_path_factory.mktemp("card") / "w4", "uniform:W4A16_G32")


def card_of(*paths, options=NONE, folder=None) -> Card:
    """A card that is not written."""
    collection = read_collection(paths)
    return make_card(collection, options, folder or default_target(collection).parent)


def rewritten(source, target, **changes):
    """A copy of a GGUF with other metadata, without a manifest. changes: keys with _ for a dot at double underscores."""
    file = GgufFile(source)
    metadata = {**file.metadata, **{key.replace("__", "."): value for key, value in changes.items()}}
    specs = [TensorSpec(name, entry.shape, entry.format) for name, entry in file.entries.items()]
    with write_gguf(target, metadata, specs) as writer:
        for spec in specs:
            writer.write(spec.name, file.read_packed(spec.name, 0, int(spec.nbytes // spec.format.row_bytes(spec.shape[-1]))))
    return target


def front(text):
    """The front matter as the Hub's YAML parser reads it, which must agree with huggingface_hub's."""
    from huggingface_hub import ModelCard

    found = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL).group(1))
    card = ModelCard(text)
    assert card.data.to_dict() == found and card.text.lstrip().startswith("# ")
    return found


def test_a_card_of_a_gguf_says_what_it_is_and_how_it_was_made(packed):
    out, card = write_card([packed], None, CardOptions(base_model="org/tiny-llama", license="apache-2.0", quantized_by="me"))
    assert out == packed.parent / "README.md" and out.read_text() == card.text and card.notes == ()
    assert front(card.text) == {
        "base_model": "org/tiny-llama", "base_model_relation": "quantized", "library_name": "gguf", "license": "apache-2.0",
        "quantized_by": "me", "tags": ["gguf", "quantized", "llama", "quantkit"],
    }  # fmt: skip
    manifest = Manifest.read(manifest_path(packed))
    assert f"| {packed.name} | {packed.stat().st_size:,} | {manifest.file_sha256} |" in card.text
    assert f"at {manifest.bpw:.3f} bits each" in card.text and manifest.source["identity"] in card.text
    assert f"quantkit quantize llama --plan uniform:Q4_0 --no-imatrix -o {packed.name}" in card.text
    assert f"llama-server -m {packed.name}" in card.text and "vllm" not in card.text
    assert "\nNot measured.\n" in card.text and "nats" not in card.text


def test_shares_of_the_formats_add_up(packed):
    artifact = read_artifact(packed)
    shares = artifact.shares()
    assert {s.format for s in shares} == {t.dtype for t in open_checkpoint(packed).tensors.values()}
    assert sum(s.weights for s in shares) == pytest.approx(1) and sum(s.nbytes for s in shares) == pytest.approx(1)
    assert artifact.bpw == pytest.approx(Manifest.read(manifest_path(packed)).bpw)


def test_the_command_makes_the_same_file_again(tiny_folder, packed, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from quantkit.cli import main

    command = re.search(r"```sh\nquantkit (quantize .*)\n```", card_of(packed).text).group(1)
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    (tmp_path / "again" / "llama").symlink_to(tiny_folder("llama"))
    done = CliRunner().invoke(main, command.split())
    assert done.exit_code == 0, done.output
    assert (tmp_path / "again" / packed.name).read_bytes() == packed.read_bytes()


def test_the_numbers_are_those_of_the_board(tiny_folder, packed, tiny_gguf, tmp_path):
    files = [packed, tiny_gguf("llama", "Q8_0")]
    report = compare(tiny_folder("llama"), files, limit=LIMIT)
    rows = rows_of(report)
    append(tmp_path / "board.json", [*rows, replace(rows[0], runtime="llama", sha256=None, identity="another file")])
    card = card_of(packed, options=CardOptions(board=tmp_path / "board.json"))
    d = report.candidates[0].divergence
    assert f"{d.mean_kld:.5f} ± {d.mean_kld_error:.5f}" in card.text and "Not measured" not in card.text
    assert card.text.count("| torch on cpu |") == 1 and "llama on cpu" not in card.text
    assert f"{report.candidates[1].divergence.mean_kld:.5f}" not in card.text
    manifest_path(packed).unlink()  # then what the row knows of the weights decides
    assert f"{d.mean_kld:.5f}" in card_of(packed, options=CardOptions(board=tmp_path / "board.json")).text
    (tmp_path / "report.json").write_text(report.to_json())
    assert f"{d.mean_kld:.5f} ± {d.mean_kld_error:.5f}" in card_of(packed, options=CardOptions(report=tmp_path / "report.json")).text  # fmt: skip


def test_numbers_of_other_files_are_not_taken(packed, tiny_gguf, tiny_folder, tmp_path):
    other = tiny_gguf("llama", "Q8_0")
    report = compare(tiny_folder("llama"), [other], limit=LIMIT)
    (tmp_path / "report.json").write_text(report.to_json())
    append(tmp_path / "board.json", rows_of(report))
    for options in (CardOptions(board=tmp_path / "board.json"), CardOptions(report=tmp_path / "report.json")):
        card = card_of(packed, options=options)
        assert "\nNot measured.\n" in card.text and any("holds no numbers of" in note for note in card.notes)


def test_a_card_of_a_folder_names_the_programs_that_load_it(folder):
    path, manifest = folder
    card = card_of(path)
    found = front(card.text)
    assert found["library_name"] == "transformers" and found["tags"] == [
        "safetensors",
        "quantized",
        "llama",
        "compressed-tensors",
        "quantkit",
    ]
    assert "base_model" not in found and found["base_model_relation"] == "quantized"
    assert any("--base-model ORG/NAME" in note for note in card.notes)
    assert 'from_pretrained("w4")' in card.text and "vllm serve w4" in card.text and "llama-cli" not in card.text
    assert "--plan uniform:W4A16_G32 --container safetensors" in card.text and "W4A16\\_G32" not in card.text
    assert manifest.files["model.safetensors"]["sha256"] in card.text


def test_transformers_is_left_out_where_it_does_not_load_the_experts(tiny_folder, tmp_path):
    out, _ = quantize(tiny_folder("qwen3_moe"), tmp_path / "nvfp4", "uniform:NVFP4", container="safetensors")
    text = card_of(out).text
    assert "vllm serve nvfp4" in text and "from_pretrained" not in text


def test_all_parts_of_a_split_file_stand_in_its_card(tiny_folder, tmp_path):
    checkpoint = open_checkpoint(tiny_folder("llama"))
    run(checkpoint, uniform_plan(checkpoint, "Q8_0", None), tmp_path / "x.gguf", split_bytes=500_000)
    parts = sorted(tmp_path.glob("x-*.gguf"))
    assert len(parts) > 1
    cards = {card_of(part).text for part in parts}
    assert len(cards) == 1
    text = cards.pop()
    assert all(f"| {p.name} | {p.stat().st_size:,} | {Manifest.read(manifest_path(p)).file_sha256} |" in text for p in parts)
    assert "-o x.gguf" in text and f"llama-cli -m {parts[0].name}" in text and "# x\n" in text


def test_a_plan_tells_floors_and_pinned_weights(at_home, analyzed, tmp_path):
    from quantkit.planning.plan import Plan

    folder, work, text = at_home[0], tmp_path / "work", analyzed[2]
    path, manifest = quantize(folder, tmp_path / "dyn.gguf", bpw=4.0, options=Options(work=work, calibration=[text], tokens=8192))
    plan_file = work / "plan.json"
    plan = Plan.read(plan_file)
    name = next(n for n, e in plan.tensors.items() if e.format not in ("F32", "Q8_0"))
    plan.tensors[name] = replace(plan.tensors[name], pins=((3, 7),))
    plan_file.write_text(plan.to_json())
    text = card_of(path, options=CardOptions(plans=(plan_file,))).text
    assert plan.constraints and markdown(f"{name}[3, 7] is pinned") in text
    for line in plan.constraints:
        assert markdown(line) in text
    assert "--plan plan.json" in text and "--bpw" not in text
    text = card_of(path).text
    assert "--bpw 4.0" in text and "its plan.json" in text
    assert ("Predicted by its plan" in text) == (manifest.plan["predicted_kld"] is not None)
    plan.tensors[name] = replace(plan.tensors[name], format="Q8_0")
    (tmp_path / "edited.json").write_text(plan.to_json())
    with pytest.raises(PlanError, match=f"not the plan of dyn.gguf: {name}"):
        card_of(path, options=CardOptions(plans=(tmp_path / "edited.json",)))


def test_a_file_without_a_manifest_says_only_what_it_knows(packed):
    manifest_path(packed).unlink()
    card = card_of(packed)
    assert "No manifest was found" in card.text and "not known: no manifest" in card.text and "quantkit.version" in card.text
    assert "quantkit quantize" not in card.text and any("has no manifest" in note for note in card.notes)


def test_a_gguf_of_an_architecture_that_quantkit_does_not_run_gets_a_card(packed, tmp_path):
    other = rewritten(packed, tmp_path / "other.gguf", general__architecture=gv.string("mamba9"))
    text = card_of(other).text
    assert front(text)["tags"][2] == "mamba9" and "llama-cli" in text and "quantkit.load" not in text


def test_the_base_is_taken_from_the_files_metadata_and_said(packed, tmp_path):
    url = gv.string("https://huggingface.co/parent/one")
    card = card_of(rewritten(packed, tmp_path / "p.gguf", general__base_model__0__repo_url=url))
    assert front(card.text)["base_model"] == "parent/one" and any("--base-model says otherwise" in note for note in card.notes)
    source = {"general__source__repo_url": gv.string("https://huggingface.co/org/two"), "general__base_model__0__repo_url": url}
    both = read_artifact(rewritten(packed, tmp_path / "b.gguf", **source, general__license=gv.string("MIT")))
    assert base_models([both], None)[0] == ["org/two"] and base_models([both], "a/b") == (["a/b"], [])
    assert front(card_of(both.path).text)["license"] == "mit"


def test_a_license_without_a_known_name_is_other(packed, tmp_path):
    file = rewritten(packed, tmp_path / "l.gguf", general__license=gv.string("My: own # license"))
    found = front(card_of(file).text)
    assert (found["license"], found["license_name"]) == ("other", "My: own # license")


@pytest.mark.parametrize(
    ("text", "name"),
    [("org/m", "org/m"), ("https://huggingface.co/org/m/", "org/m"), ("m", None), ("a/b/c", None), ("https://example.com/org/m", None),
     ("https://huggingface.co/datasets/m", None), ("org/m\nlicense: mit", None), ("../m", None)],
)  # fmt: skip
def test_names_on_the_hub(text, name):
    assert hub_name(text) == name


def test_names_that_look_like_markup_stay_text(packed, tmp_path):
    evil = 'x|`y`<img src=q>\n---\n# no\ntags: [evil]: "\udc80'
    metadata = {
        "general__name": gv.string(evil),
        "general__quantized_by": gv.string(evil),
        "quantize__imatrix__dataset": gv.string(evil),
    }
    file = rewritten(packed, tmp_path / "a`b|c <i>.gguf", **metadata)
    _, card = write_card([file], tmp_path / "card.md", NONE)
    found = front(card.text)
    assert found["tags"] == ["gguf", "quantized", "llama", "imatrix", "quantkit"] and "\n" not in found["quantized_by"]
    body = re.sub(r"(`{3,})\w+\n.*?\n\1", "", card.text.split("\n---\n", 1)[1], flags=re.DOTALL)
    assert "<img" not in body and "<i>" not in body and "\n# no" not in body
    (cells,) = (line for line in body.splitlines() if line.startswith(r"| a\`b\|c &lt;i&gt;.gguf"))
    assert len(re.findall(r"(?<!\\)\|", cells)) == 4
    assert "llama-cli -m 'a`b|c <i>.gguf'" in card.text


def test_an_existing_readme_stays_unless_forced(packed):
    readme = packed.parent / "README.md"
    readme.write_text("precious")
    with pytest.raises(OutputError, match="--force"):
        write_card([packed], None, NONE)
    assert readme.read_text() == "precious"
    write_card([packed], None, NONE, force=True)
    assert readme.read_text().startswith("---\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (CardOptions(base_model="no name"), "no name on the Hub"),
        (CardOptions(license="my license: x"), "no license identifier"),
        (CardOptions(board="b.json", report="r.json"), "exclude each other"),
    ],
)
def test_options_that_do_not_fit_write_nothing(options, words, packed):
    with pytest.raises(PlanError, match=words):
        write_card([packed], None, options)
    assert not (packed.parent / "README.md").exists()


@pytest.mark.parametrize("content", ["{}", '{"quantkit_report": 1}', '{"quantkit_report": 2}', "[]", "{"])
def test_what_is_no_report_is_refused(content, packed, tmp_path):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"r\.json"):
        write_card([packed], None, CardOptions(report=tmp_path / "r.json"))
    assert not (packed.parent / "README.md").exists()


def test_a_manifest_of_another_file_is_refused(packed, tiny_gguf):
    shutil.copy(manifest_path(tiny_gguf("llama", "Q8_0")), manifest_path(packed))
    with pytest.raises(CheckpointError, match="does not belong to"):
        read_artifact(packed)


def test_a_manifest_without_its_facts_is_refused(packed):
    sidecar = manifest_path(packed)
    data = json.loads(sidecar.read_text())
    del data["source"]["identity"]
    sidecar.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="is damaged"):
        read_artifact(packed)


def test_what_is_no_quantized_model_is_refused(tiny_folder, analyzed, tmp_path):
    (tmp_path / "x.gguf").write_text("no GGUF")
    with write_gguf(tmp_path / "vocabulary.gguf", {"general.architecture": gv.string("llama")}, []):
        pass
    for path, words in (
        (tmp_path / "missing.gguf", "does not exist"), (tmp_path / "x.gguf", "not a GGUF"), (tiny_folder("llama"), "is not quantized"),
        (analyzed[1] / "imatrix.gguf", "not of a model"), (tmp_path, "config.json"),
        (tmp_path / "vocabulary.gguf", "has no tensors"),
    ):  # fmt: skip
        with pytest.raises(QuantkitError, match=words):
            read_artifact(path)
