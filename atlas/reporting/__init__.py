"""What runs wrote down, as pictures: a report to keep, figures for a paper, and the curves of the served page."""
