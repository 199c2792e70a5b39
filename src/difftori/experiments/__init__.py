"""Many runs: planning, execution on one machine or a cluster, statistics, tables, figures, reports."""
