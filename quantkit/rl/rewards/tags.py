"""The format of reasoning: thoughts, then the answer, each between tags."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.errors import RewardError
from quantkit.rl.rewards.base import Reward, scored


@dataclass(frozen=True)
class Tags:
    """What a completion is divided by. reasoning_start may be there or not: the prompt often ends with it.

    ends: texts that may close a completion, for trainers that leave them in. Raises RewardError for a tag that is empty,
    surrounded by spaces, or part of another one.
    """

    reasoning_start: str = "<start_working_out>"
    reasoning_end: str = "</start_working_out>"
    solution_start: str = "<SOLUTION>"
    solution_end: str = "</SOLUTION>"
    ends: tuple[str, ...] = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>", "<eos>", "</s>")

    def __post_init__(self) -> None:
        tags = (self.reasoning_start, *self.required)
        for place, tag in enumerate(tags):
            if not tag or tag != tag.strip():
                raise RewardError(f"the tag {tag!r} is empty or surrounded by spaces", hint="give a word in brackets")
            for other in tags[:place] + tags[place + 1 :]:
                if tag in other:
                    raise RewardError(f"the tag {tag!r} is part of the tag {other!r}", hint="give four different tags")

    @property
    def required(self) -> tuple[str, str, str]:
        """The three tags that the completion itself must contain."""
        return self.reasoning_end, self.solution_start, self.solution_end


DEFAULT = Tags()


def solution(text: str, tags: Tags = DEFAULT) -> str | None:
    """What stands between the tags of the solution, spaces included.

    None if there is no such place or more than one, or if reasoning begins or ends behind it: then it is no answer yet.
    """
    if text.count(tags.solution_start) != 1 or text.count(tags.solution_end) != 1:
        return None
    _, _, rest = text.partition(tags.solution_start)
    inside, closed, _ = rest.partition(tags.solution_end)
    reasons_on = tags.reasoning_start in rest or tags.reasoning_end in rest
    return inside if closed and not reasons_on else None


def exact_format(tags: Tags = DEFAULT) -> Reward:
    """+3 if the whole completion is reasoning, its end, and the solution between its tags; else 0.

    Each tag once, the opening one only at the very start. Space is allowed between the parts and at both ends, and one of
    ``tags.ends`` may follow. Neither reasoning nor solution may be blank.
    """
    return scored("exact_format", lambda text: 3.0 if _follows(text, tags) else 0.0)


def approximate_format(tags: Tags = DEFAULT) -> Reward:
    """For each of the three required tags +0.5 if it occurs exactly once, else −1: from −3 to +1.5. Order does not count."""
    return scored("approximate_format", lambda text: sum(0.5 if text.count(tag) == 1 else -1.0 for tag in tags.required))


def _follows(text: str, tags: Tags) -> bool:
    if any(text.count(tag) != 1 for tag in tags.required):
        return False
    text = text.strip()
    end = next((end for end in tags.ends if end and text.endswith(end)), "")
    reasoning, _, rest = text.removesuffix(end).strip().removeprefix(tags.reasoning_start).partition(tags.reasoning_end)
    rest = rest.strip()
    answer = rest.removeprefix(tags.solution_start).removesuffix(tags.solution_end)
    framed = len(rest) - len(answer) == len(tags.solution_start) + len(tags.solution_end)
    return framed and tags.reasoning_start not in text[1:] and bool(reasoning.strip()) and bool(answer.strip())
