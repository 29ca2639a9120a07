"""report.html and its figures out of a finished run."""

def write_report(folder): pass
