"""The numbers printed in the DiffTORI paper, as data. See README.md in this folder."""
