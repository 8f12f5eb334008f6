"""The tests of aiotun; `tests.helpers` has what they share."""
