"""The command line: one file per command, each imported when it is called."""

from __future__ import annotations

import click

from quantkit.cli.lazy import LazyGroup

COMMANDS = {
    "inspect": "What is in a model: architecture, tensors, roles, shapes, bytes.",
    "analyze": "What hurts: the cost of every tensor in every format, super weights, outliers.",
    "plan": "Spend a byte budget where it matters, and say why.",
    "sweep": "The whole curve of divergence against bytes, with llama-quantize's mixes as points on it.",
    "quantize": "Write a quantized GGUF or safetensors folder; runs what is missing, reuses what is there.",
    "compare": "Was it worth it: KL divergence, perplexity and agreement against the original.",
    "board": "The rows that compare --append kept, like ranked with like.",
    "card": "A model card for the Hub, of a quantized file or folder.",
    "eval": "Tasks of lm-eval on any number of models, side by side.",
    "generate": "Text from a model, with its weights packed: through torch or llama.cpp.",
    "tune": "What is fastest on this machine: programs of a GPU, or ways of compiling a model.",
    "rl": "Teach and heal: adapters trained on packed weights, by examples and by rewards.",
    "repair": "A low-rank adapter that makes up for what quantizing took, within a size.",
    "verify": "Check a file or folder against its manifest and its own hashes.",
    "speed": "How fast this machine decodes each format.",
    "formats": "Every format: bits, block, zero, multiplier; with a name, its bytes drawn.",
}


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"quantkit {version('quantkit-llm')}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    commands_of=__name__,
    known=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def main() -> None:
    """Quantize language models: find what hurts, spend bytes where it matters, prove the result.

    MODEL is a Hugging Face folder (safetensors) or a GGUF file in BF16, F16 or F32.
    """
