"""quantkit rl: adapters trained on top of packed weights; one file per command, each imported when it is called."""

from __future__ import annotations

import click

from quantkit.cli.lazy import LazyGroup

COMMANDS = {
    "sft": "Supervised priming: a few dozen rows teach a format.",
    "grpo": "Group-relative policy optimization: completions of the same prompt compete for rewards.",
    "dpo": "Preferences: which of two answers is the better one, or whether an answer is good.",
    "reward-model": "A score learned from pairs of answers, for use as a reward.",
    "qat": "Heal: bring the outputs back to the original's, on plain text.",
    "check-rewards": "Do rewards pay for what they should, and for nothing else?",
    "sample": "Completions that the rewards accept, as rows for another round of sft.",
    "measure": "pass@k and majority@k, before and after.",
    "memory": "Will a step of training fit? By formula and measured.",
    "export": "Write an adapter for llama.cpp, or merge it into a new file.",
    "report": "A run as one offline HTML file.",
}


@click.group("rl", cls=LazyGroup, commands_of=__name__, known=COMMANDS)
def command() -> None:
    """Teach and heal: LoRA adapters trained on the very bits of BASE, which never change.

    BASE is a GGUF or a folder, quantized or not; its packed weights stay packed.
    """
