"""Rows to train on: JSON lines with the fields that a method needs."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from quantkit.errors import RewardError

Row = dict[str, Any]
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def read_rows(path: Path, fields: dict[str, str] | None = None) -> list[Row]:
    """Rows of a .jsonl file. fields: new name → name in the file, for example ``{"prompt": "question"}``.

    Raises RewardError that names the line: no object, a field that is missing, no rows at all.
    """
    rows: list[Row] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other characters that end a line
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"{path} cannot be read ({error})", hint="give a file of JSON lines in UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RewardError(f"{path}, line {number}: no JSON ({error})", hint="write one object a line") from None
        if not isinstance(row, dict):
            raise RewardError(f"{path}, line {number}: a {type(row).__name__}, not an object", hint="write one object a line")
        for new, old in (fields or {}).items():
            if old not in row:
                raise RewardError(f"{path}, line {number}: no field {old!r}", hint=f"the row has {', '.join(map(str, row))}")
            row[new] = row.pop(old)
        rows.append(row)
    if not rows:
        raise RewardError(f"{path} has no rows", hint="write one JSON object a line")
    return rows


def require_fields(rows: list[Row], names: tuple[str, ...], path: Path) -> None:
    """Raise RewardError for the first row that lacks a field, or has an empty one."""
    for number, row in enumerate(rows, 1):
        for name in names:
            if not row.get(name):
                raise RewardError(
                    f"{path}, row {number}: {'an empty' if name in row else 'no'} field {name!r}",
                    hint=f"the row has {', '.join(map(str, row))}; --field NEW=OLD renames",
                )


def require_labels(rows: list[Row], path: Path) -> None:
    """Raise RewardError unless every row has a label, and both true and false occur."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("label"), bool):
            raise RewardError(f"{path}, row {number}: the label is {row.get('label')!r}", hint="write true or false")
    if len({row["label"] for row in rows}) == 1:
        raise RewardError(f"{path}: all labels are {rows[0]['label']}", hint="good and bad answers are needed")


def messages(row: Row, system: str | None) -> list[dict[str, str]]:
    """The prompt of a row as messages. A text becomes the user's."""
    prompt = row["prompt"]
    found = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [{"role": "system", "content": system}, *found] if system else found


def conversation(row: Row, system: str | None) -> Row:
    """A row with prompt and completion as messages."""
    answer = row["completion"]
    return {
        "prompt": messages(row, system),
        "completion": [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer),
    }


def read_template(path: Path, marked: bool) -> str:
    """A chat template from a file. marked: it must mark what the model says, so that the loss counts only that.

    Raises RewardError.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"the template {path} cannot be read ({error})", hint="give a Jinja file") from None
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION.sub("", text))
    except TemplateSyntaxError as error:
        raise RewardError(f"{path}, line {error.lineno}: {error.message}", hint="mend the template") from None
    if marked:
        require_marked(text, str(path))
    return text


def require_marked(template: str | None, source: str) -> None:
    """Raise RewardError unless a template marks what the model says."""
    if not template or not MARK.search(template):
        raise RewardError(
            f"{source} does not mark what the model says",
            hint="put {% generation %} … {% endgeneration %} around it (--template), or give rows with prompt and completion",
        )


def fingerprints(rows: list[Row]) -> set[str]:
    """A hash of every prompt, to tell whether two sets of rows share any."""
    return {hashlib.sha256(json.dumps(row.get("prompt"), sort_keys=True).encode()).hexdigest() for row in rows}
