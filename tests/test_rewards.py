"""Rewards: what they give, what they refuse, and what must not be mistaken for a right answer."""

from __future__ import annotations

import functools
import math
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quantkit.errors import RewardError
from quantkit.rl import rewards as library
from quantkit.rl.rewards import (
    Tags,
    answer_score,
    approximate_format,
    by_name,
    checked,
    checklist,
    compared,
    exact_format,
    first_number,
    gsm8k_answer,
    gsm8k_rewards,
    language,
    length,
    load_file,
    load_rewards,
    named,
    no_repetition,
    number_score,
    numeric_distance,
    parse_number,
    pattern,
    scored,
    solution,
    string_distance,
    text_of,
)
from quantkit.rl.rewards.scripts import LANGUAGES, PREFIXES
from quantkit.rl.rewards.shape import edits

PERFECT = "Two and two make four.</start_working_out><SOLUTION>4</SOLUTION>"


def one(reward, completion, **columns):
    """The reward of a single completion; columns hold single values."""
    return reward(prompts=["p"], completions=[completion], **{name: [value] for name, value in columns.items()})[0]


def answered(text):
    return f"Thoughts.</start_working_out><SOLUTION>{text}</SOLUTION>"


def total(completion, answer="4"):
    return sum(one(reward, completion, answer=answer) for reward in gsm8k_rewards())


# What a completion is


def test_text_of_both_kinds_of_completion():
    assert text_of("as it is ") == "as it is "
    assert text_of([{"role": "assistant", "content": "as it is "}]) == "as it is "
    assert text_of([]) == ""
    turns = [
        {"role": "assistant", "content": "let me look"},
        {"role": "tool", "content": "<SOLUTION>5</SOLUTION>"},
        {"role": "assistant", "content": [{"type": "text", "text": "it is "}, {"type": "text", "text": "4"}]},
        {"role": "assistant", "content": None},
    ]
    assert text_of(turns) == "let me look\nit is 4\n"


@pytest.mark.parametrize("completion", [None, 4, ["text"], {"role": "assistant"}])
def test_completions_without_text_are_refused(completion):
    with pytest.raises(RewardError, match="neither text nor messages"):
        text_of(completion)


def test_names_are_what_trl_logs():
    assert [reward.__name__ for reward in gsm8k_rewards()] == [
        "exact_format",
        "approximate_format",
        "answer_score",
        "number_score",
    ]
    plain = lambda prompts, completions, **columns: [1.0]  # noqa: E731
    assert named("one", plain).__name__ == "one" and plain.__name__ == "<lambda>"
    assert one(named("one", plain), "x") == 1.0


def test_all_names_exist():
    assert all(hasattr(library, name) for name in library.__all__) and list(library.__all__) == sorted(library.__all__)


def test_a_missing_column_or_one_of_another_length_is_named():
    with pytest.raises(RewardError, match=r"answer_score needs the column 'answer' with 1 values.*there are question"):
        one(answer_score(), PERFECT, question="q")
    with pytest.raises(RewardError, match="needs the column 'answer' with 2 values"):
        answer_score()(prompts=["p"] * 2, completions=[PERFECT] * 2, answer=["4"])
    with pytest.raises(RewardError, match="entry 0 is a list"):
        one(answer_score(), PERFECT, answer=["4"])


@pytest.mark.parametrize("missing", [None, "", "  ", math.nan])
def test_rewards_do_not_apply_without_a_reference(missing):
    for reward in (answer_score(), number_score(), string_distance(), numeric_distance()):
        assert one(reward, answered(""), answer=missing) is None


def test_other_columns_of_the_trainer_do_not_disturb():
    extra = {"completion_ids": [[1]], "trainer_state": object(), "log_metric": print}
    assert sum(r(prompts=["p"], completions=[PERFECT], answer=["4"], **extra)[0] for r in gsm8k_rewards()) == 13


# The format


def test_a_perfect_completion_of_the_defaults_scores_13():
    assert total(PERFECT) == 3 + 3 * 0.5 + 5 + 3.5 == 13
    assert total([{"role": "assistant", "content": PERFECT}]) == 13


