"""The programs that `benchmarks.netstack` runs; `_contract.py` says what each must do."""
