"""The floors, one module per op: `FLOORS`, a shape of every kernel with its formulas."""
