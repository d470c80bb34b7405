"""Charts of runs from their logs: an HTML report, figures for a paper, and the curves of the server's page."""
