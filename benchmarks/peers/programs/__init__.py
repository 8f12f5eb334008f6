"""The same small program for each library. `_contract` describes what it does."""
