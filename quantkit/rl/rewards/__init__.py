"""Rewards for GRPO: callables ``reward(prompts, completions, **columns)`` that score completions, as TRL takes them."""

from quantkit.rl.rewards.answers import answer_score, first_number, gsm8k_answer, number_score, parse_number
from quantkit.rl.rewards.audit import Audit, audited
from quantkit.rl.rewards.base import Reward, compared, named, scored, text_of
from quantkit.rl.rewards.checked import checked
from quantkit.rl.rewards.code import code_reward
from quantkit.rl.rewards.judge import Judge, judge
from quantkit.rl.rewards.learned import learned
from quantkit.rl.rewards.loading import RewardFile, by_name, load_file, load_rewards
from quantkit.rl.rewards.shape import checklist, language, length, no_repetition, numeric_distance, pattern, string_distance
from quantkit.rl.rewards.tags import DEFAULT, Tags, approximate_format, exact_format, solution


def gsm8k_rewards(tags: Tags = DEFAULT) -> list[Reward]:
    """Format and answer of word problems with a number for an answer: from −7.5 to +13 in all."""
    return [exact_format(tags), approximate_format(tags), answer_score(tags), number_score(tags)]


__all__ = [
    "Audit",
    "Judge",
    "Reward",
    "RewardFile",
    "Tags",
    "answer_score",
    "approximate_format",
    "audited",
    "by_name",
    "checked",
    "checklist",
    "code_reward",
    "compared",
    "exact_format",
    "first_number",
    "gsm8k_answer",
    "gsm8k_rewards",
    "judge",
    "language",
    "learned",
    "length",
    "load_file",
    "load_rewards",
    "named",
    "no_repetition",
    "number_score",
    "numeric_distance",
    "parse_number",
    "pattern",
    "scored",
    "solution",
    "string_distance",
    "text_of",
]
