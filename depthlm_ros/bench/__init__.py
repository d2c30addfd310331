"""`depthlm bench`: how fast points are answered here, beside the loops that others run, and beside what the device can.

shapes.py       sizes of published models, and a small one, for random weights
vocabulary.py   the tokenizer and processor files of such a model, made on the spot
subject.py      builds, keeps and loads what is measured
taught.py       random weights that answer the published sentence, with a number that hangs on the pixel
contenders.py   who is measured: per-point loop, batched generate, ours ...; served.py: a server by URL
rounds.py       interleaved rounds, medians and their spread, ratios, answers compared
floor.py        operations and bytes that a frame needs; ceilings.py: what the device does at those shapes
profiling.py    where a frame's time goes
report.py       the table and the JSON file
command.py      the command line
"""
