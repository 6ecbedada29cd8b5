"""Tools that completions may call while they are drawn, from a user's file or ours.

TRL calls them (a turn after the other), and what they return does not count for the loss. Their arguments come from the
model: a tool that does more than compute belongs into the sandbox, as ``python`` does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantkit.errors import RewardError
from quantkit.rl.rewards.loading import LIBRARY, own_functions, run_file

Tool = Callable[..., Any]
SHOWN = 2000  # characters of a program's output that a model sees


def python(code: str) -> str:
    """Run a Python program without files or network, and return what it prints.

    Args:
        code: The program.

    Returns:
        What it printed, or how it failed.
    """
    from quantkit.rl.sandbox import run_code

    found = run_code(code)
    return (found.printed if found.status == "ok" else f"{found.status}: {found.detail}")[:SHOWN]


KNOWN: dict[str, Tool] = {"python": python}


def tools_of(said: str) -> list[Tool]:
    """Tools as the command line names them: a Python file (its list TOOLS, else its functions), or ``library:python``.

    Every tool needs types and a docstring that describes its arguments, from which the model learns what it is for. Raises
    RewardError.
    """
    if said.startswith(LIBRARY):
        names = said.removeprefix(LIBRARY).split(",")
        if unknown := [name for name in names if name not in KNOWN]:
            raise RewardError(f"no tool {unknown[0]!r}", hint=f"known: {', '.join(LIBRARY + name for name in KNOWN)}")
        if python in (found := [KNOWN[name] for name in names]):
            python("pass")  # raises where programs cannot be locked in; later a model would only be told of an error
        return found
    module = run_file(Path(said), "tools")
    found = list(vars(module).get("TOOLS") or own_functions(module))
    if not found:
        raise RewardError(f"{said} has no tools", hint="define a function, or a list TOOLS")
    for tool in found:
        _check(tool, said)
    return found


def _check(tool: Any, path: str) -> None:
    """Raise RewardError for what a model cannot be told about."""
    from transformers.utils import get_json_schema

    if not inspect.isfunction(tool):
        raise RewardError(f"{path}: {tool!r} is no function", hint="give functions with types and a docstring")
    try:
        get_json_schema(tool)
    except Exception as error:
        raise RewardError(
            f"{path}: the tool {tool.__name__} cannot be described ({error})",
            hint="give every argument a type and a line in a docstring with `Args:`",
        ) from None


def require_template(tokenizer: Any) -> None:
    """Raise RewardError if the chat template does not show tools, or answers that call them cannot be read."""
    from trl.chat_template_utils import (
        add_response_schema,
        get_training_chat_template,
        is_chat_template_prefix_preserving,
        supports_tool_calling,
    )  # fmt: skip

    way = "use the template of a model that calls tools (--template), for example Qwen 3's"
    if tokenizer.chat_template is None or not supports_tool_calling(tokenizer):
        raise RewardError("the chat template knows no tools", hint=way)
    try:
        if getattr(tokenizer, "response_template", None) is None:
            add_response_schema(tokenizer)
        if not is_chat_template_prefix_preserving(tokenizer):
            get_training_chat_template(tokenizer)
    except ValueError as error:
        raise RewardError(f"calls of tools cannot be read from this template's answers ({error})", hint=way) from None
