"""The report of one or several runs: a page that needs nothing else, pictures and JSON."""
