"""How time and memory of the ops grow along one axis at a time: `python -m bench.scaling`."""