@pytest.mark.parametrize(
    "completion",
    [
        PERFECT,
        "<start_working_out>" + PERFECT,
        " \n<start_working_out>\n" + PERFECT + "\n",
        "a\nb</start_working_out>\n\n <SOLUTION>\n4\n</SOLUTION> \n",
        PERFECT + "<|im_end|>",
        PERFECT + " <end_of_turn>\n",
    ],
)
def test_formats_that_count(completion):
    assert one(exact_format(), completion) == 3


BROKEN = {
    "nothing": "",
    "no tags": "Hello Hello Hello → 4",
    "no reasoning": "</start_working_out><SOLUTION>4</SOLUTION>",
    "blank reasoning": "<start_working_out> \n</start_working_out><SOLUTION>4</SOLUTION>",
    "empty solution": "a</start_working_out><SOLUTION></SOLUTION>",
    "blank solution": "a</start_working_out><SOLUTION> \n</SOLUTION>",
    "text between": "a</start_working_out>so<SOLUTION>4</SOLUTION>",
    "text behind": PERFECT + " That is all.",
    "text before the opening": "Well: <start_working_out>" + PERFECT,
    "two openings": "<start_working_out><start_working_out>" + PERFECT,
    "opening behind": PERFECT + "<start_working_out>",
    "two ends": "a</start_working_out>" + PERFECT,
    "two solutions": PERFECT + "<SOLUTION>5</SOLUTION>",
    "nested solutions": "a</start_working_out><SOLUTION><SOLUTION>4</SOLUTION></SOLUTION>",
    "nested reasoning": "a</start_working_out><SOLUTION><start_working_out>4</SOLUTION>",
    "answer before the reasoning": "<SOLUTION>4</SOLUTION>a</start_working_out>",
    "closed before it opens": "a</start_working_out></SOLUTION>4<SOLUTION>",
    "not closed": "a</start_working_out><SOLUTION>4",
    "other case": "a</start_working_out><solution>4</solution>",
    "two perfect ones": PERFECT + PERFECT,
    "two end tokens": PERFECT + "<eos><eos>",
}


@pytest.mark.parametrize("name", BROKEN)
def test_formats_that_do_not_count(name):
    assert one(exact_format(), BROKEN[name]) == 0


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (PERFECT, 1.5),
        ("Hello Hello Hello → 4", -3),
        ("a</start_working_out><SOLUTION>4", 0),
        (PERFECT + PERFECT, -3),
        (PERFECT + "<SOLUTION>", 0),
        ("<start_working_out>", -3),
    ],
)
def test_approximate_format_counts_each_tag(completion, score):
    assert one(approximate_format(), completion) == score


def test_tags_in_the_prompt_do_not_count():
    prompt = [{"role": "user", "content": "Answer like this: " + PERFECT}]
    for reward, score in zip(gsm8k_rewards(), (0, -3, -2, -2.5), strict=True):
        assert reward(prompts=[prompt], completions=["4"], answer=["4"]) == [score]


def test_words_without_tags_get_neither_format_nor_answer():
    assert total("Hello Hello Hello → 4") == 0 - 3 - 2 - 2.5


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (PERFECT, "4"),
        ("<SOLUTION> 4\n</SOLUTION>", " 4\n"),
        (BROKEN["empty solution"], ""),
        (BROKEN["text behind"], "4"),
        *((BROKEN[name], None) for name in ("nothing", "no tags", "two solutions", "nested solutions", "nested reasoning")),
        *((BROKEN[name], None) for name in ("answer before the reasoning", "closed before it opens", "not closed", "other case")),
        ("<SOLUTION>4</SOLUTION> <start_working_out> and so on", None),
    ],
)
def test_solution(text, found):
    assert solution(text) == found


def test_an_answer_is_worth_nothing_before_the_reasoning_or_twice():
    for name in ("answer before the reasoning", "two solutions", "nested solutions", "two perfect ones"):
        assert one(answer_score(), BROKEN[name], answer="4") == -2
        assert one(number_score(), BROKEN[name], answer="4") == -2.5


def test_nothing_broken_scores_as_much_as_the_perfect_one():
    assert all(total(completion) <= 10 for completion in BROKEN.values())


def test_other_tags():
    tags = Tags("<think>", "</think>", "<answer>", "</answer>")
    completion = "<think>so</think>\n<answer>4</answer>"
    assert sum(one(reward, completion, answer="4") for reward in gsm8k_rewards(tags)) == 13
    assert total(completion) == -7.5


