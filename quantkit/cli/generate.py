"""quantkit generate."""

from __future__ import annotations

from pathlib import Path

import click

from quantkit.cli.output import emit_json, guarded


@click.command("generate", help="Text from a model, with its weights packed: through torch or llama.cpp.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", required=True, help="Text to go on from.")
@click.option("-n", "--tokens", type=click.IntRange(1), default=128, show_default=True, help="At most this many new tokens.")
@click.option("--chat", is_flag=True, help="The prompt is a message: put it into the model's chat template.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Choose among this many tokens; 0 for all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Choose among the likeliest of this share together.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random choices.")
@click.option("--runtime", type=click.Choice(["torch", "llama"]), default="torch", show_default=True, help="What runs the model.")
@click.option("--device", default="cpu", show_default=True, help="Where torch runs it: cpu, cuda, cuda:1.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the model as `quantkit tune --compile` found best.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@guarded
def command(
    model: Path, prompt: str, tokens: int, chat: bool, temperature: float, top_k: int, top_p: float, seed: int, runtime: str,
    device: str, compiled: bool, as_json: bool,
) -> None:  # fmt: skip
    """Generate, printing the text as it comes."""
    from quantkit.api import generate

    before = ["" if chat else prompt]  # shown with the first token, so that an error prints nothing else

    def show(text: str) -> None:
        click.echo("".join(before) + text, nl=False)
        before.clear()

    out = generate(
        model, prompt, tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, runtime=runtime, device=device,
        chat=chat, compiled=compiled, show=None if as_json else show,
    )  # fmt: skip
    if before and not as_json:  # the model ended its text at once
        click.echo(before[0], nl=False)
    if as_json:
        emit_json({
            "text": out.text, "tokens": out.tokens, "prompt_tokens": out.prompt, "prompt_seconds": round(out.seconds[0], 3),
            "tokens_per_second": round(out.speed, 1), "runtime": runtime,
        })  # fmt: skip
        return
    click.echo()
    click.echo(
        f"{len(out.tokens)} tokens, {out.speed:.1f} tokens/s; {len(out.prompt)} tokens of prompt with loading in {out.seconds[0]:.2f} s",
        err=True,
    )
