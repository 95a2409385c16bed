"""``python -m fa_sdpa bench``: one protocol for what is measured here, in ``benchmarks/`` and by ``qualify``.

cells.py       what is computed: shapes, their flops and bytes, grids, models, production cases
contenders.py  who computes it: fa4 through the router, torch's own choice, each of torch's backends, flash-attn-4
gate.py        whether a result is right, before it is timed
timing.py      how long it takes: on the device, on the host, in eager mode, in a CUDA graph
measure.py     these four, put together: one row for each cell, direction and contender
report.py      rows as a table, CSV and JSON; plots.py as pictures
host.py        what a call costs the host
provenance.py  where a number comes from
command.py     the command line
"""
