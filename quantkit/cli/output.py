"""Results to stdout, messages to stderr, one JSON document on request."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from quantkit.errors import QuantkitError
from quantkit.progress import stop_all


def guarded(function: Callable[..., None]) -> Callable[..., None]:
    """Turn a user's mistake into one line and exit code 1; Ctrl-C into exit code 130."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except QuantkitError as error:
            click.echo(f"error: {error}", err=True)
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            click.echo(
                "interrupted; finished files and what caches hold are kept: run it again (training: with --resume)", err=True
            )
            raise SystemExit(130) from None
        except BrokenPipeError:
            sys.stderr.close()
            raise SystemExit(1) from None
        except OSError as error:
            click.echo(f"error: {error.filename or 'input or output'}: {error.strerror or error}", err=True)
            raise SystemExit(1) from None
        except MemoryError:
            click.echo(
                "error: out of memory; close other programs, or ask for less (analyze: --no-probes, fewer --tokens; eval: --batch)",
                err=True,
            )
            raise SystemExit(1) from None
        except Exception as error:
            if os.environ.get("QUANTKIT_DEBUG"):
                raise
            line = " ".join(f"{type(error).__name__}: {error}".split())
            click.echo(f"error: internal: {line}; please report it with the output of QUANTKIT_DEBUG=1", err=True)
            raise SystemExit(1) from None
        finally:
            stop_all()

    return run


def emit_json(document: Any) -> None:
    """Print one JSON document."""
    from quantkit.checkpoint.documents import strict_json

    click.echo(strict_json(document, indent=1))


def print_table(title: str, columns: list[str], rows: list[list[str]], left: int = 1) -> None:
    """A table on stdout; the first ``left`` columns are aligned left."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", overflow="fold", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)


def size(count: int) -> str:
    """Bytes for people: ``3,781,472 B (3.61 MiB)``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{count:,} B" if unit == "B" else f"{count:,} B ({value:.2f} {unit})"


def common(function: Callable[..., None]) -> Callable[..., None]:
    """Options of every command that runs an analysis."""
    options = [
        click.option("--calibration", multiple=True, type=click.Path(path_type=Path), help="Text to calibrate on (repeatable) instead of the built-in mix."),
        click.option("--imatrix", type=click.Path(path_type=Path), help="Activation statistics made by quantkit or llama-imatrix."),
        click.option("--tokens", type=click.IntRange(512), default=None, help="Calibration tokens (default 65536)."),
        click.option("--probes/--no-probes", default=None, help="Measure single tensors directly (default: for models up to 200M weights)."),
        click.option("--effort", type=click.IntRange(1, 5), default=None, help="1: ggml's search; 2 (default): rounding in the metric of the model's outputs; 3: tensors encoded one after the other, each for what the quantized ones before it give; 4: scales and norms relearned; 5: plans measured and corrected, learn longer."),
        click.option("--work", type=click.Path(path_type=Path), help="Work directory (default ./NAME.quantkit)."),
        click.option("--pre-tokenizer", help="llama.cpp's name of the pre-tokenizer where it cannot be recognized."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def budget(function: Callable[..., None]) -> Callable[..., None]:
    """The one dial."""
    options = [
        click.option("--bpw", type=float, help="Bits per weight: 8 × tensor-data bytes ÷ weights."),
        click.option("--size", help="Whole-file size: 4.2GiB, 700MB or plain bytes."),
        click.option("--fit", help="Memory that weights, KV cache and buffers must fit: 24GiB."),
        click.option("--like", help="The size of a standard mix (Q4_K_M, the default) or of a file."),
        click.option("--context", type=click.IntRange(1), default=4096, show_default=True, help="Tokens of context for --fit."),
        click.option("--kv-type", default="F16", show_default=True, help="KV cache type for --fit."),
        click.option("--ubatch", type=click.IntRange(1, 2048), default=512, show_default=True, help="Micro-batch for --fit."),
        click.option("--no-flash-attention", is_flag=True, help="Count buffers without flash attention for --fit."),
        click.option("--keep", multiple=True, metavar="REGEX=FORMAT", help="Give this format to tensors in whose name the expression is found (repeatable; the first match wins)."),
        click.option("--floor", "floors", multiple=True, metavar="ROLE=FORMAT", help="Lowest format of a role: attention, shared, experts, ffn, embedding, head or one such as attn_v; ROLE=none or none takes floors away (repeatable)."),
        click.option("--formats", "only", multiple=True, metavar="PATTERN", help="Use only formats of this name or pattern, such as 'Q?_K' (repeatable; default: all)."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def make_options(values: dict[str, Any]) -> Any:
    """Options of the API from those of the command line."""
    from quantkit.analysis.run import EFFORT, TOKENS
    from quantkit.api import Options
    from quantkit.progress import Progress

    return Options(
        calibration=values["calibration"], imatrix=values["imatrix"], tokens=values["tokens"] or TOKENS,
        probes=values["probes"], effort=values["effort"] or EFFORT, work=values["work"], pre_tokenizer=values["pre_tokenizer"], progress=Progress.terminal(),
    )  # fmt: skip


def make_request(values: dict[str, Any]) -> Any:
    """Request of the API from the options of the command line."""
    from quantkit.planning.budget import Request
    from quantkit.planning.memory import Run

    run = Run(values["context"], values["kv_type"].upper(), values["ubatch"], not values["no_flash_attention"])
    return Request(values["bpw"], values["size"], values["fit"], values["like"], run)
