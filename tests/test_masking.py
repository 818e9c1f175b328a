"""`check_masking` against right masks made here from character offsets, Unsloth's own, and hundreds of wrong ones."""

import copy
import itertools
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templates import ALL_KINDS

from helpers.masking.check import check_masking
from helpers.masking.rows import MaskingError
from helpers.masking.view import show_masking
from helpers.template.check import training_text
from helpers.template.turns import TurnsError, render

MASKED, TRAINED, EITHER = 0, 1, 2
NAMES = list(ALL_KINDS)


def talk(*texts: str, system: str | None = None) -> list[dict]:
    """`talk("Hi", "Hello!")` -> a question and its answer."""
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


TALKS = [
    talk("What is the capital of France?", "The capital of France is Paris."),
    talk("Hi", "Hello!", "Add 2 and 3,\n\nplease 😀", "5", "Why?", "Because 日本語\n\n2 + 3 is 5.", system="Be brief."),
    talk("Write code", "def add(a, b):\n    return a + b", "Thanks <b>", "Über welcome & more"),
]


def truth(tokenizer, name: str, messages: list[dict]) -> tuple[list[int], np.ndarray]:
    """A conversation's ids, and for each whether it is to be TRAINED, MASKED or EITHER.

    This is another way than the check's: each answer's place is found by rendering with a stand-in for its text, its
    tokens by their character offsets, and the template's markers are written down in `tests/templates.py`.
    """
    kind = ALL_KINDS[name]
    raw = render(tokenizer, messages)
    text = raw.removeprefix(tokenizer.bos_token) if kind.adds_bos else raw
    shift = len(raw) - len(text)
    encoded = tokenizer(text, return_offsets_mapping=True)
    expected = np.full(len(encoded.input_ids), MASKED)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        stand_in = render(tokenizer, messages[:i] + [message | {"content": "Zq7"}] + messages[i + 1 :])
        content = stand_in.index("Zq7")
        start = raw.rindex(kind.before_answer, 0, content) + len(kind.before_answer)
        end = raw.index(kind.end, len(raw) - (len(stand_in) - content - len("Zq7"))) + len(kind.end)
        for token, (a, b) in enumerate(encoded.offset_mapping):
            a, b = a + shift, b + shift
            if start <= a < end and b > a:
                expected[token] = TRAINED
            elif a < start < b:
                header, answer = raw[a:start], raw[start:b]
                expected[token] = TRAINED if answer.strip() and not header.strip() else EITHER
            elif a >= end and not raw[end:b].strip():
                expected[token] = EITHER
        # a space of SentencePiece's own in front of the answer stands for no space in the text
        for token in np.flatnonzero(expected == TRAINED):
            a, b = encoded.offset_mapping[token]
            if tokenizer.convert_ids_to_tokens(encoded.input_ids[token]) == "▁" and not text[a:b].isspace():
                expected[token] = EITHER
    return encoded.input_ids, expected


def right_rows(tokenizer, name: str, conversations=TALKS) -> list[dict]:
    """Rows whose mask is right."""
    rows = []
    for messages in conversations:
        ids, expected = truth(tokenizer, name, messages)
        labels = [token if want == TRAINED else -100 for token, want in zip(ids, expected, strict=True)]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def unsloth_mask(tokenizer, instruction: str, response: str, **options):
    from unsloth.chat_templates import train_on_responses_only

    return train_on_responses_only(
        None,
        tokenizer=tokenizer,
        instruction_part=instruction,
        response_part=response,
        return_function=True,
        **options,
    )


def unsloth_rows(tokenizer, name: str, instruction: str, response: str, conversations=TALKS, **options) -> list[dict]:
    """Rows as Unsloth masks them."""
    ids = [row["input_ids"] for row in right_rows(tokenizer, name, conversations)]
    labels = unsloth_mask(tokenizer, instruction, response, **options)({"input_ids": ids})["labels"]
    return [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]


def markers(name: str) -> tuple[str, str]:
    """The right markers, as one gives them to Unsloth."""
    kind = ALL_KINDS[name]
    if name == "zephyr":  # plain text, whose first token differs at the start of a text and behind a newline
        return "\n" + kind.before_question, "\n" + kind.before_answer
    return kind.before_question.strip(" "), kind.before_answer.strip(" ")


