"""Evaluation: benchmarks, the harness that runs them on a checkpoint, and reports that compare runs.

`benchmark` says what a benchmark is, `benchmarks/` holds them (one file each), `harness` asks the model, `sample_log`
keeps every answer, `scorers` and `report` turn answers into figures, tables and charts.
"""
