"""Charts of what runs logged: a report to keep, figures for a paper, and the curves of the served page."""
