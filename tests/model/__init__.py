"""A model of queues and devices: random interleavings, every packet accounted for.

`python -m tests.model --help` runs it; CONTRIBUTING.md says how to reproduce a failure.

A *case* is a configuration and a list of steps, both plain data that a seed gives (`steps`). The
*runner* opens one device, takes the steps, and compares what aiotun does with what must hold
(`world`). Only public names of aiotun are used, so that the model outlives every rewrite.
"""
