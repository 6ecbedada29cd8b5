"""The folder of a run: adapter, what it was made with, its log, samples, and checkpoints to go on from.

adapter_config.json, adapter_model.safetensors    PEFT's, and quantkit_base.json that binds them to the base
tokenizer.json, chat_template.jinja               what the adapter was trained with
healed.gguf                                       the healed model, where its scales learned
run.json                                          options, data, versions, seconds
log.jsonl                                         one line for every step that was logged
samples.jsonl                                     completions with their rewards and advantages
checkpoints/checkpoint-N/                         adapter, optimizer, order of the data and random state after N steps
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.files import read_json, write_text
from quantkit.errors import AdapterError, OutputError

RUN, LOG, SAMPLES, CHECKPOINTS = "run.json", "log.jsonl", "samples.jsonl", "checkpoints"
COMPLETE = "complete"  # in a checkpoint that was written to its end


@dataclass(frozen=True)
class RunFolder:
    """Reads and writes what lies in a run's folder."""

    path: Path

    @classmethod
    def begin(cls, path: Path, said: dict[str, Any], resume: bool, force: bool) -> RunFolder:
        """A new run, or one that goes on (``resume``). said: what makes runs differ; it must be the same to go on.

        Raises OutputError if the folder has something else, AdapterError if it is of another run.
        """
        folder = cls(path)
        if (path / RUN).exists() and resume:
            before = read_json(path / RUN)["run"]
            other = [name for name in said if before.get(name) != json.loads(json.dumps(said[name]))]
            if other:
                raise AdapterError(
                    f"{path} is of a run with another {other[0]}: {before.get(other[0])!r}, now {said[other[0]]!r}",
                    hint="resume with the same command, or give another folder",
                )
            return folder
        if resume:
            raise AdapterError(f"{path} has no {RUN}: there is nothing to resume", hint="check the path, or leave out --resume")
        if path.exists() and any(path.iterdir()):
            if not force:
                way = "--resume goes on, --force replaces it" if (path / RUN).exists() else "give another folder"
                raise OutputError(f"{path} exists already", hint=way)
            if not (path / RUN).exists():
                raise OutputError(f"{path} is no folder of a run", hint="give another one")
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        folder.write(RUN, {"run": said, "seconds": None})
        return folder

    @property
    def checkpoints(self) -> Path:
        """Where the trainer keeps its state."""
        return self.path / CHECKPOINTS

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint; those that were cut off are removed."""
        found = {int(path.name.rpartition("-")[2]): path for path in self.checkpoints.glob("checkpoint-*")}
        for number in sorted(found, reverse=True):
            if (found[number] / COMPLETE).exists():
                return found[number]
            shutil.rmtree(found[number])
        return None

    def write(self, name: str, value: dict[str, Any]) -> None:
        """A JSON document; it appears under its name when it is complete."""
        write_text(self.path / name, json.dumps(value, indent=1) + "\n")

    def write_lines(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Rows as JSON lines."""
        write_text(self.path / name, "".join(json.dumps(row) + "\n" for row in rows))

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Rows of a file of JSON lines, none if it is missing."""
        file = self.path / name
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
