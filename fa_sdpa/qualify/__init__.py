"""``python -m fa_sdpa qualify``: on this machine's GPU, which kernels work, and from where on they are faster.

grid.py      what is checked and timed, and what crossover tables are fitted to
worker.py    the process that does it, which may hang or die
session.py   asks a worker with a time limit, and starts another one where one was lost
run.py       the steps in turn, resumed where they were left; quarantine, crossover table
report.py    the report: Markdown, JSON, pictures
command.py   the command line
"""