def codes(report) -> set[str]:
    return {finding.code for finding in report.findings}


# What is right must pass


@pytest.mark.parametrize("name", NAMES)
def test_right_mask_passes(shared_tokenizer, name):
    tokenizer = shared_tokenizer(name)
    report = check_masking(right_rows(tokenizer, name), tokenizer=tokenizer)
    assert report.ok, report
    assert (report.rows, report.answers) == (3, 6)


@pytest.mark.parametrize("name", NAMES)
def test_unsloths_mask_with_the_right_markers_passes(shared_tokenizer, name):
    tokenizer = shared_tokenizer(name)
    rows = unsloth_rows(tokenizer, name, *markers(name))
    report = check_masking(rows, tokenizer=tokenizer)
    assert report.ok, report


def test_exact_mask(shared_tokenizer):
    tokenizer = shared_tokenizer("chatml")
    rows = right_rows(tokenizer, "chatml", [talk("Hi", "Yes")])
    trained = [
        tokenizer.decode(i) for i, label in zip(rows[0]["input_ids"], rows[0]["labels"], strict=True) if label >= 0
    ]
    assert "".join(trained) == "Yes<|im_end|>"
    report = check_masking(rows, tokenizer=tokenizer)
    assert report.trained_tokens == len(trained)
    assert report.tokens_per_row == (len(rows[0]["input_ids"]),) * 3


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda text: text.strip() and not re.search(r"[\[\]<>|▁]", text)
)

SPACE = st.sampled_from(["", "", "\n", "\n\n", " ", "\t", " \n"])


@st.composite
def conversations(draw) -> tuple[str, list[dict]]:
    turns = draw(st.integers(1, 4))
    system = draw(st.none() | TEXT)
    text = st.tuples(SPACE, TEXT, SPACE).map("".join)  # white space may merge with what stands around it
    return draw(st.sampled_from(NAMES)), talk(*(draw(text) for _ in range(2 * turns)), system=system)


def test_random_right_masks_pass(shared_tokenizer, capsys):
    seen, refused = 0, []

    @settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(conversations())
    def check(example):
        nonlocal seen
        name, messages = example
        tokenizer = shared_tokenizer(name)
        report = check_masking(right_rows(tokenizer, name, [messages]), tokenizer=tokenizer)
        seen += 1
        if not report.ok:
            refused.append((name, messages, report))

    check()
    with capsys.disabled():
        print(f"\nfalse alarms: {len(refused)} of {seen} random right masks ({100 * len(refused) / seen:.0f} %)")
    assert seen >= 200
    assert not refused, refused[0]


# What is wrong must not


