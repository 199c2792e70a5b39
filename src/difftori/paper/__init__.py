"""The numbers printed in the DiffTORI paper, as data: see README.md beside this file."""
