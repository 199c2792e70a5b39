"""Tables and figures of the paper, one file each, found by walking this package."""
