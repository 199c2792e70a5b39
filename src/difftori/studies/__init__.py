"""Studies: one file per table or figure of the paper, with its runs, its reference numbers and its pictures."""
