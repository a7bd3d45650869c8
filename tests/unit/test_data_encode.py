from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.data import Encoded, Example, encode, read_records, render_prompt
from lorasmith.errors import ConfigError, DataError
from tests.support.tokenizer import BOS, DEFAULT_SYSTEM, EOS, IM_END, ByteTokenizer

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
HEAD = (
    f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
)


def encoded(row: dict[str, object], tokenizer: ByteTokenizer, max_length: int = 1000) -> Encoded:
    return encode(read_records([row]), tokenizer, max_length=max_length)


def view(example: Example, tokenizer: ByteTokenizer) -> list[tuple[str, bool]]:
    """Runs of tokens with the same mask, as text."""
    runs: list[tuple[str, bool]] = []
    for token, mask in zip(example.tokens, example.supervised, strict=True):
        text = tokenizer.decode([token])
        if runs and runs[-1][1] == mask:
            runs[-1] = (runs[-1][0] + text, bool(mask))
        else:
            runs.append((text, bool(mask)))
    return runs


def only(made: Encoded) -> Example:
    assert len(made.examples) == 1
    return made.examples[0]


def test_chat_supervises_the_answer_and_its_end_of_turn_token_by_token() -> None:
    tokenizer = ByteTokenizer()
    made = encoded({"messages": [USER, ANSWER]}, tokenizer)
    example = only(made)
    assert example.tokens.tolist() == [*tokenizer.encode(HEAD), ord("y"), ord("o"), IM_END]
    assert example.supervised.tolist() == [False] * (len(example) - 3) + [True] * 3
    assert (example.tokens.dtype, example.supervised.dtype) == (np.int32, np.bool_)
    assert made.problems == []


def test_prompt_and_completion_are_a_user_turn_and_an_answer() -> None:
    tokenizer = ByteTokenizer()
    pair = only(encoded({"prompt": "hi", "completion": "yo"}, tokenizer))
    chat = only(encoded({"messages": [USER, ANSWER]}, tokenizer))
    assert pair.tokens.tolist() == chat.tokens.tolist()
    assert pair.supervised.tolist() == chat.supervised.tolist()


