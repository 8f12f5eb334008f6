"""The same small program with each library; `_contract` says what it does."""
