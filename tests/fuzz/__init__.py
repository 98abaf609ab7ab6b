"""Damaged files of every kind that vtexport reads: refused in one line, or used; never a traceback, a hang or a crash.

`python -m tests.fuzz` runs as many as asked for, the suite a sample. `targets/` holds one module for each kind of file,
and `kept/TARGET/` small inputs that once failed, which the suite tries again. `--guided` lets inputs that reach new code
lead to others, which finds what chance does not: a frame of a GIF that grows the picture.
"""
