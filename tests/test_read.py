"""`read_conversations`: every common form and file, what is not clear, and no row or character lost."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.base import InputError
from helpers.conversations import read_conversations
from helpers.conversations.source import chinese_encoding

ASKED, ANSWERED = [f"Question {n}?" for n in range(6)], [f"Answer {n}." for n in range(6)]
PAIRS = list(zip(ASKED, ANSWERED, strict=True))
TALKS = [[("user", question), ("assistant", answer)] for question, answer in PAIRS]


def turns(role="role", text="content", user="user", assistant="assistant", **more):
    """The six talks as lists of turns with these keys and names."""
    names = {"user": user, "assistant": assistant}
    return [[{role: names[who], text: said, **more} for who, said in talk] for talk in TALKS]


def table(question, answer, **more):
    return [{question: asked, answer: answered, **more} for asked, answered in PAIRS]


def read(source, **options):
    """(role, text) of each turn of each row, and the report."""
    dataset, report = read_conversations(source, **options)
    return [[(turn["role"], turn["content"]) for turn in row] for row in dataset["conversations"]], report


FORMS = {
    "ShareGPT": [
        [{"conversations": talk} for talk in turns("from", "value", "human", "gpt")],
        [{"conversations": talk} for talk in turns("from", "value", "user", "assistant")],
        [{"conversations": talk} for talk in turns("from", "value", "Human", "ChatGPT")],
        [{"conversations": talk, "id": n} for n, talk in enumerate(turns("from", "value", " human ", "bot"))],
        [{"conversation": talk} for talk in turns("from", "value", "human", "model", weight=0)],
        [{"conversations": {"from": ["human", "gpt"], "value": list(pair)}} for pair in PAIRS],  # as Arrow may store it
        [{"conversations": json.dumps(talk)} for talk in turns("from", "value", "human", "gpt")],
    ],
    "messages": [
        [{"messages": talk} for talk in turns()],
        [{"messages": talk, "tools": []} for talk in turns(name=None, tool_calls=None)],
        [{"Messages": talk, "score": 0.5} for talk in turns("Role", "Content")],
        [{"dialogue": talk} for talk in turns("speaker", "text", "customer", "agent")],
        [{"messages": talk, "prompt": "unused", "completion": "unused", "labels": 3} for talk in turns()],
        [
            {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in talk]}
            for talk in turns()
        ],
    ],
    "lists of turns": [
        turns(),
        turns("from", "value", "human", "gpt"),
        turns("author", "message", "prompter", "assistant"),
        turns("role", "text", "user", "ai"),
        [list(pair) for pair in PAIRS],
    ],
    "Alpaca": [
        table("instruction", "output"),
        table("instruction", "output", input=""),
        table("instruction", "response", context=""),
        table("Instruction", "Output", Input=None),
        table("instruction", "output", input="", history=[]),
    ],
    "prompt and completion": [
        table("prompt", "completion"),
        table("Prompt", "Completion"),
        table("prompt", "response", id=7),
        table("prompt", "answer", category="x"),
        [
            {"prompt": [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": answered}]}
            for asked, answered in PAIRS
        ],
    ],
    "question and answer": [
        table("question", "answer"),
        table("Question", "Reply"),
        table("query", "response", source="web"),
        table("input", "output"),
        table("problem", "solution"),
        table("user", "assistant"),
    ],
    "one turn a row": [
        [{"conversation_id": n, **turn} for n, talk in enumerate(turns()) for turn in talk],
        [{"id": f"c{n}", **turn} for n, talk in enumerate(turns("from", "value", "human", "gpt")) for turn in talk],
        [{"ticket_id": n, **turn} for which in (0, 1) for n, turn in enumerate(talk[which] for talk in turns())],
        [
            {"thread_id": n, "turn": number, **turn}
            for n, talk in enumerate(turns("sender", "message", "customer", "agent"))
            for number, turn in reversed(list(enumerate(talk)))
        ],
        [{"id": m, "session_id": n, **turn} for n, talk in enumerate(turns()) for m, turn in enumerate(talk)],
    ],
}


def variants():
    return [pytest.param(rows, id=f"{form}-{n}") for form, some in FORMS.items() for n, rows in enumerate(some)]


@pytest.mark.parametrize("rows", variants())
def test_each_form_gives_the_same_conversations(rows):
    talks, report = read(rows)
    assert talks == TALKS, report
    assert (report.rows, len(report.valid_rows)) == (6, 6)


@pytest.mark.parametrize("rows", variants())
def test_each_form_is_read_from_a_file_too(rows, tmp_path):
    for name, text in {"rows.json": json.dumps(rows), "rows.jsonl": "\n".join(map(json.dumps, rows))}.items():
        (tmp_path / name).write_text(text)
        assert read(tmp_path / name)[0] == TALKS


@pytest.mark.parametrize("form", FORMS)
def test_five_variants_of_each_form(form):
    assert len(FORMS[form]) >= 5


LINES = "\n".join(map(json.dumps, table("question", "answer")))
CELLS = [f'"{question}";"{answer}"' for question, answer in PAIRS]
FILES = {
    "plain.jsonl": LINES.encode(),
    "mark.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf16_without_mark.jsonl": LINES.encode("utf-16-le"),
    "crlf.jsonl": LINES.replace("\n", "\r\n").encode(),
    "packed.jsonl.gz": gzip.compress(LINES.encode()),
    "packed_without_ending.json": gzip.compress(LINES.encode()),
    "LARGE.JSONL": LINES.encode(),
    "lines.ndjson": LINES.encode(),
    "lines.json": LINES.encode(),
    "pretty.json": json.dumps(table("question", "answer"), indent=2).encode(),
    "pretty_one_by_one.jsonl": "\n".join(json.dumps(row, indent=2) for row in table("question", "answer")).encode(),
    "wrapped.json": json.dumps({"data": table("question", "answer")}).encode(),
    "chats[1].jsonl": LINES.encode(),
    "comma.csv": "\n".join(["question,answer", *(f"{q},{a}" for q, a in PAIRS)]).encode(),
    "semicolon.csv": "\r\n".join(["question;answer", *CELLS]).encode("utf-8-sig"),
    "tab.tsv": "\n".join(["question\tanswer\tid", *(f"{q}\t{a}\t3" for q, a in PAIRS)]).encode(),
    "tab.csv.gz": gzip.compress("\n".join(["answer\tquestion", *(f"{a}\t{q}" for q, a in PAIRS)]).encode()),
    "json_in_a_cell.csv": "\n".join(
        ["messages", *(json.dumps(json.dumps(t)).replace('\\"', '""') for t in turns())]
    ).encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_each_kind_of_file_gives_the_same_conversations(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    (tmp_path / "chats1.jsonl").write_text('{"question": "the file that a pattern would read", "answer": "x"}')
    talks, report = read(tmp_path / name)
    assert talks == TALKS, report
    assert list(report.source) == [str(tmp_path / name)]


CHINESE = [("能退货吗？", "可以，七天之内都能退。"), ("几点开门？", "早上九点开门，周末也一样。")]
TRADITIONAL = [("能退貨嗎？", "可以，七天之內都能退。"), ("幾點開門？", "早上九點開門，週末也一樣。")]


@pytest.mark.parametrize(
    ("name", "encoding", "columns", "pairs"),
    [
        ("rows.csv", "gb18030", ("问题", "回答"), CHINESE),
        ("rows.csv", "gbk", ("提问", "答案"), CHINESE * 500),
        ("rows.tsv.gz", "gb18030", ("question", "answer"), CHINESE),
        ("rows.jsonl", "gb18030", ("问题", "回复"), CHINESE),
        ("rows.csv", "big5", ("問題", "回覆"), TRADITIONAL * 20),
        ("rows.csv", "utf-8", ("问题", "回答"), CHINESE),
        ("rows.csv", "utf-16", ("问题", "回答"), CHINESE),
    ],
)
def test_a_chinese_file_is_read_in_the_encoding_that_it_was_saved_in(name, encoding, columns, pairs, tmp_path, capsys):
    lines = [json.dumps(dict(zip(columns, pair, strict=True)), ensure_ascii=False) for pair in pairs]
    if "jsonl" not in name:
        lines = [("\t" if "tsv" in name else ",").join(cells) for cells in (columns, *pairs)]
    data = "\r\n".join(lines).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    talks, _ = read(tmp_path / name)
    assert talks == [[("user", question), ("assistant", answer)] for question, answer in dict.fromkeys(pairs)]
    said = capsys.readouterr().out
    assert ("because it is not UTF-8" in said) == (not encoding.startswith("utf")), said


def test_no_other_encoding_is_guessed_at():
    german = "Frage;Antwort\n" + "Wie öffne ich die Tür?;Drücken Sie die Klinke, bitte nicht übermäßig.\n" * 50
    russian = "вопрос,ответ\n" + "Можно вернуть?,Да, в течение семи дней.\n" * 40
    japanese = "質問,回答\n" + "返品できますか？,はい、七日以内でしたら返品できます。\n" * 40
    texts = {"cp1252": german, "cp1251": russian, "shift_jis": japanese, "utf-8": german}
    assert [chinese_encoding(text.encode(encoding)) for encoding, text in texts.items()] == [""] * 4
    stray = "问题,回答\n".encode() + "能退货吗？,可以，七天内。\n".encode() * 40 + b"\xff,x\n"
    assert chinese_encoding(stray) == ""  # the check of its row names the byte


def test_parquet_datasets_and_folders(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    rows = datasets.Dataset.from_list([{"messages": talk} for talk in turns()])
    rows.to_parquet("rows.PARQUET")
    rows.save_to_disk("saved")
    datasets.DatasetDict(train_sft=rows, test_sft=rows.select([0])).save_to_disk("two")
    for source in ("rows.PARQUET", "saved", "two", rows, datasets.DatasetDict(only=rows)):
        assert read(source)[0] == TALKS
    assert read("two")[1].notes[0] == "Read of its splits (train_sft, test_sft): train_sft."


def test_a_folder_gives_its_training_files(tmp_path):
    (tmp_path / "data" / ".hidden").mkdir(parents=True)
    half = LINES.split("\n")
    for name, lines in {
        "train-0.jsonl": half[:3],
        "train-1.jsonl": half[3:],
        "test.jsonl": half,
        ".hidden/x.json": half,
    }.items():
        (tmp_path / "data" / name).write_text("\n".join(lines))
    (tmp_path / "README.md").write_text("not data")
    talks, report = read(tmp_path)
    assert talks == TALKS
    assert report.notes[0] == "Read 2 of the folder's 3 files: those with `train` in their names."
    assert len(report.source) == 5


def test_what_is_beside_the_turns():
    rows = [{"system": "Be kind.", "kind": n, "id": n, **row} for n, row in enumerate(table("question", "answer"))]
    dataset, report = read_conversations(rows, keep_columns=["kind", "absent"])
    assert dataset.column_names == ["conversations", "kind"] and dataset["kind"] == list(range(6))
    assert [turn["role"] for turn in dataset[0]["conversations"]] == ["system", "user", "assistant"]
    title = "Read as questions and answers: `question`, `answer`, with the system prompt in `system`. Not read: `id`."
    assert report.notes == (title,)


def test_alpacas_input_and_history_are_part_of_the_conversation():
    rows = table("instruction", "output", input="About this.", history=[["Before?", "Yes."]])
    talks, _ = read(rows)
    before = [("user", "Before?"), ("assistant", "Yes.")]
    assert talks[0] == [*before, ("user", "Question 0?\n\nAbout this."), ("assistant", "Answer 0.")]


def test_a_row_in_the_other_form_is_read():
    rows = [{"conversations": talk} for talk in [*turns()[:5], *turns("from", "value", "human", "gpt")[5:]]]
    assert read(rows)[0] == TALKS


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ('{"question": "Hi', "unreadable", "not JSON"),
        ('{"question": 12, "answer": "A"}', "content_not_text", "`question` holds 12"),
        ('{"question": "Q", "answer": ""}', "empty_content", "`answer` is ''"),
        ('{"question": "Q"}', "missing_content", "`answer` has no text"),
        ('{"question": "Q", "answer": "caf\xe9"}', "invalid_unicode", "`answer` holds '\\udce9' at character 3"),
        (LINES.split("\n")[0], "duplicate", "the same as line 1"),
        ("[]", "empty_conversation", "the list of messages is empty"),
        ("7", "wrong_nesting", "7 in place of a conversation"),
    ],
)
def test_a_bad_line_is_dropped_and_named_and_the_others_stay(line, code, said, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([LINES.encode(), b"", line.encode("latin-1")]))
    talks, report = read(file)
    assert talks == TALKS and report.rows == 7 and report.dropped_rows == (6,)
    problem = report.problems[0]
    assert (problem.code, problem.place) == (code, "line 8") and said in problem.message
    assert "line 8" in repr(report)


def test_one_conversation_alone_in_a_file_is_a_row(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"dialogue": turns("speaker", "text")[0]}, indent=2))
    assert read(tmp_path / "one.json")[0] == TALKS[:1]


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    row = json.dumps({"question": "one\u2028two\u0085three", "answer": "A"}, ensure_ascii=False)
    lines = [row, json.dumps({"question": "Q", "answer": "B"}), "{"]  # the last one: so that lines are read one by one
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    talks, report = read(tmp_path / "rows.jsonl")
    assert talks[0] == [("user", "one\u2028two\u0085three"), ("assistant", "A")]
    assert [problem.place for problem in report.problems] == ["line 3"]


def test_bad_rows_of_a_table(tmp_path):
    (tmp_path / "rows.csv").write_text('question,answer\nQ,A\nQ2,A2,more\nonly one\n\n"two\nlines",A3\n')
    talks, report = read(tmp_path / "rows.csv")
    assert talks == [[("user", q), ("assistant", a)] for q, a in (("Q", "A"), ("two\nlines", "A3"))]
    assert [(p.place, p.code) for p in report.problems] == [("line 3", "unreadable"), ("line 4", "missing_content")]


REFUSED = {
    "missing.jsonl": (None, "no such file"),
    "empty.jsonl": (b"", "an empty file"),
    "spaces.json": (b" \n", "an empty file"),
    "list.json": (b"[]", "an empty file"),
    "header.csv": (b"question,answer\n", "an empty file"),
    "page.json": (b"<!DOCTYPE html>", "line 1: found not JSON (Expecting value): <!DOCTYPE html>"),
    "broken.json": (b'[\n{"question": "Q",\n"answer": "A"\n{"question": "Q"}]', "line 4: found not JSON"),
    "sheet.xlsx": (b"PK", "Fix: save it as .csv"),
    "text.txt": (b"Hi", "found a file ending in .txt"),
    "half.jsonl.gz": (gzip.compress(LINES.encode())[:60], "a file that cannot be read"),
    "bad.parquet": (b"PAR1 no", "not Parquet"),
    "twice.csv": (b"question,question,answer\na,b,c", "the column 'question' twice"),
    "open.csv": (b'question,answer\nQ,A\n"Q2,A2\nQ3,A3\n', "line 3: found a quotation mark that is never closed"),
    "unknown.csv": (b"Frage,Antwort\nQ,A\n", "no column for the question among `Frage`, `Antwort`"),
    "two_answers.csv": (b"question,answer,solution\nQ,A,B\n", "2 columns that may be the answer"),
    "two_talks.json": (json.dumps([{"chosen": turns()[0], "rejected": turns()[1]}]).encode(), "`chosen`, `rejected`"),
    "no_id.json": (json.dumps(turns()[0]).encode(), "no column that says of which conversation"),
    "two_ids.json": (json.dumps([{"chat_id": 1, "ticket_id": 2, **turns()[0][0]}]).encode(), "`chat_id`, `ticket_id`"),
    "lost_turn.jsonl": (b'{"id": 1, "role": "user", "content": "Hi"}\n' * 2 + b'{"id"', "line 3: found not JSON"),
    "text_only.jsonl": (b'{"text": "Hi"}', "no column for the question among `text`"),
    "numbers.json": (b"[1, 2]", "no conversations"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_as_a_whole_is_one_line(name, tmp_path):
    content, said = REFUSED[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_conversations(tmp_path / name)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["~nobody-here/data.jsonl", "x" * 300 + ".json", "a\0b.csv", "gs://a/b", "", "a b", " "]
)
def test_what_is_no_file_at_all_is_one_line_too(name):
    with pytest.raises(InputError, match="found no such file"):
        read_conversations(name)


def test_columns_decide_where_two_readings_are_possible():
    rows = [{**row, "answer_2": "x", "sys": "y"} for row in table("Frage", "Antwort")]
    talks, report = read(rows, columns="Frage, Antwort")
    assert talks == TALKS and "question and answer: `Frage`, `Antwort`" in report.notes[0]
    rows = [{"chosen": good, "rejected": [{"role": "user", "content": "x"}]} for good in turns()]
    assert read(rows, columns=["chosen"])[0] == TALKS
    with pytest.raises(InputError, match="COLUMNS: found 'Reply', expected some of Frage"):
        read(table("Frage", "Antwort"), columns="Frage, Reply")


def test_only_so_many_rows_are_read():
    talks, report = read(table("question", "answer"), rows=4)
    assert talks == TALKS[:4] and report.rows == 4
    assert report.notes[-1] == "The first 4 of 6 were read."


def test_a_kept_column_has_one_kind_of_values():
    rows = [{**row, "kind": kind} for row, kind in zip(table("question", "answer"), [1, "two"] * 3, strict=True)]
    assert read(rows)[0] == TALKS
    with pytest.raises(InputError, match="column kind: found values of several kinds"):
        read(rows, keep_columns=["kind"])


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
CELL = st.one_of(TEXT, st.none(), st.integers(), st.just(""))


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=8), st.sampled_from(["table", "messages", "ShareGPT"]))
def test_rows_are_kept_whole_or_dropped_and_told(pairs, form):
    shapes = {
        "table": lambda q, a: {"question": q, "answer": a},
        "messages": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
        "ShareGPT": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    }
    talks, report = read([shapes[form](*pair) for pair in pairs])
    assert report.rows == len(pairs) == len(report.valid_rows) + len(report.dropped_rows)
    assert {problem.row for problem in report.problems} == set(report.dropped_rows)
    assert talks == [[("user", pairs[n][0]), ("assistant", pairs[n][1])] for n in report.valid_rows]
    good = {pair for pair in pairs if all(isinstance(text, str) and text.strip() for text in pair)}
    good = {pair for pair in good if not any("<|" in text for text in pair)}
    assert {(talk[0][1], talk[1][1]) for talk in talks} == good
