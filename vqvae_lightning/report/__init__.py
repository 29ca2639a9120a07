"""`report.html` for a run or a sweep."""
