"""The tests of aiotun. `tests.helpers` has the helpers that they share."""
