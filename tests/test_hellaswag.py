"""HellaSwag: its files, packed rows against single documents, and the two scores."""

import bz2
import dataclasses
import json

import pytest
import torch

from speedrun import hellaswag
from speedrun.config import Windows
from speedrun.data import BYTES, DataError
from speedrun.hellaswag import Document, Task, documents, log_probabilities, pack, read_tasks
from speedrun.reference.softcap_ce import softcap
from speedrun.tokenizer import ByteTokenizer
from test_record_model import RECORD, random_model
from train_helpers import micro_batch, random_baseline

CONFIG = dataclasses.replace(RECORD, vocab_size=BYTES.vocab_size)
WINDOWS = Windows(5, 9)
BOS = BYTES.bos_id
TASKS = [
    Task("A man sat.", ("He rose.", "ü", "She went far away.", "No."), 2),
    Task("It", ("is.", "was so.", "a", "b b"), 0),
]
TEXT = "".join(
    f"{line}\n" for task in TASKS for line in (task.context, task.label, *task.endings)
).encode()
JSON = "".join(
    json.dumps({"ctx": task.context, "endings": task.endings, "label": task.label}) + "\n"
    for task in TASKS
).encode()


@pytest.mark.parametrize("content", [TEXT, JSON, bz2.compress(TEXT), bz2.compress(JSON)])
def test_files(tmp_path, content):
    path = tmp_path / "tasks"
    path.write_bytes(content)
    assert read_tasks(path) == TASKS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\xff", "can't be read"),
        (b"BZh no", "can't be read"),
        (TEXT[: TEXT.rindex(b"b b")], "line 7 .*3 endings"),
        (TEXT.replace(b"\n2\n", b"\n4\n"), "line 1 .*label 4"),
        (TEXT.replace(b"\n2\n", b"\ntwo\n"), "line 1 .*'two'"),
        (JSON.replace(b'"ctx": "It"', b'"text": "It"'), "line 2 .*'ctx'"),
        (JSON[:-5], "line 2"),
        (b"{}\n", "line 1"),
        (b'{"ctx": "a", "endings": 3, "label": 0}\n', "line 1"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "tasks"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_tasks(path)
    assert str(path) in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_tasks(tmp_path / "absent")


def all_documents():
    return [document for task in TASKS for document in documents(task, ByteTokenizer())]


def test_documents():
    """Context, space, ending; the ending's bytes are counted without the space."""
    second = all_documents()[1]
    text = "A man sat. ü".encode()
    assert second.tokens.tolist() == [BOS, *text]
    assert (second.ending, second.num_bytes) == (1 + len("A man sat."), 2)


def by_definition(model, document):
    """Behind three lone BOS: softmax of the softcapped logits, of every token of the ending."""
    tokens = [BOS] * 3 + document.tokens.tolist()
    batch = micro_batch(CONFIG, torch.tensor([[*tokens, 0]]).numpy(), [0, 1, 2, 3, len(tokens)])
    with torch.no_grad():
        z_TV = model(batch, model.plan_windows(batch, WINDOWS))
    log_p = softcap(z_TV, CONFIG.softcap_a, CONFIG.softcap_b, CONFIG.softcap_c).log_softmax(-1)
    places = range(3 + document.ending, len(tokens))
    return sum(log_p[place - 1, tokens[place]].item() for place in places)


@pytest.mark.parametrize("tokens_a_row", [1, 60, 10_000])
def test_packed_is_alone(tokens_a_row):
    """Whatever else is in the row, although smear, hashes and key offset look over the start."""
    model = random_model(CONFIG)
    rows = list(pack(all_documents(), BOS, tokens_a_row))
    assert len(rows) == {1: 8, 60: 3, 10_000: 1}[tokens_a_row]
    assert all(len(row.tokens_T) <= tokens_a_row for row in rows) or tokens_a_row == 1
    found = torch.cat([log_probabilities(model, row, WINDOWS) for row in rows])
    expected = [by_definition(model, document) for document in all_documents()]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10
    )


def test_baseline_model():
    model = random_baseline(257)
    (row,) = pack(all_documents(), BOS, 10_000)
    found = log_probabilities(model, row, Windows(1024, 1024))
    document = all_documents()[2]
    tokens = document.tokens.tolist()
    batch = micro_batch(model.config, torch.tensor([[*tokens, 0]]).numpy(), [0, len(tokens)])
    with torch.no_grad():
        log_p = model(batch, model.plan_windows(batch, Windows(1024, 1024))).log_softmax(-1)
    expected = sum(log_p[i - 1, tokens[i]] for i in range(document.ending, len(tokens)))
    torch.testing.assert_close(found[2], expected, rtol=1e-10, atol=1e-10)


def test_scores(monkeypatch):
    """acc takes the sums as they are, acc_norm each over its ending's bytes."""
    sums = [-8.0, -3.0, -4.0, -9.0, -1.0, -9.0, -9.0, -9.0]  # of bytes 8, 2, 18, 3; 3, …
    monkeypatch.setattr(
        hellaswag, "log_probabilities", lambda *_: torch.tensor(sums, dtype=torch.float64)
    )
    seen = []
    model = random_model(CONFIG)
    score = hellaswag.evaluate(
        model, WINDOWS, TASKS, ByteTokenizer(), progress=lambda *so_far: seen.append(so_far)
    )
    assert (score.acc, score.acc_norm, score.num_tasks) == (0.5, 1.0, 2)
    num_tokens = sum(3 + len(document.tokens) for document in all_documents())
    assert score.num_tokens == num_tokens and [scored for scored, _ in seen] == [8]
    assert score.tokens_per_s == num_tokens / score.seconds


def test_targets_of_a_row():
    """Only the ending's tokens are predicted, each at the place before it."""
    documents = [Document(torch.tensor([BOS, 5, 6, 7]).int().numpy(), 2, 1)] * 2
    (row,) = pack(documents, BOS, 100)
    assert row.tokens_T.tolist() == [BOS, BOS, BOS, BOS, 5, 6, 7] * 2
    assert row.targets_T.tolist() == [-1, -1, -1, -1, 6, 7, -1] * 2
    assert row.starts == [0, 1, 2, 3, 7, 8, 9, 10, 14]
    assert row.document_T.tolist() == [0] * 7 + [1] * 7
