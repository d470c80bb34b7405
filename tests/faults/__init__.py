"""Faults made on purpose: kills, damaged bytes, full disks, changed data, consoles that fail, two processes in one
folder. The result must be the same as that of a run without faults.

Each kind is a separate command. It works on Atlas from outside, prints its counts, and exits with 1 if a promise was
broken:

    python -m tests.faults.kill --rounds 60       SIGKILL at random moments and inside saves
    python -m tests.faults.corrupt --rounds 200   flipped, cut, swapped and emptied files
    python -m tests.faults.disk --tmpfs           a disk that is full at every point of a save
    python -m tests.faults.syscalls               SIGKILL at every system call that changes the disk
    python -m tests.faults.power                  every state of the disk after a power cut
    python -m tests.faults.refusal --minutes 3    requests that are expensive to refuse
    python -m tests.faults.actors                 two processes in one output folder, in random histories
    python -m tests.faults.dataset                a dataset that changes under a run
    python -m tests.faults.console                standard streams that fail, and SIGHUP
    python -m tests.faults.file_types             pipes, links, folders and huge files in place of Atlas's own
    python -m tests.faults.report                 all of them, counted

The promises are in docs/RELIABILITY.md.
"""
