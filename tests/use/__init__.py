"""The use lab: ``make test-use`` runs configs as users write them, through the command line, and checks what came out.

Options are covered pairwise, in an order drawn from the seed: any two values of two options meet in some row. A row is
a config, a few command lines, and invariants that hold whatever the options are.
"""