def spans(expected: np.ndarray) -> list[tuple[int, int]]:
    """The runs of TRAINED tokens: the answers."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], expected == TRAINED, [False]]).astype(int)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def mutations(tokenizer, name: str):
    """Every way that we know to get a right mask wrong: (what, the code that has to be found, rows)."""
    right = right_rows(tokenizer, name)
    wanted = [truth(tokenizer, name, messages)[1] for messages in TALKS]

    def changed(row: int, start: int, stop: int, *, train: bool) -> list[dict]:
        rows = [{key: list(values) for key, values in each.items()} for each in right]
        rows[row]["labels"][start:stop] = rows[row]["input_ids"][start:stop] if train else [-100] * (stop - start)
        return rows

    def replaced(row: int, ids: list[int], labels: list[int]) -> list[dict]:
        return right[:row] + [{"input_ids": ids, "labels": labels}] + right[row + 1 :]

    for row, expected in enumerate(wanted):
        ids, labels = right[row]["input_ids"], right[row]["labels"]
        masked = np.flatnonzero(expected == MASKED)
        answers = spans(expected)
        for turn, (start, stop) in enumerate(answers):
            at = f"row {row}, answer {turn}"
            before = int(masked[masked < start][-1])
            yield f"{at}: first token masked", "missed", changed(row, start, start + 1, train=False)
            yield f"{at}: last word masked", "missed", changed(row, stop - 2, stop - 1, train=False)
            yield f"{at}: end token masked", "missing_end", changed(row, stop - 1, stop, train=False)
            yield f"{at}: all masked", "missed", changed(row, start, stop, train=False)
            yield f"{at}: header's last token trained", "leaked", changed(row, before, before + 1, train=True)
            yield f"{at}: half of it masked", "missed", changed(row, start, (start + stop) // 2, train=False)
            rows = changed(row, before, before + 1, train=True)
            rows[row]["labels"][stop - 1] = -100
            yield f"{at}: shifted to the left", "leaked", rows
            behind = masked[masked > stop]
            if len(behind):
                rows = changed(row, start, start + 1, train=False)
                rows[row]["labels"][behind[0]] = ids[behind[0]]
                yield f"{at}: shifted to the right", "leaked", rows
            without = [ids[: stop - 1] + ids[stop:], labels[: stop - 1] + labels[stop:]]
            code = "truncated" if turn + 1 == len(answers) else "missing_end"
            yield f"{at}: no end token in the text", code, replaced(row, *without)
            yield f"{at}: cut in the middle", "truncated", replaced(row, ids[: stop - 2], labels[: stop - 2])
            yield f"{at}: cut before the end token", "truncated", replaced(row, ids[: stop - 1], labels[: stop - 1])
            previous = answers[turn - 1][1] if turn else 0
            yield f"{at}: question trained", "leaked", changed(row, previous, start, train=True)
            middle = int(masked[(masked >= previous) & (masked < start)][-3])
            yield f"{at}: a token of the question trained", "leaked", changed(row, middle, middle + 1, train=True)
        yield f"row {row}: all trained", "leaked", changed(row, 0, len(ids), train=True)
        yield f"row {row}: all masked", "fully_masked", changed(row, 0, len(ids), train=False)
        inverted = [token if label == -100 else -100 for token, label in zip(ids, labels, strict=True)]
        yield f"row {row}: inverted", "leaked", replaced(row, ids, inverted)
        yield f"row {row}: labels shifted", "label_mismatch", replaced(row, ids, labels[1:] + [-100])
        other = [label + 1 if i == answers[0][0] else label for i, label in enumerate(labels)]
        yield f"row {row}: another token's label", "label_mismatch", replaced(row, ids, other)
        if len(answers) > 1:
            yield f"row {row}: only the last answer", "only_last", changed(row, 0, answers[-1][0], train=False)
            yield f"row {row}: only the first answer", "missed", changed(row, answers[0][1], len(ids), train=False)
        if ALL_KINDS[name].adds_bos:
            bos = tokenizer.bos_token_id
            yield f"row {row}: two BOS tokens", "double_bos", replaced(row, [bos, *ids], [-100, *labels])
            yield f"row {row}: BOS trained", "leaked", changed(row, 0, 1, train=True)
        if ALL_KINDS[name].adds_bos and name != "zephyr":  # its template has none
            yield f"row {row}: no BOS token", "double_bos", replaced(row, ids[1:], labels[1:])
        pad = tokenizer.pad_token_id
        padded = [*ids, pad, pad], [*labels, pad, pad]
        yield f"row {row}: padding trained", "pad_trained", replaced(row, *padded)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_masks_are_caught(shared_tokenizer, name, capsys):
    tokenizer = shared_tokenizer(name)
    missed, count = [], 0
    step = 2 if name == "llama-3.1" else 1  # its large vocabulary makes each check slow
    for what, code, rows in itertools.islice(mutations(tokenizer, name), 0, None, step):
        found = codes(check_masking(rows, tokenizer=tokenizer))
        count += 1
        if code not in found:
            missed.append((what, code, found))
    with capsys.disabled():
        print(
            f"\n{name}: {count - len(missed)} of {count} wrong masks caught ({100 * (1 - len(missed) / count):.0f} %)"
        )
    assert count >= 40
    assert not missed


def test_every_single_flip_is_caught(shared_tokenizer):
    """Each token of a row by itself: trained where it must not be, masked where it must be."""
    for name in NAMES:
        tokenizer = shared_tokenizer(name)
        row = right_rows(tokenizer, name, TALKS[1:2])[0]
        _, expected = truth(tokenizer, name, TALKS[1])
        rows = []
        for i in np.flatnonzero(expected != EITHER):
            labels = list(row["labels"])
            labels[i] = row["input_ids"][i] if labels[i] == -100 else -100
            rows.append({"input_ids": row["input_ids"], "labels": labels})
        report = check_masking(rows, tokenizer=tokenizer)
        assert report.count("leaked") == (expected == MASKED).sum(), name
        assert report.count("missed") + report.count("missing_end") == (expected == TRAINED).sum(), name


@pytest.mark.parametrize("name", NAMES)
def test_wrong_markers_for_unsloth_are_caught(shared_tokenizer, name):
    kind, tokenizer = ALL_KINDS[name], shared_tokenizer(name)
    question, _ = markers(name)
    report = check_masking(unsloth_rows(tokenizer, name, question, question), tokenizer=tokenizer)
    assert report.count("leaked") and not report.count("truncated")
    with pytest.raises(MaskingError, match="instruction_part=") as caught:
        report.raise_if_failed()
    assert f"response_part='{kind.before_answer.strip()}" in str(caught.value)  # the fix names the right marker


def test_unsloth_masks_an_answer_that_begins_with_a_newline(shared_tokenizer):
    """The header's newlines and the answer's become one token, which Unsloth's marker does not match."""
    tokenizer = shared_tokenizer("llama-3.1")
    rows = unsloth_rows(tokenizer, "llama-3.1", *markers("llama-3.1"), [talk("Hi", "\nHello!", "Bye", "Bye!")])
    report = check_masking(rows, tokenizer=tokenizer)
    assert report.count("missing_end") == 1
    with pytest.raises(MaskingError, match="strip the answers"):
        report.raise_if_failed()
    text = training_text(tokenizer, talk("Hi", "\nHello!", "Bye", "Bye!"))
    assert "\n\nHello!" in text and "\n\n\n" not in text


