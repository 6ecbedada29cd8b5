"""Names of several models side by side, and FILE+ADAPTER."""

from __future__ import annotations

from pathlib import Path

from quantkit.evaluation.candidates import shown_names, split_adapter


def test_names_are_short_and_no_two_alike():
    paths = [Path(p) for p in ("/m/a.gguf", "/m/b.gguf", "/x/1/c.gguf", "/x/2/c.gguf", "/m/a.gguf", "/y/1/d+e.gguf")]
    assert shown_names(paths) == ["a.gguf", "b.gguf", "1/c.gguf", "2/c.gguf", "a.gguf (2)", "d+e.gguf"]
    assert shown_names([]) == []
    assert shown_names([Path("/r/m"), Path("/s/t/m"), Path("/u/t/m")]) == ["r/m", "s/t/m", "u/t/m"]


def test_a_plus_in_the_name_of_a_file_that_exists_is_no_adapter(tmp_path):
    (tmp_path / "a+b.gguf").touch()
    assert split_adapter(tmp_path / "a+b.gguf") == (tmp_path / "a+b.gguf", None)
    assert split_adapter(tmp_path / "a.gguf+b.gguf") == (tmp_path / "a.gguf", Path("b.gguf"))
    assert shown_names([tmp_path / "a+b.gguf"]) == ["a+b.gguf"]
