"""Functions that work on packets' bytes, in Python and in C; no asyncio here."""
