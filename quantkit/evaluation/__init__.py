"""Was it worth it: runners, comparison, report."""