def test_last_response_only_is_named(shared_tokenizer):
    tokenizer = shared_tokenizer("llama-3.1")
    rows = unsloth_rows(tokenizer, "llama-3.1", *markers("llama-3.1"), last_response_only=True)
    report = check_masking(rows, tokenizer=tokenizer)
    assert report.count("only_last") == 2
    with pytest.raises(MaskingError, match="last_response_only"):
        report.raise_if_failed()


def test_error_names_row_tokens_text_and_fix(shared_tokenizer):
    tokenizer = shared_tokenizer("smollm2")
    rows = right_rows(tokenizer, "smollm2")
    start = rows[1]["labels"].index(tokenizer.eos_token_id) - 1
    rows[1]["labels"][start] = -100
    text = tokenizer.decode(rows[1]["input_ids"][start])
    with pytest.raises(MaskingError) as caught:
        check_masking(rows, tokenizer=tokenizer).raise_if_failed()
    assert isinstance(caught.value, ValueError)
    assert caught.value.where == f"row 1, tokens {start} to {start}"
    assert repr(text) in caught.value.found
    assert caught.value.expected == "the whole answer trained"
    assert "response_part='<|im_start|>assistant\\n'" in caught.value.fix


def test_report_counts_and_prints_the_same_each_time(shared_tokenizer):
    tokenizer = shared_tokenizer("chatml")
    rows = right_rows(tokenizer, "chatml")
    rows[2]["labels"] = [-100] * len(rows[2]["labels"])
    report = check_masking(rows, tokenizer=tokenizer)
    assert [report.count(code) for code in ("fully_masked", "missing_end", "leaked")] == [1, 2, 0] and not report.ok
    assert {finding.first_rows for finding in report.findings} == {(2,)}
    assert repr(report) == repr(check_masking(rows, tokenizer=tokenizer))
    assert "fully_masked" in repr(report) and "1 rows" in repr(report)
    assert "fully_masked" in report._repr_html_()


# Shapes of input


def as_dataset(rows):
    import datasets

    return datasets.Dataset.from_list(rows)


def as_shuffled_view(rows):
    """A view of a larger dataset, which keeps its rows in another order than it shows them."""
    return as_dataset(rows[::-1] + rows).select(range(len(rows) - 1, -1, -1))


def as_arrays(rows):
    return [{key: np.asarray(values) for key, values in row.items()} for row in rows]


def as_tensors(rows):
    import torch

    return [{key: torch.tensor(values) for key, values in row.items()} for row in rows]


