"""Speed, memory and scale, measured on the machine at hand.

    python -m benchmarks                      all rows, 1.1 billion parameters: hours, 30 GB of disk
    python -m benchmarks --size small         the same rows on small models: minutes
    python -m benchmarks --rows linear,ties --runs 1
    python -m benchmarks --list               what rows there are

A row runs whole commands, distmerge's and mergekit's in turn, and beside them a plain copy of the
same bytes in the same minute: the time below which nothing that reads and writes files can get.

    __main__.py       options in, tables out
    bench.py          what rows share: where things are, how a command is run
    comparisons.py    rows of distmerge against mergekit, one for each method
    limits.py         rows with a limit of their own: planning, start-up, Ray, threads, huge tensors
    scaling.py        the row that draws time against tensors, bytes and models
    link.py           the row that reads from S3 and the Hub over a long, narrow link
    clients.py        the row of two clients of S3, whose reads are in client_reads.py
    servers.py        the tests' servers, and that link: slow_link.py
    sweep_local.py    the row that writes many candidates, against as many single merges
    sweep_link.py     the row that scores many candidates over such a link
    shapes.py         names and shapes of the models' tensors
    models.py         synthetic checkpoints: written once, then reused
    recipes.py        the same recipe for both tools
    tools.py          a command's seconds and memory; the plain copy
    mergekit_env.py   a virtual environment of its own for mergekit
    machine.py        what it ran on
    results.py        what was measured, kept between runs
    table.py          results as Markdown and as a plot
    unsynced/         makes fsync do nothing, for the columns without it
"""