@pytest.mark.parametrize(
    "values", [{"solution_start": ""}, {"solution_end": "<SOLUTION>"}, {"reasoning_end": "SOL"}, {"solution_start": " <A>"}]
)
def test_tags_that_cannot_be_told_apart_are_refused(values):
    with pytest.raises(RewardError, match="the tag"):
        Tags(**values)


# The answer


@pytest.mark.parametrize(
    ("guess", "true", "score"),
    [
        ("4", "4", 5),
        ("Paris", "Paris", 5),
        (" 4\n", "4", 3.5),
        ("4", "4 ", 3.5),
        ("4.0", "4", 2),
        ("$1,200.", "1200", 2),
        ("90", "100", 2),
        ("110", "100", 2),
        ("89", "100", 1.5),
        ("111", "100", 1.5),
        ("80", "100", 1.5),
        ("120", "100", 1.5),
        ("79", "100", -2.5),
        ("121", "100", -2.5),
        ("-4", "4", -2.5),
        ("-95", "-100", 2),
        ("four", "4", -2),
        ("4", "four", -2),
        ("4 eggs", "4", -2),
        ("paris", "Paris", -2),
        ("", "4", -2),
        (" ", "4", -2),
        ("0", "0", 5),
        ("0.0", "0", 2),
        ("-0", "0", 2),
        ("0.000001", "0", -2.5),
        ("1", "0", -2.5),
        ("0", "5", -2.5),
        ("9" * 10_000, "4", -2),
        ("1e308", "1e-300", -2.5),
        ("nan", "4", -2),
        ("inf", "4", -2),
        ("4", 4, 5),
        ("4", 4.0, 5),
        ("0.34", 0.34, 5),
        ("4", 10**400, -2),
    ],
)
def test_answer_score(guess, true, score):
    assert one(answer_score(), answered(guess), answer=true) == score


@pytest.mark.parametrize(
    ("guess", "true", "score"),
    [
        ("4", "4", 3.5),
        ("4 eggs, 2 hens", "4", 3.5),
        ("2 hens, 4 eggs", "4", -1.5),
        ("about $12,345, I think", "12345", 3.5),
        ("0.34", "0.34", 3.5),
        ("It is -3.", "-3", 3.5),
        ("It is −3.", "-3", 3.5),
        ("50%", "50", 3.5),
        ("0", "0", 3.5),
        ("four", "4", -2.5),
        ("", "4", -2.5),
        ("1,2,3", "1", -2.5),
        ("9" * 10_000, "4", -2.5),
        ("4", "four", None),
        ("4", "9" * 10_000, None),
    ],
)
def test_number_score(guess, true, score):
    assert one(number_score(), answered(guess), answer=true) == score


def test_other_columns():
    assert one(answer_score(column="label"), PERFECT, label="4") == 5
    assert one(number_score(column="label"), PERFECT, label="4") == 3.5


NUMBERS = {
    "12,345": 12345, "1,234,567.5": 1234567.5, "$18": 18, "-$3": -3, "$ 18": 18, " 0.34 ": 0.34, "-3": -3, "+3": 3, "−3": -3, "18.": 18,
    "1e3": 1000, "1E-3": 0.001, ".5": 0.5, "50%": 50, "50 %.": 50, "1/4": 0.25, "-1/4": -0.25, "007": 7, "0e999": 0, "0/5": 0, "\t4\n": 4,
}  # fmt: skip
NO_NUMBERS = [
    "", " ", ".", "-", "$", "%", "1,2,3", "1,23", "1234,567", ",123", "12,", "nan", "inf", "-inf", "Infinity", "12 13", "1..2", "1.2.3", "18..",
    "--3", "1_000", "0x10", "four", "4 eggs", "1e", "e3", "1e999", "-1e999", "1e-999", "9" * 10_000, "1/0", "1/0.0", "1/" + "9" * 400, "/4",
    "1/2/3", "٣", "４", "½", "\x00", "1\x002",
]  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers(text):
    assert parse_number(text) == NUMBERS[text]


