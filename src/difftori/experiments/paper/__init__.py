"""Tables and figures of the paper, one file each. A study is found because its file is in this package."""