@pytest.mark.parametrize("shape", [as_dataset, as_shuffled_view, as_arrays, as_tensors])
def test_shapes_of_input(shared_tokenizer, shape):
    tokenizer = shared_tokenizer("chatml")
    rows = right_rows(tokenizer, "chatml")
    rows[1]["labels"][0] = rows[1]["input_ids"][0]
    assert check_masking(shape(rows), tokenizer=tokenizer) == check_masking(rows, tokenizer=tokenizer)


def padded_batch(tokenizer, rows, *, side: str, attention: bool) -> dict:
    """What a collator makes of rows: tensors of one length."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[int], fill: int) -> list[int]:
        padding = [fill] * (longest - len(values))
        return padding + values if side == "left" else values + padding

    batch = {
        "input_ids": torch.tensor([padded(row["input_ids"], tokenizer.pad_token_id) for row in rows]),
        "labels": torch.tensor([padded(row["labels"], -100) for row in rows]),
    }
    if attention:
        batch["attention_mask"] = torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows])
    return batch


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_padded_batches(shared_tokenizer, name, side, attention):
    tokenizer = shared_tokenizer(name)
    rows = right_rows(tokenizer, name)
    report = check_masking(padded_batch(tokenizer, rows, side=side, attention=attention), tokenizer=tokenizer)
    assert report == check_masking(rows, tokenizer=tokenizer)


@pytest.mark.parametrize("attention", [True, False])
def test_padding_with_the_end_token(shared_tokenizer, attention):
    tokenizer = copy.deepcopy(shared_tokenizer("chatml"))
    tokenizer.pad_token = tokenizer.eos_token
    rows = right_rows(tokenizer, "chatml")
    batch = padded_batch(tokenizer, rows, side="right", attention=attention)
    assert check_masking(batch, tokenizer=tokenizer).ok
    batch["labels"][batch["labels"] == tokenizer.eos_token_id] = -100  # as a collator does that masks the pad token
    assert check_masking(batch, tokenizer=tokenizer).count("missing_end") == 6


@pytest.mark.parametrize("name", NAMES)
def test_several_conversations_in_a_row(shared_tokenizer, name):
    tokenizer = shared_tokenizer(name)
    rows = right_rows(tokenizer, name)
    packed = [{key: sum((row[key] for row in rows), []) for key in rows[0]}]
    report = check_masking(packed, tokenizer=tokenizer)
    assert report.ok, report
    assert report.answers == 6


@pytest.mark.parametrize("name", NAMES)
def test_end_token_appended_by_the_trainer(shared_tokenizer, name):
    """TRL appends the EOS token to a text that does not end with it, as ChatML's, which ends with a newline."""
    tokenizer = shared_tokenizer(name)
    for trained in (True, False):
        rows = right_rows(tokenizer, name)
        for row in rows:
            row["input_ids"] = [*row["input_ids"], tokenizer.eos_token_id]
            row["labels"] = [*row["labels"], tokenizer.eos_token_id if trained else -100]
        assert check_masking(rows, tokenizer=tokenizer).ok


# Truncation


@pytest.mark.parametrize("name", NAMES)
def test_truncation_blames_the_length(shared_tokenizer, name):
    tokenizer = shared_tokenizer(name)
    rows = right_rows(tokenizer, name)
    shortest = min(map(len, (row["input_ids"] for row in rows)))
    # cut within each row's second half: the markers are right, whatever is left of the rows
    cut = [{key: values[: shortest - 3] for key, values in row.items()} for row in rows]
    report = check_masking(cut, tokenizer=tokenizer)
    assert report.count("truncated") == 3
    assert codes(report) <= {"truncated", "fully_masked"}
    assert report.length_for_99_percent is None
    with pytest.raises(MaskingError, match="the markers are not to blame: raise max_seq_length above") as caught:
        report.raise_if_failed()
    assert "instruction_part" not in str(caught.value)


def test_length_that_keeps_the_answers_whole(shared_tokenizer):
    tokenizer = shared_tokenizer("smollm2")
    rows = right_rows(tokenizer, "smollm2")
    needed = check_masking(rows, tokenizer=tokenizer).length_for_99_percent
    enough = [{key: values[:needed] for key, values in row.items()} for row in rows]
    too_few = [{key: values[: needed - 1] for key, values in row.items()} for row in rows]
    assert check_masking(enough, tokenizer=tokenizer).ok
    assert check_masking(too_few, tokenizer=tokenizer).count("truncated") == 1


