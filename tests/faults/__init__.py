"""Faults, made on purpose: kills, rotten bytes, full disks. What must come out is the run that had none.

Each kind is a command of its own, works on Atlas from outside, says what it counted and exits with 1 where a
promise was broken:

    python -m tests.faults.kill --rounds 60       SIGKILL at random moments and inside saves
    python -m tests.faults.corrupt --rounds 200   flipped, cut, swapped and emptied files
    python -m tests.faults.disk --tmpfs           a disk that is full at every point of a save
    python -m tests.faults.report                 all of them, counted

What they promise is in docs/RELIABILITY.md.
"""
