"""What a request costs: repom against hand-written code and against its peers.

`make bench` runs everything; README.md says what is measured, how, and how to read it.
"""
