"""Any number of runs on one page: what came out, how sure that is, and by which protocol."""
