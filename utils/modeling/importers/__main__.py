"""Prints the README's table of the weights of other projects that load."""

from utils.modeling.importers.layouts import table

if __name__ == "__main__":
    print(table())
