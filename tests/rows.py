"""Rows of data files that several tests read."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

ASK = [{"role": "user", "content": "Where is the cat?"}]


def answer(text):
    return [{"role": "assistant", "content": text}]


COMPLETION = {"prompt": "Where is the cat?", "completion": " On the mat."}
PAIR = {"prompt": "Where is the cat?", "chosen": " On the mat.", "rejected": " In the garden, I think."}
GROUP = {"prompt": "Where is the cat?", "completions": [" On the mat.", " Here.", " There."], "rewards": [1, 0, 0.5]}
CHATS = [
    {"prompt": ASK, "completion": answer("On the mat.")},
    {"prompt": ASK, "chosen": answer("Here."), "rejected": answer("No.")},
]


def write(path, rows):
    if path.suffix == ".parquet":
        columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
        pq.write_table(pa.table(columns), path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
