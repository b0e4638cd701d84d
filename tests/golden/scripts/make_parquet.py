"""Rows in every compression that Parquet has: tests/golden/parquet. Made with pyarrow 26.0.

    python make_parquet.py OUT_DIR
"""

import sys

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = [
    {
        "id": i,
        "text": f"row {i}: " + "the cat likes honey. " * (i % 4),
        "score": None if i % 5 == 0 else i / 8,
        "messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}, with ü and 猫"}],
    }
    for i in range(40)
]

table = pa.Table.from_pylist(ROWS)
for codec in ["none", "snappy", "gzip", "brotli", "zstd", "lz4"]:
    pq.write_table(table, f"{sys.argv[1]}/{codec}.parquet", compression=codec, row_group_size=16)