@pytest.mark.parametrize("text", NO_NUMBERS, ids=lambda text: repr(text[:12]))
def test_no_numbers(text):
    assert parse_number(text) is None


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.text("0123456789.,-+−$%eE/ "), st.from_regex(r"[-+]?[0-9]{1,400}e[-+]?[0-9]{1,6}")))
def test_parsing_never_raises_and_finds_finite_numbers_only(text):
    for found in (parse_number(text), first_number(text)):
        assert found is None or (isinstance(found, float) and math.isfinite(found))
    assert parse_number(f" {text}\n") == parse_number(text)


@settings(max_examples=100, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_is_read_back(value):
    assert parse_number(repr(value)) == value == first_number(f"It is {value!r}, no doubt.")
    if abs(value) < 1e15:
        assert parse_number(f"{value:,.3f}") == float(f"{value:.3f}")


@pytest.mark.parametrize("text", ["9" * 200_000, "1," * 100_000, "1,234" * 50_000, "1,234," * 50_000, "-" * 200_000, "$ " * 100_000, "1e" * 100_000,
                                  "0." + "9" * 200_000, "1/" * 100_000, " " * 200_000, "." * 200_000, "1,111" + ",111" * 50_000 + "x"], ids=lambda t: t[:8])  # fmt: skip
def test_long_texts_take_no_time(text):
    start = time.process_time()
    parse_number(text), first_number(text), gsm8k_answer(text)
    for reward in gsm8k_rewards():
        one(reward, answered(text), answer="4")
    assert time.process_time() - start < 1


def test_gsm8k_answer():
    assert gsm8k_answer("She has 9 * 2 = 18.\n#### 18") == "18"
    assert gsm8k_answer("#### 1 #### 1,000 \n") == "1,000"
    assert gsm8k_answer("18") is None and gsm8k_answer("#### ") == ""


@settings(max_examples=200, deadline=None)
@given(st.integers(-10_000, 10_000), st.integers(-12_000, 12_000), st.integers(-12_000, 12_000))
def test_a_closer_number_never_scores_less(true, near, far):
    assume(abs(near - true) <= abs(far - true))
    scores = [one(answer_score(), answered(str(guess)), answer=str(true)) for guess in (near, far)]
    assert scores[0] >= scores[1]


@settings(max_examples=100, deadline=None)
@given(
    st.text(st.characters(exclude_characters="<>"), max_size=20),
    st.text(st.characters(exclude_characters="<>"), min_size=1, max_size=20),
)
def test_the_same_text_scores_best(guess, true):
    assume(guess.strip() and true.strip())
    best = one(answer_score(), answered(true), answer=true)
    spaced = one(answer_score(), answered(f" {true} "), answer=true)
    other = one(answer_score(), answered(guess), answer=true)
    assert best == 5 and spaced == 3.5 and other <= 5 and (other == 5) == (guess == true)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_rewards_are_deterministic_and_of_each_completion_alone(text):
    rewards = [
        *gsm8k_rewards(),
        string_distance(),
        numeric_distance(),
        language("en"),
        checklist(["a"]),
        no_repetition(2),
        length(3, 9),
    ]
    for reward in rewards:
        alone = [one(reward, completion, answer="4") for completion in (text, PERFECT)]
        together = reward(prompts=["p"] * 3, completions=[PERFECT, text, PERFECT], answer=["4"] * 3)
        assert together == [alone[1], alone[0], alone[1]]


# The shape


def table(a, b):
    """The Levenshtein distance, cell by cell."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


@settings(max_examples=150, deadline=None)
@given(st.text("abc", max_size=12), st.text("abcд", max_size=12))
def test_edits_equal_the_table(a, b):
    assert edits(a, b) == table(a, b) == edits(b, a)


@pytest.mark.parametrize(
    ("text", "reference", "score"), [("kitten", "kitten", 1), ("sitting", "kitten", 1 - 3 / 7), ("", "abc", 0), ("xyz", "abc", 0)]
)
def test_string_distance(text, reference, score):
    assert one(string_distance(), text, answer=reference) == pytest.approx(score)
    assert one(string_distance("label", Tags()), answered(text), label=reference) == pytest.approx(score)


def test_string_distance_of_long_texts_is_bounded():
    start = time.process_time()
    assert one(string_distance(), "ab" * 500_000, answer="ab" * 1000) == 1
    assert (
        one(string_distance(), "no tags", answer="no tags") == 1
        and one(string_distance(tags=Tags()), "no tags", answer="no tags") == 0
    )
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ("4", "4", 1),
        ("6", "4", math.exp(-0.5)),
        ("0.5", "0", math.exp(-0.5)),
        ("-100", "100", math.exp(-2)),
        ("1e308", "-1e308", math.exp(-2)),
        ("four", "4", 0),
        ("4 eggs", "4", 0),
        ("4", "four", None),
    ],
)
def test_numeric_distance(text, reference, score):
    found = one(numeric_distance(), text, answer=reference)
    assert found == (score if score is None else pytest.approx(score, abs=1e-12))


def test_numeric_distance_inside_tags():
    assert one(numeric_distance(tags=Tags()), answered("4 eggs"), answer="4") == 1
    assert one(numeric_distance(tags=Tags()), "4", answer="4") == 0


@pytest.mark.parametrize(
    ("size", "score"), [(0, 0), (5, 0), (6, 0.2), (9, 0.8), (10, 1), (20, 1), (25, 0.75), (30, 0.5), (40, 0), (99, 0)]
)
def test_length(size, score):
    assert one(length(10, 20), "x" * size) == pytest.approx(score)
    assert one(length(10, 20, "words"), " x\n" * size) == pytest.approx(score)


def test_length_without_a_minimum():
    assert one(length(0, 5), "") == 1


@pytest.mark.parametrize("values", [(5, 4), (-1, 4), (0, 0), (1, 2, "tokens")])
def test_lengths_that_cannot_be(values):
    with pytest.raises(RewardError, match="length cannot"):
        length(*values)


def test_pattern():
    assert one(pattern(r"^\d+$"), "123") == 1 and one(pattern(r"^\d+$"), "a 123") == 0
    assert one(pattern("b"), "a" * 20_000 + "b") == 0 and one(pattern("b"), "a" * 19_999 + "b") == 1


@pytest.mark.parametrize("regex", ["(", "a{99999999999999999999}", "[z-a]", None])
def test_patterns_that_do_not_compile(regex):
    with pytest.raises(RewardError, match="no regular expression"):
        pattern(regex)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("en", "The cat sat, naïvely: 100 %!"),
        ("ru", "Кошка сидела. 5"),
        ("el", "Η γάτα"),
        ("zh", "猫坐在那里。"),
        ("ja", "猫はソファーに座る人々。"),
        ("ko", "고양이가 앉았다."),
        ("ar", "جلست القطة"),
        ("he", "החתול ישב"),
        ("hi", "बिल्ली बैठी"),
        ("th", "แมวนั่ง"),
    ],
)
def test_language(code, text):
    assert one(language(code), text) == 1
    assert one(language("en" if code != "en" else "ru"), text) == 0


def test_language_shares():
    assert one(language("en"), "ab яя") == 0.5 and one(language(["en", "ru"]), "ab яя") == 1
    assert one(language("en"), "12 + 3 = 15") == 0 == one(language("en"), "")
    assert set().union(*LANGUAGES.values()) == set(PREFIXES)


@pytest.mark.parametrize("codes", ["xx", ["en", "english"], [], ""])
def test_unknown_languages(codes):
    with pytest.raises(RewardError, match="language"):
        language(codes)


@pytest.mark.parametrize(
    ("text", "score"),
    [("I saw new\n york and a CAT.", 1), ("New Yorkers like the cat", 0.5), ("concatenate", 0), ("", 0), ("cat cat cat", 0.5)],
)
def test_checklist(text, score):
    assert one(checklist(["New York", "cat"]), text) == score


def test_checklist_of_other_signs_and_scripts():
    assert one(checklist(["C++", "(a|b)*"]), "I like c++, and (a|b)*.") == 1
    assert one(checklist("北京"), "我在北京住") == 1


@pytest.mark.parametrize("items", [[], ["a", " "], "", [3]])
def test_checklists_that_cannot_be(items):
    with pytest.raises(RewardError, match="blank item"):
        checklist(items)


@pytest.mark.parametrize(
    ("text", "score"), [("a b c d e", 1), ("a b A b a b", 2 / 5), ("x " * 101, 0.01), ("word", 1), ("", 0), (" \n", 0)]
)
def test_no_repetition(text, score):
    assert one(no_repetition(2), text) == pytest.approx(score)


def test_no_repetition_of_nothing():
    with pytest.raises(RewardError, match="runs of 0 words"):
        no_repetition(0)


# Loading


def written(tmp_path, text):
    path = tmp_path / "rewards.py"
    path.write_text(text)
    return path


def test_functions_of_a_file_in_their_order(tmp_path):
    path = written(tmp_path, """
from __future__ import annotations
from dataclasses import dataclass
from quantkit.rl.rewards import compared, named, text_of

@dataclass(frozen=True)
class Size:
    value: float

def second(prompts, completions, **columns):
    return [Size(1.0).value for _ in completions]

def first(prompts, completions, answer, **columns):
    return [float(text_of(c) == a) for c, a in zip(completions, answer)]

def helper(text):
    return text

def _private(prompts, completions):
    return []

again = second
WEIGHTS = [2, 0.5]
""")  # fmt: skip
    found = load_file(path)
    assert [reward.__name__ for reward in found.rewards] == ["second", "first"] and found.weights == [2.0, 0.5]
    assert one(found.rewards[1], "x", answer="x") == 1
    assert not (tmp_path / "__pycache__").exists()


def test_a_list_comes_before_functions_and_edits_are_seen(tmp_path):
    text = "from quantkit.rl.rewards import exact_format, length\ndef other(prompts, completions): return []\nREWARDS = [exact_format(), length(1, {})]\n"
    first = load_rewards(written(tmp_path, text.format(2)))
    second = load_rewards(written(tmp_path, text.format(8)))
    assert [reward.__name__ for reward in first] == ["exact_format", "length"]
    assert one(first[1], "12345678") == 0 and one(second[1], "12345678") == 1
    assert load_file(tmp_path / "rewards.py").weights is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no rewards"),
        ("def f(text): return 1", "has no rewards"),
        ("from quantkit.rl.rewards import exact_format", "has no rewards"),
        ("REWARDS = []", "has no rewards"),
        ("REWARDS = 'exact_format'", "REWARDS in .* is a str"),
        ("REWARDS = ['exact_format']", r"REWARDS\[0\] in .* is a str without a name"),
        ("import functools\nREWARDS = [functools.partial(print)]", r"REWARDS\[0\] in .* is a partial without a name"),
        ("REWARDS = [dict]", "cannot be called"),
        ("f = lambda prompts, completions: []\nREWARDS = [f, f]", "two rewards named <lambda>"),
        ("x = 1\n\ny = 1 / 0\n", r"ZeroDivisionError: division by zero \(rewards.py, line 3\)"),
        ("def f():\n    return {}['key']\n\nf()", r"KeyError: 'key' \(rewards.py, line 2\)"),
        ("import json\njson.loads('{')", r"JSONDecodeError.*\(rewards.py, line 2\)"),
        ("x = 1\ndef f(:\n  pass", r"SyntaxError.*\(rewards.py, line 2\)"),
        ("import no_such_package", r"ModuleNotFoundError.*no_such_package.*line 1"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("x = '\0'", "null bytes"),
        ("def f(prompts, completions): return []\nWEIGHTS = [1, 2]", "WEIGHTS in .* has 2 entries for 1 rewards"),
        ("def f(prompts, completions): return []\nWEIGHTS = 1", "WEIGHTS in .* has the type int for 1 rewards"),
        ("def f(prompts, completions): return []\nWEIGHTS = ['1']", r"WEIGHTS\[0\] in .* is '1'"),
        ("def f(prompts, completions): return []\nWEIGHTS = [float('nan')]", r"WEIGHTS\[0\] in .* is nan"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, text, words):
    with pytest.raises(RewardError, match=words):
        load_rewards(written(tmp_path, text))


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(RewardError, match=r"nowhere.py cannot be read \(No such file"):
        load_rewards(tmp_path / "nowhere.py")


def test_library_rewards_by_name():
    for name in (
        "exact_format",
        "approximate_format",
        "answer_score",
        "number_score",
        "string_distance",
        "numeric_distance",
        "no_repetition",
    ):
        assert by_name(f"library:{name}").__name__ == by_name(name).__name__ == name
    tags = Tags("<think>", "</think>", "<answer>", "</answer>")
    assert one(by_name("library:exact_format", tags), "so</think><answer>4</answer>") == 3
    for name in ("length", "pattern", "language", "checklist"):
        with pytest.raises(RewardError, match=f"{name} needs settings.*import {name}"):
            by_name(f"library:{name}")
    with pytest.raises(RewardError, match="unknown reward 'library:nothing'.*library:exact_format"):
        by_name("library:nothing")


# The guard


def giving(values):
    return named("mine", lambda prompts, completions, **columns: values)


def test_a_guarded_reward_is_the_same_one():
    assert checked(giving([1, None, True])).__name__ == "mine"
    found = checked(giving([1, None, True]))(["p"] * 3, ["a", "b", "c"])
    assert found == [1.0, None, 1.0] and [type(value) for value in found] == [float, type(None), float]
    assert [checked(reward)(["p"], [PERFECT], answer=["4"]) for reward in gsm8k_rewards()] == [[3], [1.5], [5], [3.5]]
    assert checked(giving([]))([], []) == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0], r"mine returned 1 values for 2 completions; the first without one is 1 \('second'\)"),
        ([1.0] * 3, "mine returned 3 values for 2 completions"),
        (1.0, "mine returned a float for 2 completions, not a list"),
        (None, "mine returned a NoneType"),
        ("ab", "mine returned a str"),
        ([0.0, math.nan], r"mine gave completion 1 \('second'\) the float nan"),
        ([-math.inf, 0.0], r"mine gave completion 0 \('first'\) the float -inf"),
        ([0.0, "1"], r"completion 1 \('second'\) the str '1'"),
        ([0.0, 1j], "the complex 1j"),
        ([0.0, [1.0]], "the list"),
        ([10**5000, 0.0], "completion 0 .* the int inf"),
    ],
)
def test_values_that_are_no_rewards(values, words):
    with pytest.raises(RewardError, match=words):
        checked(giving(values))(["p"] * 2, ["first", "second"])


def test_an_exception_names_the_completion_that_causes_it():
    def mine(prompts, completions, answer, **columns):
        return [float(completion) / value for completion, value in zip(completions, answer, strict=True)]

    long = "7" * 200
    with pytest.raises(
        RewardError, match=rf"mine failed for completion 2 \('{'7' * 80}'\): ZeroDivisionError: .*test_rewards.py, line \d+"
    ):
        checked(mine)(["p"] * 3, ["1", "2", long], answer=[1, 1, 0])
    with pytest.raises(RewardError, match=r"completion 1 \('two'\): ValueError"):
        checked(mine)(["p"] * 3, ["1", "two", "3"], answer=[1, 1, 1])
    with pytest.raises(RewardError, match=r"TypeError: .*'answer'"):
        checked(mine)(["p"], ["1"])


def test_an_exception_of_all_together():
    def mine(prompts, completions, **columns):
        if len(completions) > 1:
            raise ValueError("too many")
        return [1.0]

    with pytest.raises(RewardError, match="mine failed for 2 completions together: ValueError: too many"):
        checked(mine)(["p"] * 2, ["a", "b"])


def test_errors_of_the_library_keep_their_hint():
    with pytest.raises(
        RewardError, match=r"answer_score failed for completion 0 .*needs the column 'answer'.*there are question"
    ):
        checked(answer_score())(["p"], [PERFECT], question=["q"])
    with pytest.raises(RewardError, match="completion 1 .*neither text nor messages"):
        checked(exact_format())(["p"] * 2, [PERFECT, 3])


def test_rewards_without_a_name_and_asynchronous_ones_are_refused():
    with pytest.raises(RewardError, match=r"partial has no name; wrap it: named\("):
        checked(functools.partial(print))

    async def mine(prompts, completions, **columns):
        return [1.0]

    with pytest.raises(RewardError, match="mine returned a coroutine.*without async"):
        checked(mine)(["p"], ["a"])


def test_own_rewards_from_a_score():
    assert one(scored("size", lambda text: float(len(text))), [{"role": "assistant", "content": "four"}]) == 4
    same = compared("same", "label", lambda text, reference: float(text == reference))
    assert same.__name__ == "same" and one(same, "4", label=4) == 1 and one(same, "4", label=None) is None