def test_every_answer_of_a_dialogue_carries_loss_and_the_newline_after_it_does_not() -> None:
    tokenizer = ByteTokenizer()
    system = {"role": "system", "content": "S"}
    messages = [
        system,
        USER,
        ANSWER,
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "b"},
        USER,
    ]
    assert view(only(encoded({"messages": messages}, tokenizer)), tokenizer) == [
        ("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False),
        ("yo<|im_end|>", True),
        ("\n<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n", False),
        ("b<|im_end|>", True),
    ]


def test_messages_in_the_prompt_column_never_carry_loss() -> None:
    tokenizer = ByteTokenizer()
    row = {"prompt": [USER, ANSWER, USER], "completion": [{"role": "assistant", "content": "end"}]}
    (_, first), (text, second) = view(only(encoded(row, tokenizer)), tokenizer)
    assert (first, second, text) == (False, True, "end<|im_end|>")


def test_segments_are_tokenised_apart() -> None:
    # The pair "\ny" would become one token across the border between prompt and answer.
    tokenizer = ByteTokenizer(merges=["\ny"])
    assert tokenizer.encode(HEAD + "yo<|im_end|>")[-3:] == [260, ord("o"), IM_END]
    row = {"messages": [USER, ANSWER]}
    example = only(encoded(row, tokenizer))
    assert example.tokens.tolist()[-4:] == [ord("\n"), ord("y"), ord("o"), IM_END]
    assert render_prompt([USER], tokenizer) == example.tokens[:-3].tolist()


@given(st.lists(st.sampled_from(["y", "\n", " x", "\ny<|im_end|>", "é"]), min_size=1, max_size=4))
def test_training_sees_the_prompt_that_inference_sees(contents: list[str]) -> None:
    tokenizer = ByteTokenizer(merges=["\ny", "\n\n"])
    messages = [{"role": role, "content": f"{text}."} for text in contents for role in ("user", "assistant")]
    record = read_records([{"messages": messages}]).records[0]
    example = only(encode([record], tokenizer, max_length=10_000))
    prompt = render_prompt(record, tokenizer)
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert example.supervised[len(prompt) :].all()
    assert not example.supervised[len(prompt) - 1]
    assert render_prompt(messages[:-1], tokenizer) == prompt


def test_without_a_template_the_completion_and_eos_carry_loss() -> None:
    tokenizer = ByteTokenizer(chat=False)
    example = only(encoded({"prompt": "ab", "completion": "c"}, tokenizer))
    assert example.tokens.tolist() == [97, 98, 99, EOS]
    assert example.supervised.tolist() == [False, False, True, True]
    assert render_prompt("ab", tokenizer) == [97, 98]


@pytest.mark.parametrize("prompt", ["ab", "<s>ab"])
def test_bos_comes_first_and_once(prompt: str) -> None:
    tokenizer = ByteTokenizer(chat=False, adds_bos=True)
    row = {"prompt": prompt, "completion": "c<|endoftext|>"}
    assert only(encoded(row, tokenizer)).tokens.tolist() == [BOS, 97, 98, 99, EOS]
    assert render_prompt(read_records([row]).records[0], tokenizer) == [BOS, 97, 98]


def test_an_empty_prompt_leaves_the_first_token_unsupervised() -> None:
    tokenizer = ByteTokenizer(chat=False)
    assert only(encoded({"prompt": "", "completion": "c"}, tokenizer)).supervised.tolist() == [False, True]


def test_messages_without_a_template_are_refused_with_advice() -> None:
    with pytest.raises(DataError, match="no chat template"):
        encoded({"messages": [USER, ANSWER]}, ByteTokenizer(chat=False))
    with pytest.raises(DataError, match="no chat template"):
        render_prompt([USER], ByteTokenizer(chat=False))


def test_text_is_supervised_but_for_its_first_token() -> None:
    tokenizer = ByteTokenizer(chat=False)
    example = only(encoded({"text": "abc"}, tokenizer))
    assert example.tokens.tolist() == [97, 98, 99, EOS]
    assert example.supervised.tolist() == [False, True, True, True]
    with pytest.raises(DataError, match="no prompt"):
        render_prompt(read_records([{"text": "abc"}]).records[0], tokenizer)


@given(st.integers(1, 40), st.integers(2, 12))
def test_chunks_of_a_text_predict_each_token_exactly_once(length: int, max_length: int) -> None:
    tokenizer = ByteTokenizer(chat=False)
    text = "".join(chr(97 + i % 26) for i in range(length))
    made = encoded({"text": text}, tokenizer, max_length)
    predicted = np.concatenate([e.tokens[e.supervised] for e in made.examples])
    assert predicted.tolist() == [*text.encode()[1:], EOS]
    assert all(len(e) <= max_length and e.truncated == 0 for e in made.examples)
    assert made.stats.supervised_tokens == length


def test_a_long_prompt_loses_tokens_from_the_left_and_says_so() -> None:
    tokenizer = ByteTokenizer(chat=False)
    made = encoded({"prompt": "abcdef", "completion": "xy"}, tokenizer, max_length=5)
    example = only(made)
    assert tokenizer.decode(example.tokens) == "efxy<|endoftext|>"
    assert example.supervised.tolist() == [False, False, True, True, True]
    assert example.truncated == 4
    assert [(p.kind, p.is_dropped) for p in made.problems] == [("truncated", False)]
    assert (made.stats.truncated_examples, made.stats.truncated_tokens) == (1, 4)


@pytest.mark.parametrize(("max_length", "fits"), [(4, True), (3, False)])
def test_an_answer_is_never_cut(max_length: int, fits: bool) -> None:
    tokenizer = ByteTokenizer(chat=False)
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "abc", "completion": "xy"}]
    made = encode(read_records(rows), tokenizer, max_length=max_length)
    assert len(made.examples) == 1 + fits
    if not fits:
        assert [(p.line, p.kind, p.is_dropped) for p in made.problems] == [(2, "length", True)]
        assert "completion of 3 tokens does not fit max_length=3" in made.problems[0].message


def test_nothing_supervised_is_an_error_with_the_reasons() -> None:
    with pytest.raises(
        DataError, match=r"No token of 1 records would carry loss(.|\n)*does not fit max_length=2"
    ):
        encoded({"prompt": "p", "completion": "long"}, ByteTokenizer(), max_length=2)
    with pytest.raises(DataError, match="No token of 0 records"):
        encode([], ByteTokenizer(), max_length=10)
    with pytest.raises(ConfigError):
        encoded({"text": "abc"}, ByteTokenizer(), max_length=1)


def test_one_token_alone_is_a_problem_and_not_an_example() -> None:
    tokenizer = ByteTokenizer(chat=False)
    tokenizer.eos_token_id = None
    rows = [{"text": "a"}, {"prompt": "", "completion": "b"}, {"text": "ab"}]
    made = encode(read_records(rows), tokenizer, max_length=10)
    assert [(p.line, p.kind) for p in made.problems] == [(1, "no-loss"), (2, "no-loss")]
    assert len(made.examples) == 1


def test_stats() -> None:
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "abc", "completion": "xyz"}]
    stats = encode(read_records(rows), ByteTokenizer(chat=False), max_length=6).stats
    assert (stats.records, stats.examples, stats.tokens, stats.supervised_tokens) == (2, 2, 3 + 6, 2 + 4)
    assert (stats.longest, stats.mean_length, stats.mean_supervised) == (6, 4.5, 3.0)


class Thinking(ByteTokenizer):
    """As Qwen3: an empty thought before the last answer, stripped from the earlier ones."""

    def content(self, messages: Sequence[dict[str, str]], index: int) -> str:
        thought = (
            "<think></think>"
            if messages[index]["role"] == "assistant" and messages[index + 1 :] == []
            else ""
        )
        return thought + super().content(messages, index)


class Trimming(ByteTokenizer):
    def content(self, messages: Sequence[dict[str, str]], index: int) -> str:
        return f"{messages[index]['content'].strip()}<|im_end|>\n"


