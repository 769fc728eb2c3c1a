"""Stands in for an installed copy of MERU or HyCoCLIP: its module paths, names, shapes; its formulas, plainly."""
