"""Tasks of lm-eval by name: those that come with quantkit and need no hub, and lm-eval's own."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quantkit.errors import MissingDependencyError, QuantkitError
from quantkit.evaluation.lm_eval.documents import TASKS

DEFAULT = ("arc_easy_local", "arc_challenge_local", "piqa_local", "blimp_local")
SUFFIX = "_local"  # of the offline tasks
SEED = 1234  # lm-eval's own for choosing examples


def require_lm_eval() -> None:
    """Raise MissingDependencyError unless lm-eval is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError(
            "this needs lm-eval", hint='pip install "quantkit-llm[eval]", in the checkout: pip install -e ".[eval]"'
        )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Nothing of lm-eval's log and prints, nor of asyncio's under it: their errors are raised as well."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "asyncio")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@quietly()
def load_tasks(
    names: Sequence[str], data: Path | str | None = None, shots: int | None = None, windows: int | None = None
) -> dict[str, Any]:
    """Tasks and groups by their names (patterns and YAML files count too), as lm-eval's TaskManager loads them; ``asked``
    has the names in their order, those of tags replaced by their tasks.

    data: the folder of the offline tasks. shots: examples before each question, for tasks that do not set them to none.
    windows: of wikitext_windows_local, at most so many. Raises QuantkitError for an unknown name, or a task whose
    documents cannot be had.
    """
    require_lm_eval()
    metadata = {name: value for name, value in (("data", str(data) if data else None), ("window_count", windows)) if value}
    manager = _manager(False, metadata)
    if not all(_matches(manager, name) or name.endswith(SUFFIX) for name in names):
        manager = _manager(True, metadata)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "asked": []}
    for name in names:
        for match in _matches(manager, name) or [_unknown(manager, name)]:
            found = _load(manager, match)
            loaded["tasks"] |= found["tasks"]
            loaded["groups"] |= found.get("groups", {})
            loaded["asked"] += [match] if match in found.get("groups", {}) else found["tasks"]
    for task in loaded["tasks"].values():
        known = task.get_config("num_fewshot")
        if known is None or (shots is not None and known != 0):
            task.set_config(key="num_fewshot", value=shots or 0)
    return loaded


def _manager(everything: bool, metadata: dict[str, Any]) -> Any:
    """The tasks of quantkit, or those of lm-eval too, of which there are so many that looking takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS), include_defaults=everything, metadata=metadata)


def _matches(manager: Any, name: str) -> list[str]:
    return [name] if name.endswith(".yaml") and Path(name).is_file() else manager.match_tasks([name])


def _unknown(manager: Any, name: str) -> str:
    near = difflib.get_close_matches(name, manager.all_tasks, n=4) or difflib.get_close_matches(name, DEFAULT, n=4, cutoff=0.0)
    raise QuantkitError(f"no task {name!r}", hint=f"the nearest: {', '.join(near)}; `lm_eval ls tasks` lists lm-eval's")


def _load(manager: Any, name: str) -> dict[str, Any]:
    try:
        return manager.load([name])
    except QuantkitError:
        raise
    except ModuleNotFoundError as error:
        line = " ".join(str(error).split())[:200]
        raise MissingDependencyError(
            f"task {name} needs {error.name or 'another package'} ({line})",
            hint='pip install it; lm-eval has extras for most, such as "lm-eval[math]"',
        ) from None
    except Exception as error:  # whatever the Hub, a data set's reader or a task's own code raises
        line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise QuantkitError(
            f"task {name} cannot be loaded ({line})",
            hint=f"lm-eval's own tasks take their documents from the Hugging Face Hub; those of quantkit end in {SUFFIX}",
        ) from None