def test_few_cut_answers_leave_the_length_known(shared_tokenizer):
    tokenizer = shared_tokenizer("chatml")
    [row] = right_rows(tokenizer, "chatml", TALKS[:1])
    short = {key: values[:-3] for key, values in row.items()}
    whole = row["labels"].index(tokenizer.eos_token_id) + 1
    report = check_masking([row] * 199 + [short], tokenizer=tokenizer)
    assert report.length_for_99_percent == whole
    with pytest.raises(MaskingError, match=f"set max_seq_length to {whole}"):
        report.raise_if_failed()


def test_system_prompt_longer_than_the_limit(shared_tokenizer):
    tokenizer = shared_tokenizer("llama-3.1")
    rows = right_rows(tokenizer, "llama-3.1", [talk("Hi", "Hello!", system="Be brief. " * 50)])
    cut = [{"input_ids": row["input_ids"][:64], "labels": row["labels"][:64]} for row in rows]
    with pytest.raises(MaskingError, match="the markers are not to blame"):
        check_masking(cut, tokenizer=tokenizer).raise_if_failed()


def test_conversation_that_ends_with_a_question_is_not_called_truncated(shared_tokenizer):
    tokenizer = shared_tokenizer("chatml")
    rows = right_rows(tokenizer, "chatml", [talk("Hi", "Hello!", "Bye")])
    assert check_masking(rows, tokenizer=tokenizer).ok


# What cannot be checked is said


def test_rows_of_another_template(shared_tokenizer):
    chatml = copy.copy(shared_tokenizer("llama-3.1"))
    chatml.chat_template = shared_tokenizer("chatml").chat_template
    ids = chatml([training_text(chatml, messages) for messages in TALKS]).input_ids
    rows = [{"input_ids": each, "labels": [-100] * len(each)} for each in ids]
    report = check_masking(rows, tokenizer=shared_tokenizer("llama-3.1"))
    assert codes(report) == {"no_template", "fully_masked"}
    with pytest.raises(MaskingError, match="chat template"):
        report.raise_if_failed()


def test_template_that_never_ends_an_answer(shared_tokenizer):
    tokenizer = copy.copy(shared_tokenizer("llama-3.1"))
    tokenizer.chat_template = shared_tokenizer("chatml").chat_template  # its markers are no tokens of Llama's
    with pytest.raises(TurnsError, match="without a special token"):
        check_masking([{"input_ids": [1], "labels": [1]}], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}", "text unchanged"),
        ("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}", "before questions too"),
    ],
)
def test_template_that_cannot_be_read(shared_tokenizer, template, found):
    tokenizer = copy.copy(shared_tokenizer("chatml"))
    tokenizer.chat_template = template
    with pytest.raises(TurnsError, match=found):
        check_masking([{"input_ids": [1], "labels": [1]}], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("rows", "where", "found"),
    [
        ([], "dataset", "no rows"),
        ([{"input_ids": [1, 2]}], "row 0", "no 'labels'"),
        (
            [{"input_ids": [1], "labels": [1]}, {"input_ids": [1, 2], "labels": [1]}],
            "row 1",
            "1 labels for 2 input ids",
        ),
        ([{"input_ids": [1, 99_999], "labels": [1, 1]}], "row 0, token 1", "input id 99999"),
        ([{"input_ids": [1, 2], "labels": None}], "row 0", "0 labels for 2 input ids"),
        ({"input_ids": [[1]], "attention_mask": [[1]]}, "batch", "no 'labels'"),
    ],
)
def test_rows_that_cannot_be_read(shared_tokenizer, rows, where, found):
    with pytest.raises(MaskingError) as caught:
        check_masking(rows, tokenizer=shared_tokenizer("chatml"))
    assert caught.value.where == where
    assert found in caught.value.found


def test_row_without_tokens_trains_nothing(shared_tokenizer):
    tokenizer = shared_tokenizer("chatml")
    rows = right_rows(tokenizer, "chatml")
    rows.insert(1, {"input_ids": [], "labels": []})
    report = check_masking(rows, tokenizer=tokenizer)
    assert (report.count("fully_masked"), report.answers) == (1, 6)
    assert codes(report) == {"fully_masked"}


