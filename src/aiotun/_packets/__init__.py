"""Functions of packets' bytes, in Python and in C; no asyncio here."""