class Endless(ByteTokenizer):
    def content(self, messages: Sequence[dict[str, str]], index: int) -> str:
        return f"{messages[index]['content']}\n"


class Shouting(ByteTokenizer):
    def content(self, messages: Sequence[dict[str, str]], index: int) -> str:
        return f"{messages[index]['content'].upper()}<|im_end|>\n"


class Opening(ByteTokenizer):
    """A generation prompt that the finished turn does not start with."""

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, str]],
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
    ) -> str:
        text = super().apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
        return text + ("<think>" if add_generation_prompt else "")


def test_a_template_that_rewrites_earlier_turns_supervises_the_last_answer_only() -> None:
    tokenizer = Thinking()
    messages = [USER, ANSWER, USER, ANSWER, USER, {"role": "assistant", "content": "z"}]
    made = encoded({"messages": messages}, tokenizer)
    example = only(made)
    assert [run for run in view(example, tokenizer) if run[1]] == [("<think></think>z<|im_end|>", True)]
    assert [(p.kind, p.is_dropped) for p in made.problems] == [("template", False)]
    assert (
        "only the last answer carries loss: at message 4 the chat template rewrites an earlier turn"
        in str(made.problems[0])
    )
    assert render_prompt(messages[:-1], tokenizer) == example.tokens[~example.supervised].tolist()
    assert render_prompt(messages[:-1], tokenizer) == tokenizer.encode(
        tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)
    )


def test_a_dialogue_that_an_answer_opens_keeps_its_last_answer() -> None:
    tokenizer = ByteTokenizer()
    made = encoded({"messages": [ANSWER, USER, {"role": "assistant", "content": "z"}]}, tokenizer)
    assert view(only(made), tokenizer)[1:] == [("z<|im_end|>", True)]
    assert [(p.kind, p.is_dropped) for p in made.problems] == [("template", False)]


def test_nothing_is_reported_where_the_rewritten_turns_carry_no_loss_anyway() -> None:
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    assert encoded(row, Thinking()).problems == []


def test_a_template_that_trims_the_content() -> None:
    tokenizer = Trimming()
    messages = [USER, {"role": "assistant", "content": "  yo \n"}]
    assert view(only(encoded({"messages": messages}, tokenizer)), tokenizer)[1] == ("yo<|im_end|>", True)


def test_a_prompt_whose_one_earlier_answer_is_rewritten_is_tokenised_whole() -> None:
    tokenizer = Thinking()
    text = tokenizer.apply_chat_template([USER, ANSWER, USER], add_generation_prompt=True)
    assert render_prompt([USER, ANSWER, USER], tokenizer) == tokenizer.encode(text)


def test_the_turn_ends_at_the_first_special_token_after_the_content() -> None:
    class Padded(ByteTokenizer):
        def content(self, messages: Sequence[dict[str, str]], index: int) -> str:
            return f"{messages[index]['content']}<|im_end|>\n<|endoftext|>"

    tokenizer = Padded()
    messages = [USER, {"role": "assistant", "content": "a<|im_start|>b"}]
    runs = view(only(encoded({"messages": messages}, tokenizer)), tokenizer)
    assert runs[1:] == [("a<|im_start|>b<|im_end|>", True)]


def test_a_template_without_an_end_of_turn_token_gets_eos_and_a_problem() -> None:
    tokenizer = Endless()
    tokenizer.eos_token_id = EOS
    made = encoded({"messages": [USER, ANSWER]}, tokenizer)
    assert view(only(made), tokenizer)[1] == ("yo\n<|endoftext|>", True)
    assert [(p.kind, p.is_dropped) for p in made.problems] == [("end-of-turn", False)]


@pytest.mark.parametrize(
    ("tokenizer", "messages", "says"),
    [
        (Opening(), [USER, ANSWER], "rewrites the start of the answer: '<think>' becomes 'yo<|im_end|>"),
        (Shouting(), [USER, ANSWER], "changes the text of the answer"),
        (ByteTokenizer(), [ANSWER], "refuses the roles nothing"),
    ],
)
def test_a_template_that_gives_no_mask_is_a_problem(
    tokenizer: ByteTokenizer, messages: list[dict[str, str]], says: str
) -> None:
    made = encode(read_records([{"messages": messages}, {"text": "fine"}]), tokenizer, max_length=1000)
    assert [(p.line, p.kind, p.is_dropped) for p in made.problems] == [(1, "template", True)]
    assert says in made.problems[0].message


def test_an_unrenderable_prompt_is_an_error() -> None:
    with pytest.raises(DataError, match="cannot be rendered"):
        render_prompt([], ByteTokenizer())


def test_an_end_token_that_is_only_listed_among_the_added_tokens_is_found() -> None:
    class Added:
        special = True

    tokenizer = ByteTokenizer()
    tokenizer.all_special_ids = [EOS]
    tokenizer.added_tokens_decoder = {IM_END: Added()}  # type: ignore[attr-defined]
    made = encoded({"messages": [USER, ANSWER]}, tokenizer)
    assert view(only(made), tokenizer)[1] == ("yo<|im_end|>", True)
    assert made.problems == []