# Looking at a row


def test_text_form(shared_tokenizer):
    tokenizer = shared_tokenizer("chatml")
    [row] = right_rows(tokenizer, "chatml", [talk("Hi\tyou", "Yes 日😀")])
    assert repr(show_masking(row, tokenizer=tokenizer)).splitlines()[1:] == [
        "masked  | <|im_start|>user↵Hi\\tyou<|im_end|>↵<|im_start|>assistant↵",
        "TRAINED | Yes 日😀<|im_end|>",
        "masked  | ↵",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_view_shows_every_token_once(shared_tokenizer, name):
    tokenizer = shared_tokenizer(name)
    for row in right_rows(tokenizer, name):
        view = show_masking(row, tokenizer=tokenizer)
        assert [token for piece in view.pieces for token in piece.ids] == row["input_ids"]
        trained = [piece.trained for piece in view.pieces for _ in piece.ids]
        assert trained == [label != -100 for label in row["labels"]]


def test_html_is_escaped_and_says_ids(shared_tokenizer):
    tokenizer = shared_tokenizer("smollm2")
    attack = "<script>alert('x')</script><img src=x onerror=\"alert(1)\"> & </pre>"
    [row] = right_rows(tokenizer, "smollm2", [talk(attack, attack)])
    page = show_masking(row, tokenizer=tokenizer)._repr_html_()
    assert set(re.findall(r"</?([a-z]+)", page)) == {"div", "p", "u", "span", "b", "pre"}
    assert page.count("<pre") == page.count("</pre>") == 1
    end = row["labels"].index(tokenizer.eos_token_id)
    assert f'title="id {tokenizer.eos_token_id}, index {end}, trained"' in page
    # not by colour alone: trained text is underlined even where a viewer strips styles
    assert re.search(r"<u [^>]*><b [^>]*>&lt;\|im_end\|&gt;</b></u>", page)


def test_report_html_is_escaped(shared_tokenizer):
    tokenizer = shared_tokenizer("smollm2")
    page = check_masking(right_rows(tokenizer, "smollm2"), tokenizer=tokenizer)._repr_html_()
    assert "<table>" in page and "every answer is trained" in page


# Unsloth's whole path


@pytest.fixture(scope="module")
def masked_dataset(shared_tokenizer):
    """What Unsloth's trainer makes of conversations, with a tiny model of random weights, and its rows before."""
    import datasets
    import torch
    import unsloth  # noqa: F401  (it patches the trainer, and has to come first)
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer
    from unsloth.chat_templates import train_on_responses_only

    def make(name: str, folder, conversations: list, max_length: int = 512):
        tokenizer = shared_tokenizer(name)
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).to(torch.float32)
        dataset = datasets.Dataset.from_dict(
            {"text": [training_text(tokenizer, messages) for messages in conversations]}
        )
        arguments = SFTConfig(
            output_dir=str(folder),
            max_length=max_length,
            report_to="none",
            dataset_num_proc=1,
            use_cpu=True,
            bf16=False,
        )
        trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=dataset, args=arguments)
        instruction, response = markers(name)
        return train_on_responses_only(trainer, instruction_part=instruction, response_part=response).train_dataset

    return make


@pytest.mark.parametrize("name", ["smollm2", "llama-3.1"])
def test_what_the_trainer_makes_passes(shared_tokenizer, masked_dataset, tmp_path, name):
    report = check_masking(masked_dataset(name, tmp_path, TALKS), tokenizer=shared_tokenizer(name))
    assert report.ok, report
    assert (report.rows, report.answers) == (3, 6)


def test_trainer_drops_rows_whose_answer_was_cut_away(shared_tokenizer, masked_dataset, tmp_path):
    """Row i of the trained dataset need not be row i of yours; the check blames the length all the same."""
    tokenizer = shared_tokenizer("smollm2")
    conversations = [*TALKS, talk("word " * 200, "Too late.")]
    dataset = masked_dataset("smollm2", tmp_path, conversations, max_length=60)
    assert len(dataset) == 3
    report = check_masking(dataset, tokenizer=tokenizer)
    assert codes(report) == {"truncated"}
    with pytest.raises(MaskingError, match="the markers are not to blame"):
        report.raise_if_failed()
