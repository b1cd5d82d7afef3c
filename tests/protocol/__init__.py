"""The protocol for exactly-once in virtual time: a simulated server and network, and the library's real operations.

`model` is the server: the scripts of lua/, in Python, each in a module of its own, on what `includes` and `store` keep.
`network` carries packets, loses them, and delivers them late. `world` runs the calls of several clients step by step,
by the library's own delivery. `workload` draws a schedule by its seed, from `themes` and `beginnings`. `checks`
compares what the callers were answered with what the server did. `old_rules` puts faults of older protocols back: each
must be found. `python -m tests.protocol` carries out as many schedules as are wanted.
"""
