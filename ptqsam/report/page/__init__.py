"""The report: one HTML page about a run or a sweep that needs nothing else (`tools/report.py`)."""
